"""What every adapter shares: :class:`MGHFLoss` built from a configuration's values, video
flattened, and the order of the arguments checked under the names that the trainer's users know."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import MGHFLoss
from ..losses.mghf import DEFAULT_PRESET, Preset

DEFAULT_WEIGHT = 0.1
"""Beside L1 of weight 1 on images of 0 to 1, for the default extractor and preset."""


class Criterion(nn.Module):
    """:class:`mghf_fast.MGHFLoss` as trainers call it.

    Differs from it in the defaults: ``input_range="0,1"``, which is what trainers' images have, and
    ``patch_size="auto"``, so that crops below 32 pixels work. Video ``(B, T, 3, H, W)`` counts as
    B times T images.

    Args:
        variant, preset, extractor, top_m, reduction, input_range, patch_size, backend: as in
            :class:`mghf_fast.MGHFLoss`, and as configuration files spell them: ``preset: 2026``,
            ``input_range: [0, 1]``, ``extractor: /path/to/mine.safetensors``.
    """

    def __init__(
        self,
        variant: str = "c",
        preset: str | int | Preset = DEFAULT_PRESET,
        extractor: str | Path | nn.Module | None = None,
        top_m: int | None = None,
        reduction: str = "mean",
        input_range: str | Sequence[float] | None = "0,1",
        patch_size: int | str = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.loss = MGHFLoss(
            variant,
            preset,
            extractor,
            top_m,
            reduction,
            input_range,
            backend,
            patch_size=patch_size,
        )

    def terms(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """What each term adds to the loss, by name: the values add up to :meth:`forward`'s."""
        sr, gt, frames = pair(sr, gt)
        terms = self.loss.terms(sr, gt)
        if self.loss.variant == "n":
            return {"naive": _per_clip(terms["naive"], frames)}
        # The loss's own gammas, which can be set between two steps.
        factors = dataclasses.replace(self.loss.preset, gammas=self.loss.gammas).factors()
        return {
            name: _per_clip(factor * terms[name], frames)
            for name, factor in factors.items()
            if factor and name in terms
        }

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Images (B, 3, H, W) or video (B, T, 3, H, W), twice -> scalar, or (B,) with
        ``reduction="none"``.

        Raises:
            ValueError: ``gt`` asks for a gradient and ``sr`` does not, so the two are swapped; or
                as :class:`mghf_fast.MGHFLoss`.
        """
        sr, gt, frames = pair(sr, gt)
        return _per_clip(self.loss(sr, gt), frames)


OPTIONS = tuple(name for name in inspect.signature(Criterion.__init__).parameters if name != "self")
"""What a configuration may say of the loss itself."""


def check_options(owner: str, given: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Refuses a keyword that ``owner`` does not know, with those that it does.

    Raises:
        TypeError: as Python itself for an unknown keyword, which trainers show as it is.
    """
    allowed = tuple(allowed)
    if unknown := sorted(set(given) - set(allowed)):
        raise TypeError(
            f"{owner} got the unknown option{'s' * (len(unknown) > 1)} {', '.join(unknown)}; "
            f"allowed are {', '.join(allowed)}"
        )


def check_order(sr: Tensor, gt: Tensor, names: tuple[str, str] = ("sr", "gt")) -> None:
    """Refuses a swapped call. The loss lets no gradient reach its second argument, so a call in the
    wrong order would train nothing and say nothing.

    Raises:
        ValueError: the second image asks for a gradient and the first does not.
    """
    if torch.is_grad_enabled() and gt.requires_grad and not sr.requires_grad:
        first, second = names
        raise ValueError(
            f"{second} asks for a gradient and {first} does not: the super-resolved image comes "
            f"first ({first}), the ground truth second ({second})"
        )


def pair(
    sr: Tensor, gt: Tensor, names: tuple[str, str] = ("sr", "gt")
) -> tuple[Tensor, Tensor, int]:
    """Both images of four dimensions, and the frames of a clip (1 for images).

    Raises:
        TypeError: one is no tensor.
        ValueError: as :func:`check_order`.
    """
    for name, image in zip(names, (sr, gt), strict=True):
        if not isinstance(image, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(image).__name__}")
    check_order(sr, gt, names)
    if sr.dim() == gt.dim() == 5:
        return sr.flatten(0, 1), gt.flatten(0, 1), sr.shape[1]
    return sr, gt, 1


def _per_clip(value: Tensor, frames: int) -> Tensor:
    """One value per image -> one per clip; a scalar stays."""
    return value.view(-1, frames).mean(1) if value.dim() and frames > 1 else value
