"""The cost of Python: microseconds of an op and of a loss's step, on tensors so small that almost
nothing else counts.

    python -m benchmarks.host [--rounds 300] [--backend reference]

A GPU computes while Python goes on, so this is the minimum time of a step there, whatever the GPU.
On the CPU it includes the kernels at these sizes, a few microseconds each.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mghf_fast
from mghf_fast import DetailFeatureExtractor, MGHFLoss, functional
from mghf_fast.backends import BACKENDS

STEP_BOUNDS = {"c": 600.0, "n": 300.0}
"""Microseconds that a step of MGHF may take, forward and backward."""


class Row(NamedTuple):
    """Medians in microseconds: of the forward without a gradient, and of forward and backward."""

    name: str
    forward: float
    step: float | None


def _median(work: Callable[[], Any], rounds: int) -> float:
    for _ in range(20):
        work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def measure(name: str, function: Callable[[Tensor], Tensor], x: Tensor, rounds: int) -> Row:
    """Measures a function of one tensor; ``step`` is None if its result has no gradient."""

    def forward() -> None:
        with torch.no_grad():
            function(x)

    def step() -> None:
        x.grad = None
        torch.autograd.backward(result := function(x), torch.ones_like(result))

    x = x.detach().requires_grad_()
    differentiable = function(x).requires_grad
    return Row(name, _median(forward, rounds), _median(step, rounds) if differentiable else None)


def ops() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Every op by name, and its input."""
    maps, embeddings = torch.rand(1, 4, 6, 6), torch.rand(2, 4, 8)
    block = mghf_fast.nn.InvertibleBlock(4).requires_grad_(False).weights()
    projection = mghf_fast.nn.PatchProjection(4, 2, hidden=8, dimension=8)
    picture = torch.rand(1, 3, 16, 16)
    return {
        "coupling": (lambda x: functional.invertible_block(x, block), maps),
        "entropy": (functional.channel_entropy, maps),
        "gram": (functional.gram_matrix, maps),
        "content_style": (
            lambda x: torch.stack(functional.content_style_terms(gt=maps, sr=x)),
            maps,
        ),
        "patches": (projection, maps),
        "sinkhorn": (functional.sinkhorn_plan, torch.rand(2, 4, 4)),
        "monce": (lambda x: functional.monce_loss(x, embeddings), embeddings),
        "dec": (lambda x: functional.dec_loss(x, picture), picture),
    }


def losses() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """MGHF with the layout of `perceptual-v1`, three blocks behind a squeeze, and with that of the
    papers, one block behind a convolution; with few channels, on images of one patch."""
    gt = torch.rand(1, 3, 8, 8)
    made: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {}
    layouts: dict[str, dict[str, Any]] = {
        "squeeze": {"channels": 12, "blocks": 3, "stem": "squeeze", "squeeze": 2},
        "paper": {"channels": 4},
    }
    for layout, options in layouts.items():
        for variant in STEP_BOUNDS:
            extractor = DetailFeatureExtractor(3, **options)
            loss = MGHFLoss(variant, extractor=extractor, patch_size="auto")
            made[f"mghf_{variant} {layout}"] = functools.partial(loss, gt=gt), gt
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host")
    parser.add_argument("--rounds", type=int, default=300, help="of each; medians are printed")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        print(f"--rounds is {options.rounds}; allowed are 1 and more", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    torch.set_num_threads(1)
    over = []
    print(f"{'microseconds, one thread':26}{'forward':>9}{'step':>9}")
    with mghf_fast.use_backend(options.backend):
        for name, (function, x) in {**ops(), **losses()}.items():
            row = measure(name, function, x + 0.1 * torch.rand_like(x), options.rounds)
            print(f"{name:26}{row.forward:9.0f}" + (f"{row.step:9.0f}" if row.step else ""))
            bound = STEP_BOUNDS.get(name[5:6]) if name.startswith("mghf_") else None
            if bound is not None and row.step is not None and row.step > bound:
                over.append(f"{name}: {row.step:.0f} microseconds a step, {bound:.0f} are the aim")
    for text in over:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
