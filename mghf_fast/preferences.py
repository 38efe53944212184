"""Whether "auto" prefers the CUDA or the Triton kernels of an op on an NVIDIA GPU that runs both.

The first matching rule decides; the rules that `mghf-fast tune` measured on this very GPU come
before the committed table. `python -m benchmarks.gpu_tables` says where committed GPU results call
for another rule, and a test keeps the table in agreement with them. An op without a result yet is
decided by the launches and memory traffic that its kernels need.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import cache

MEASURED = (9, 0)
"""The compute capability of the GPU that the table is from."""


class Rule(NamedTuple):
    """``backends``, best first, for an op on tensors of these types (empty: any type) whose size
    (see :func:`size_of`) is at least ``least`` and less than ``below``; with ``weights`` only for
    calls that need the gradients of weights; on GPUs of any compute capability but
    ``unless``."""

    op: str
    backends: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = ()
    least: float = 0
    below: float = math.inf
    weights: bool = False
    unless: tuple[int, int] | None = None

    def fits(
        self,
        op: str,
        dtype: torch.dtype,
        size: int,
        need_weights: bool = False,
        capability: tuple[int, int] = MEASURED,
    ) -> bool:
        return (
            self.op == op
            and (need_weights or not self.weights)
            and (not self.dtypes or dtype in self.dtypes)
            and self.least <= size < self.below
            and capability != self.unless
        )


# On an H200 (benchmarks/results/h200.json) Triton's bfloat16 sinkhorn was faster than CUDA's with
# 441 patches per map, and slower with 100 and from 641 on; bounds are geometric means of measured
# sizes. CUDA's monce was the slower one with 441 too, but its kernels are others now: up to 448
# patches a block keeps a map on the chip, up to 1792 a cluster does, on capability 9.0 alone, and
# no GPU has timed either. They have less to compute and to move than Triton's (benchmarks/NOTES).
# Triton's dec has passed its tests there, CUDA's has run on no GPU yet, and neither have its
# gradients of a block's weights.
MANY = 210
BEYOND_CLUSTER = 641  # of sinkhorn's matrix
BEYOND_BLOCK_OF_MONCE, BEYOND_CLUSTER_OF_MONCE = 449, 1793
HALVES = (torch.float16, torch.bfloat16)

RULES = (
    Rule("sinkhorn", ("triton", "cuda"), HALVES, least=MANY, below=BEYOND_CLUSTER),
    Rule("monce", ("triton", "cuda"), least=BEYOND_CLUSTER_OF_MONCE),
    Rule("monce", ("triton", "cuda"), least=BEYOND_BLOCK_OF_MONCE, unless=(9, 0)),
    Rule("dec", ("triton", "cuda")),
    Rule("coupling", ("triton", "cuda"), weights=True),
)

REWRITTEN: Mapping[tuple[str, str], str] = {("monce", "cuda"): "2026-11-30"}
"""Since when (UTC) the kernels of an op and a backend are others than a committed result timed."""

DEFAULT = ("cuda", "triton")
DEVICES = ("cuda",)
"""Types of devices that can be tuned."""


def size_of(op: str, shape: Sequence[int]) -> int:
    """The size that a rule's bounds limit: patches per map for `sinkhorn` and `monce`, elements of
    the first tensor, which has this shape, for the other ops."""
    return shape[1] if op in ("sinkhorn", "monce") else math.prod(shape)


def preferred_kernels(
    op: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    rules: Sequence[Rule] = RULES,
    need_weights: bool = False,
    capability: tuple[int, int] = MEASURED,
) -> tuple[str, ...]:
    """The backends with kernels for GPUs, best first."""
    for rule in rules:
        if rule.fits(op, dtype, size_of(op, shape), need_weights, capability):
            return rule.backends
    return DEFAULT


@functools.cache
def tuned(device: torch.device) -> tuple[Rule, ...]:
    """The rules that `mghf-fast tune` has measured for a GPU; empty if there are none or they are
    malformed."""
    if device.type not in DEVICES:
        return ()
    try:
        found = cache.known(device)["tuned"]["rules"]
        return tuple(
            Rule(
                row["op"],
                tuple(str(backend) for backend in row["backends"]),
                tuple(getattr(torch, name) for name in row["dtypes"]),
                float(row["least"]),
                math.inf if row["below"] is None else float(row["below"]),
            )
            for row in found
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


forgotten = 0
"""How often :func:`forget` was called; earlier choices may be out of date."""


def forget() -> None:
    """Makes the next choice read the user's table again."""
    global forgotten
    forgotten += 1
    tuned.cache_clear()


def in_order(
    op: str, tensors: Sequence[Tensor], backends: Sequence[str], need_weights: bool = False
) -> tuple[str, ...]:
    """``backends`` reordered: those with kernels for GPUs first, in the order of the tables."""
    if not tensors:
        return tuple(backends)
    x = tensors[0]
    # What was tuned is a step of an image.
    rules = RULES if need_weights else (*tuned(x.device), *RULES)
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else MEASURED
    first = preferred_kernels(op, x.dtype, x.shape, rules, need_weights, capability)
    known = tuple(b for b in first if b in backends)
    return known + tuple(b for b in backends if b not in known)
