"""Synthetic problems of each op at a chosen size, for checking and timing kernels without data.

The ops are called by their registered names, without an import: the caller has registered them
already, and the ops check their own kernels on these problems (:mod:`mghf_fast.trials`). Random
numbers are drawn on the CPU, so that they are the same for every device. The expected result is the
reference's in float64, or in float32 for ops whose decisions (bins, kept maps) are always float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[..., Tensor]
"""Takes tensors, a backend and, for ops that have it, a precision."""

CHANNELS, PATCH_SIZE, STRIDE, BINS = 128, 32, 24, 256
NORM_FLOOR = 0.02 * 192**0.5
DRAWN: Any = {"device": "cpu", "dtype": torch.float32}
"""Overrides the calling program's default device and dtype."""


@dataclass(frozen=True)
class Problem:
    """``run(tensors, backend[, precision])`` computes the op; its gradient, if it has one, is with
    respect to ``tensors[0]``, and with ``weights`` the op has gradients of the other tensors too.
    ``size`` is the one in the rules of :mod:`mghf_fast.preferences`."""

    op: str
    run: Run
    tensors: tuple[Tensor, ...]
    differentiable: bool = True
    exact: torch.dtype = torch.float64
    weights: bool = False
    graded: bool = False
    """Whether the op has a ``precision``."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Problem:
        moved = tuple(x.to(device, dtype) for x in self.tensors)
        return dataclasses.replace(self, tensors=moved)

    def results(
        self, backend: str, of_weights: bool = False, precision: str | None = None
    ) -> list[Tensor]:
        """The op's result and its gradient, if it has one, for an upstream gradient of 1, 2, 3, 1,
        2, 3, ..., all detached; with ``of_weights`` also those of its weights, if it has any.
        ``precision`` is for the ops that have it; None leaves their default."""
        chosen = (backend,) if precision is None else (backend, precision)
        first, *rest = (x.detach() for x in self.tensors)
        if not self.differentiable:
            return [self.run((first, *rest), *chosen).detach()]
        leaf = first.clone().requires_grad_()
        with torch.enable_grad():
            result = self.run((leaf, *rest), *chosen)
            upstream = 1 + torch.arange(result.numel(), device=result.device) % 3
            upstream = upstream.view(result.shape).to(result)
            found = [result.detach(), *torch.autograd.grad(result, leaf, upstream)]
            if of_weights and self.weights:
                # In a call of their own, because an op may take another way where they are needed.
                weights = [x.clone().requires_grad_() for x in rest]
                result = self.run((first, *weights), *chosen)
                found += torch.autograd.grad(result, weights, upstream)
        return found


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _features(batch: int, side: int, count: int = 1, channels: int = CHANNELS) -> list[Tensor]:
    """Similar stacks of feature maps."""
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


def coupling(batch: int, side: int, inverse: bool = False, activation: str = "relu6") -> Problem:
    name = "coupling_inverse" if inverse else "coupling"

    def run(tensors: tuple[Tensor, ...], *chosen: str) -> Tensor:
        x, *weights = tensors
        block, options = getattr(torch.ops.mghf_fast, name), (activation, "bottleneck", 2.0)
        if inverse:
            undone: Tensor = block(x, weights, *options, *chosen)
            return undone
        y: Tensor = block(x, weights, *options, x.requires_grad, *chosen)[0]
        return y

    tensors = _coupling_tensors(batch, side)
    forward = not inverse
    return Problem(name, run, tensors, differentiable=forward, weights=forward, graded=forward)


def entropy(batch: int, side: int) -> Problem:
    def run(tensors: tuple[Tensor, ...], *chosen: str) -> Tensor:
        result: Tensor = torch.ops.mghf_fast.entropy(tensors[0], BINS, *chosen)
        return result

    tensors = tuple(_features(batch, side))
    return Problem("entropy", run, tensors, differentiable=False, exact=torch.float32)


def gram(batch: int, side: int) -> Problem:
    def run(tensors: tuple[Tensor, ...], *chosen: str) -> Tensor:
        (x,) = tensors
        result: Tensor = torch.ops.mghf_fast.gram(x, 1 / x[0].numel(), *chosen)
        return result

    return Problem("gram", run, tuple(_features(batch, side)), graded=True)


def content_style(batch: int, side: int) -> Problem:
    def run(tensors: tuple[Tensor, ...], *chosen: str) -> Tensor:
        sr, gt = tensors
        terms = torch.ops.mghf_fast.content_style(
            gt, sr, CHANNELS // 2, 1.1, 2**0.5, BINS, "channel", *chosen
        )
        return torch.stack(terms[:4])

    tensors = tuple(_features(batch, side, 2))
    return Problem("content_style", run, tensors, exact=torch.float32, graded=True)


def patches(batch: int, side: int) -> Problem:
    def run(tensors: tuple[Tensor, ...], *chosen: str) -> Tensor:
        embedding: Tensor
        embedding, _ = torch.ops.mghf_fast.patches(*tensors, PATCH_SIZE, STRIDE, *chosen)
        return embedding

    generator = _generator()
    first = torch.randn(128, PATCH_SIZE**2, generator=generator, **DRAWN) / PATCH_SIZE
    second = torch.randn(64, 128, generator=generator, **DRAWN) / 128**0.5
    zeros = torch.zeros(128, **DRAWN), torch.zeros(64, **DRAWN)
    tensors = (*_features(batch, side, channels=32), first, zeros[0], second, zeros[1])
    return Problem("patches", run, tensors, graded=True)


def sinkhorn(maps: int, count: int) -> Problem:
    def run(tensors: tuple[Tensor, ...], *chosen: str) -> Tensor:
        plan: Tensor = torch.ops.mghf_fast.sinkhorn(tensors[0], "hard", 0.1, 20, None, *chosen)
        return plan

    query, key = _embeddings(maps, count)
    return Problem("sinkhorn", run, (query @ key.mT,))


def monce(maps: int, count: int) -> Problem:
    def run(tensors: tuple[Tensor, ...], *chosen: str) -> Tensor:
        losses: Tensor
        losses, _ = torch.ops.mghf_fast.monce(
            *tensors, 0.07, 1.0, 50, 1.0, "hard", "exact", *chosen
        )
        return losses

    return Problem("monce", run, _embeddings(maps, count), graded=True)


def dec(batch: int, side: int) -> Problem:
    """`dec` on images cut into flattened patches of 8 x 8 pixels, (N, 192)."""

    def run(tensors: tuple[Tensor, ...], *chosen: str) -> Tensor:
        loss: Tensor
        loss, _ = torch.ops.mghf_fast.dec(
            *tensors, 34.0, 0.5, 1.5, "inside", "rmse", 1.0, NORM_FLOOR, *chosen
        )
        return loss

    gt = torch.rand(batch, 3, side, side, generator=_generator(), **DRAWN)
    sr = (0.9 * gt + 0.1 * gt.flip(3)).clone()
    tiles = (x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5) for x in (sr, gt))
    return Problem("dec", run, tuple(x.reshape(-1, 192) for x in tiles), exact=torch.float32)


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
"""Op -> its problem; arguments are a batch and a side in pixels, or maps and patches per map."""

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


LARGER: Mapping[str, tuple[int, int]] = {
    "coupling": (1, 70),
    "content_style": (1, 132),
    "sinkhorn": (1, 650),
    "monce": (1, 650),
}
"""As ``SMALL``, for ops whose kernels divide larger problems otherwise: into strips, a matrix among
several blocks, or several tiles of pixels to a block."""


def small(op: str) -> Problem:
    """A problem that takes milliseconds, with sides that are no multiple of any tile's."""
    return PROBLEMS[op](*SMALL[op])


def for_trial(op: str) -> list[Problem]:
    """The small problem, and others where these take another way: larger ones, or another
    activation."""
    found = [small(op)]
    if op == "monce":
        found.append(monce(1, 230))  # a block of three warpgroups
    if op in LARGER:
        found.append(PROBLEMS[op](*LARGER[op]))
    if op == "coupling":
        found.append(coupling(1, 9, activation="leaky_relu"))
    return found
