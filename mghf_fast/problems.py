"""A problem of each op at a chosen size, for trying and timing kernels where no data are at hand.

Numbers are drawn on the CPU, the same ones for every device. The reference's float64 result is the
measure, but where an op's decisions (bins, the maps kept) are float32 always: there its float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[tuple[Tensor, ...], str | None], Tensor]

CHANNELS, PATCH_SIZE, STRIDE = 128, 32, 24
DRAWN: Any = {"device": "cpu", "dtype": torch.float32}
"""Whatever the defaults of the program that asks."""


@dataclass(frozen=True)
class Problem:
    """``run(tensors, backend)`` computes the op; ``tensors[0]`` is what a gradient goes to, unless
    the op has none. ``size`` is what the rules of :mod:`mghf_fast.preferences` go by."""

    op: str
    run: Run
    tensors: tuple[Tensor, ...]
    differentiable: bool = True
    exact: torch.dtype = torch.float64

    def to(self, device: torch.device, dtype: torch.dtype) -> Problem:
        moved = tuple(x.to(device, dtype) for x in self.tensors)
        return Problem(self.op, self.run, moved, self.differentiable, self.exact)

    def results(self, backend: str | None) -> list[Tensor]:
        """The op's result and, if it has one, its gradient for an upstream gradient of 1, 2, 3, 1,
        2, 3, ..., both detached."""
        leaf = self.tensors[0].detach().clone().requires_grad_(self.differentiable)
        with torch.enable_grad():
            result = self.run((leaf, *self.tensors[1:]), backend)
            if not self.differentiable:
                return [result.detach()]
            upstream = 1 + torch.arange(result.numel(), device=result.device) % 3
            (gradient,) = torch.autograd.grad(result, leaf, upstream.view(result.shape).to(result))
        return [result.detach(), gradient]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _features(batch: int, side: int, count: int = 1, channels: int = CHANNELS) -> list[Tensor]:
    """Stacks that resemble each other."""
    shape = (batch, channels, side, side)
    first = torch.randn(shape, generator=_generator(), **DRAWN)
    if count == 1:
        return [first]
    other = torch.randn(shape, generator=_generator().manual_seed(1), **DRAWN)
    return [first, 0.8 * first + 0.6 * other]


def _embeddings(maps: int, patches: int) -> tuple[Tensor, Tensor]:
    query, noise = torch.randn(2, maps, patches, 64, generator=_generator(), **DRAWN)
    return F.normalize(query, dim=2), F.normalize(query + 0.5 * noise, dim=2)


def _coupling_tensors(batch: int, side: int) -> tuple[Tensor, ...]:
    half, generator = CHANNELS // 2, _generator()

    def kernel(*shape: int) -> Tensor:
        fan_in = shape[1] * shape[2] * shape[3]
        return torch.randn(shape, generator=generator, **DRAWN) / fan_in**0.5

    mix = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=generator, **DRAWN))[0]
    weights = [mix[..., None, None], torch.zeros(CHANNELS, **DRAWN)]
    for _ in range(3):
        weights += [kernel(CHANNELS, half, 1, 1), kernel(CHANNELS, 1, 3, 3)]
        weights += [0.3 * kernel(half, CHANNELS, 1, 1)]
    return (*_features(batch, side), *(w.contiguous() for w in weights))


def coupling(batch: int, side: int, inverse: bool = False) -> Problem:
    from . import functional

    block = functional.invertible_block_inverse if inverse else functional.invertible_block

    def run(tensors: tuple[Tensor, ...], backend: str | None) -> Tensor:
        x, *weights = tensors
        packed = functional.BlockWeights.from_tensors(weights, "relu6", "bottleneck", 2.0)
        return block(x, packed, backend=backend)

    name = "coupling_inverse" if inverse else "coupling"
    return Problem(name, run, _coupling_tensors(batch, side), differentiable=not inverse)


def entropy(batch: int, side: int) -> Problem:
    from . import functional

    def run(tensors: tuple[Tensor, ...], backend: str | None) -> Tensor:
        return functional.channel_entropy(tensors[0], backend=backend)

    tensors = tuple(_features(batch, side))
    return Problem("entropy", run, tensors, differentiable=False, exact=torch.float32)


def gram(batch: int, side: int) -> Problem:
    from . import functional

    def run(tensors: tuple[Tensor, ...], backend: str | None) -> Tensor:
        return functional.gram_matrix(tensors[0], backend=backend)

    return Problem("gram", run, tuple(_features(batch, side)))


def content_style(batch: int, side: int) -> Problem:
    from . import functional

    def run(tensors: tuple[Tensor, ...], backend: str | None) -> Tensor:
        sr, gt = tensors
        terms = functional.content_style_terms(gt=gt, sr=sr, backend=backend)
        return torch.stack([terms.naive, terms.mse, terms.correlation, terms.gram])

    tensors = tuple(_features(batch, side, 2))
    return Problem("content_style", run, tensors, exact=torch.float32)


def patches(batch: int, side: int) -> Problem:
    from . import functional

    def run(tensors: tuple[Tensor, ...], backend: str | None) -> Tensor:
        return functional.patch_projection(
            *tensors, patch_size=PATCH_SIZE, stride=STRIDE, backend=backend
        )

    generator = _generator()
    first = torch.randn(128, PATCH_SIZE**2, generator=generator, **DRAWN) / PATCH_SIZE
    second = torch.randn(64, 128, generator=generator, **DRAWN) / 128**0.5
    zeros = torch.zeros(128, **DRAWN), torch.zeros(64, **DRAWN)
    return Problem(
        "patches", run, (*_features(batch, side, channels=32), first, zeros[0], second, zeros[1])
    )


def sinkhorn(maps: int, count: int) -> Problem:
    from . import functional

    def run(tensors: tuple[Tensor, ...], backend: str | None) -> Tensor:
        return functional.sinkhorn_plan(tensors[0], epsilon=0.1, iterations=20, backend=backend)

    query, key = _embeddings(maps, count)
    return Problem("sinkhorn", run, (query @ key.mT,))


def monce(maps: int, count: int) -> Problem:
    from . import functional

    def run(tensors: tuple[Tensor, ...], backend: str | None) -> Tensor:
        return functional.monce_loss(*tensors, reduction="none", backend=backend)

    return Problem("monce", run, _embeddings(maps, count))


def dec(batch: int, side: int) -> Problem:
    from . import functional

    def run(tensors: tuple[Tensor, ...], backend: str | None) -> Tensor:
        return functional.dec_loss(*tensors, backend=backend)

    gt = torch.rand(batch, 3, side, side, generator=_generator(), **DRAWN)
    sr = (0.9 * gt + 0.1 * gt.flip(3)).clone()
    return Problem("dec", run, (sr, gt), exact=torch.float32)


PROBLEMS: Mapping[str, Callable[..., Problem]] = {
    "coupling": coupling,
    "coupling_inverse": lambda batch, side: coupling(batch, side, inverse=True),
    "entropy": entropy,
    "gram": gram,
    "content_style": content_style,
    "patches": patches,
    "sinkhorn": sinkhorn,
    "monce": monce,
    "dec": dec,
}
"""By the op's name; arguments are a batch and a side in pixels, or maps and patches a map."""

SMALL: Mapping[str, tuple[int, int]] = {
    "coupling": (2, 19),
    "coupling_inverse": (2, 19),
    "entropy": (2, 37),
    "gram": (2, 37),
    "content_style": (2, 37),
    "patches": (1, 80),
    "sinkhorn": (3, 50),
    "monce": (3, 50),
    "dec": (1, 64),
}


def small(op: str) -> Problem:
    """A problem of milliseconds, with sides that fit no tile."""
    return PROBLEMS[op](*SMALL[op])
