"""Finds the weight at which a loss's gradient is as long as the pixel loss's.

A weight that suited another loss, extractor or crop size says nothing about this one: two losses
with similar values can have gradients of lengths a hundred times apart. The effect of a weight is
the length of the gradient *in the network's parameters*, which is therefore measured here.

    from mghf_fast.integrations.calibrate import weight_for
    weight = weight_for(mghf_fast.MGHFLoss(input_range="0,1"), net, batches, ratio=1.0)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_number

__all__ = ["Calibration", "measure", "weight_for"]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Calibration:
    """Lengths of two losses' gradients, one entry per batch.

    Attributes:
        loss: length of the loss's gradient at weight 1, L2 norm over all parameters.
        pixel: length of the pixel loss's gradient.
        cosine: cosine of the angle between the two gradients, -1 to 1.
    """

    loss: tuple[float, ...]
    pixel: tuple[float, ...]
    cosine: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Length of the loss's gradient divided by the pixel loss's, for each batch."""
        return tuple(a / b for a, b in zip(self.loss, self.pixel, strict=True))

    @property
    def ratio(self) -> float:
        """The median over the batches of :attr:`ratios`, at weight 1."""
        return statistics.median(self.ratios)

    def weight(self, ratio: float = 1.0) -> float:
        """The weight at which the loss's gradient is ``ratio`` times as long as the pixel loss's.

        Raises:
            TypeError, ValueError: ``ratio`` is not a number above 0.
        """
        check_number("ratio", ratio, positive=True)
        return ratio / self.ratio


def weight_for(
    loss: Loss,
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    ratio: float = 1.0,
    pixel: Loss = F.l1_loss,
) -> float:
    """The factor of ``loss`` at which its gradient in the parameters of ``net`` is ``ratio`` times
    as long as that of ``pixel``: the median over the batches.

    The result is valid for this network at this point of its training and for this crop size; for
    an untrained network it is of little use. Arguments and errors as in :func:`measure`.
    """
    check_number("ratio", ratio, positive=True)
    return measure(loss, net, batches, pixel).weight(ratio)


def measure(
    loss: Loss,
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    pixel: Loss = F.l1_loss,
) -> Calibration:
    """Both losses' gradients in the parameters of ``net``, batch by batch.

    Nothing is changed: no ``.grad`` is written, and buffers (the statistics of batch norms) are
    restored. The network stays in its mode, training or evaluation.

    Args:
        loss: (sr, gt) -> scalar, with weight 1.
        net: low-resolution batch -> ``sr``; at least one parameter must be trainable.
        batches: pairs (low resolution, ground truth), moved to the network's device. Use six or
            more for a meaningful median; with an endless iterable the call never returns.
        pixel: the pixel loss, (sr, gt) -> scalar.

    Raises:
        TypeError: a loss does not return a scalar tensor.
        ValueError: no batch, no trainable parameter, a gradient that is 0 or not finite.
    """
    parameters = [p for p in net.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("net must have a trainable parameter, got none that requires a gradient")
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    found: list[tuple[float, float, float]] = []
    try:
        for number, (low, gt) in enumerate(batches):
            device = parameters[0].device
            with torch.enable_grad():
                sr = net(low.to(device))
                gt = gt.to(device)
                values = [("pixel", _scalar("pixel", pixel(sr, gt)))]
                values.append(("loss", _scalar("loss", loss(sr, gt))))
            first, second = (
                _flat(
                    torch.autograd.grad(
                        value, parameters, retain_graph=name == "pixel", allow_unused=True
                    )
                )
                for name, value in values
            )
            lengths = [float(first.norm()), float(second.norm())]
            for (name, _), length in zip(values, lengths, strict=True):
                if not 0 < length < math.inf:
                    raise ValueError(
                        f"the gradient of {name} in batch {number} has the length {length:g}; it "
                        "must be finite and above 0"
                    )
            cosine = float(first @ second) / (lengths[0] * lengths[1])
            found.append((lengths[1], lengths[0], cosine))
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    if not found:
        raise ValueError("batches must hold at least one pair (low resolution, ground truth)")
    return Calibration(*(tuple(column) for column in zip(*found, strict=True)))


def _scalar(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must return a scalar tensor, got {got}")
    if not value.requires_grad:
        raise TypeError(f"{name} must depend on sr, its first argument; its value has no gradient")
    return value.reshape(())


def _flat(gradients: Iterable[Tensor | None]) -> Tensor:
    # In float64, because the squares of many small numbers are summed.
    return torch.cat([g.double().flatten() for g in gradients if g is not None])
