"""Training objectives: L1, MGHF, and the perceptual losses that it is compared with.

An objective takes the super-resolved picture and the ground truth, ``(B, 3, H, W)`` each in [0, 1],
and returns its terms by name; ``"total"`` is the one to minimise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mghf_fast
from mghf_fast.losses import Preset
from mghf_fast.losses.mghf import DEFAULT_PRESET

Objective = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""``(sr, gt)`` -> terms by name; ``"total"`` is the one to minimise."""

FIRST_BATCHES = 4
"""Number of batches over which the length of a gradient is averaged."""


def l1(sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
    """The mean absolute error."""
    loss = F.l1_loss(sr, gt)
    return {"total": loss, "l1": loss.detach()}


def mghf(
    extractor: nn.Module | str | None = None,
    variant: str = "c",
    preset: str | Preset = DEFAULT_PRESET,
) -> Objective:
    """MGHF-c or MGHF-n alone, with all its terms; the arguments are :class:`MGHFLoss`'s."""
    loss = mghf_fast.MGHFLoss(variant, preset, extractor, input_range="0,1")

    def objective(sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        terms = loss.terms(sr, gt)
        return {n: term if n == "total" else term.detach() for n, term in terms.items()}

    return objective


def vgg16(layers: int = 3) -> Objective:
    """The VGG-16 perceptual loss with trained weights: the mean squared error of one layer's
    features.

    The network is the VGG-16 of shift-tolerant LPIPS, trained on ImageNet, with a blur before each
    strided step.

    Args:
        layers: 1 to 5, for relu1_2 to relu5_3.

    Raises:
        ModuleNotFoundError: ``stlpips_pytorch`` is not installed.
    """
    from ..evaluate.stlpips import ShiftTolerantLPIPS

    network = ShiftTolerantLPIPS("vgg")

    def objective(sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            target = network.features(gt, layers)[-1]
        loss = F.mse_loss(network.features(sr, layers)[-1], target)
        return {"total": loss, "vgg16": loss.detach()}

    return objective


def lpips_vgg() -> Objective:
    """LPIPS as a loss: shift-tolerant LPIPS on VGG-16, the mean over the batch.

    Raises:
        ModuleNotFoundError: ``stlpips_pytorch`` is not installed.
    """
    from ..evaluate.stlpips import ShiftTolerantLPIPS

    network = ShiftTolerantLPIPS("vgg")

    def objective(sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            target = network.features(gt)
        loss = network.compare(network.features(sr), target).mean()
        return {"total": loss, "lpips": loss.detach()}

    return objective


def with_l1(objective: Objective, weight: float, name: str = "perceptual") -> Objective:
    """``L1 + weight * objective``; the terms are ``"l1"``, ``objective``'s own, and its unweighted
    total under ``name``."""

    def both(sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        mae, terms = F.l1_loss(sr, gt), objective(sr, gt)
        total = mae + weight * terms["total"]
        shown = {n: term.detach() for n, term in terms.items() if n != "total"}
        return {"total": total, "l1": mae.detach(), name: terms["total"].detach(), **shown}

    return both


def gradient_length(
    objective: Objective,
    network: Callable[[Tensor], Tensor],
    data: Iterable[tuple[Tensor, Tensor]],
    count: int = FIRST_BATCHES,
) -> float:
    """Mean Euclidean length of ``objective``'s gradient in ``network``'s output.

    Losses differ in scale; with weights that give their gradients equal lengths relative to L1's,
    they are compared by direction alone.

    Args:
        data: yields ``(lr, gt)`` batches, of which the first ``count`` are used.
    """
    lengths = []
    for lr, gt in itertools.islice(data, count):
        with torch.no_grad():
            sr = network(lr)
        sr = sr.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(sr, gt)["total"], sr)
        lengths.append(float(torch.linalg.vector_norm(gradient)))
    if not lengths:
        raise ValueError("data gives no batch; at least one is needed")
    return sum(lengths) / len(lengths)
