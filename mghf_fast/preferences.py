"""Which of two kinds of kernels "auto" takes on an NVIDIA GPU where both can run: a line a rule.

The first rule that fits decides: of those that `mghf-fast tune` has measured on this very GPU, then
of the committed table. `python -m benchmarks.gpu_tables` says where the committed results of GPUs
ask for another one, and a test holds the table to them. What no result has decided yet goes by the
number of launches and of bytes that the kernels need.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import cache


class Rule(NamedTuple):
    """``backends``, best first, for an op on tensors of these types (empty: of any) whose size (see
    :func:`size_of`) is at least ``least`` and less than ``below``."""

    op: str
    backends: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = ()
    least: float = 0
    below: float = math.inf

    def fits(self, op: str, dtype: torch.dtype, size: int) -> bool:
        return (
            self.op == op
            and (not self.dtypes or dtype in self.dtypes)
            and self.least <= size < self.below
        )


# An H200 found CUDA's monce twice as fast for 100 patches a map, Triton's for 441, and of the plans
# alone in half precision Triton's for 441; bounds are the geometric mean of what was measured. From
# 641 patches on a matrix is on no cluster's chip, and CUDA's monce streams it through one block.
MANY = 210
ON_CHIP = 641
HALVES = (torch.float16, torch.bfloat16)

RULES = (
    Rule("sinkhorn", ("triton", "cuda"), HALVES, least=MANY, below=ON_CHIP),
    Rule("monce", ("triton", "cuda"), least=MANY),
)

DEFAULT = ("cuda", "triton")
DEVICES = ("cuda",)
"""Types of devices that can be tuned."""


def size_of(op: str, shape: Sequence[int]) -> int:
    """What a rule's bounds are about: the patches of a map, for `sinkhorn` and `monce`, and for the
    others the elements of the first tensor, of this shape."""
    return shape[1] if op in ("sinkhorn", "monce") else math.prod(shape)


def preferred_kernels(
    op: str, dtype: torch.dtype, shape: Sequence[int], rules: Sequence[Rule] = RULES
) -> tuple[str, ...]:
    """Backends with kernels for GPUs, best first."""
    for rule in rules:
        if rule.fits(op, dtype, size_of(op, shape)):
            return rule.backends
    return DEFAULT


@functools.cache
def tuned(device: torch.device) -> tuple[Rule, ...]:
    """The rules that `mghf-fast tune` has found for a GPU, none before or where they do not make
    sense."""
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
"""How often :func:`forget` was called: what was chosen before may have to be chosen again."""


def forget() -> None:
    """Lets the user's table be read again."""
    global forgotten
    forgotten += 1
    tuned.cache_clear()


def in_order(op: str, tensors: Sequence[Tensor], backends: Sequence[str]) -> tuple[str, ...]:
    """``backends``, those with kernels for GPUs first, as the tables have them."""
    if not tensors:
        return tuple(backends)
    x = tensors[0]
    first = preferred_kernels(op, x.dtype, x.shape, (*tuned(x.device), *RULES))
    known = tuple(b for b in first if b in backends)
    return known + tuple(b for b in backends if b not in known)
