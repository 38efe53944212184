"""The common base of the adapters: it builds :class:`MGHFLoss` from a configuration's values,
flattens video, and checks the order of the arguments under the trainer's names for them."""

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
"""Weight relative to L1 with weight 1 on images in [0, 1], for the default extractor and preset."""


class Criterion(nn.Module):
    """:class:`mghf_fast.MGHFLoss` as trainers call it.

    Two defaults differ: ``input_range="0,1"``, the range of trainers' images, and
    ``patch_size="auto"``, so that crops below 32 pixels work. Video ``(B, T, 3, H, W)`` counts as
    B times T images.

    Args:
        variant, preset, extractor, top_m, reduction, input_range, patch_size, backend, precision:
            as in :class:`mghf_fast.MGHFLoss`, in the forms of configuration files too:
            ``preset: 2026``, ``input_range: [0, 1]``, ``extractor: /path/to/mine.safetensors``.
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
        precision: str = "auto",
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
            precision=precision,
        )

    def terms(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """Each term's contribution to the loss, by name; their sum is :meth:`forward`'s result."""
        sr, gt, frames = pair(sr, gt)
        terms = self.loss.terms(sr, gt)
        if self.loss.variant == "n":
            return {"naive": _per_clip(terms["naive"], frames)}
        # The loss's current gammas, which can be set between steps.
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
            ValueError: only ``gt`` requires a gradient, as when the two are swapped; or as
                :class:`mghf_fast.MGHFLoss`.
        """
        sr, gt, frames = pair(sr, gt)
        return _per_clip(self.loss(sr, gt), frames)


OPTIONS = tuple(name for name in inspect.signature(Criterion.__init__).parameters if name != "self")
"""The loss's options that a configuration may set."""


def check_options(owner: str, given: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Refuses a keyword that ``owner`` does not know, and lists the allowed ones.

    Raises:
        TypeError: for an unknown keyword, as Python does.
    """
    allowed = tuple(allowed)
    if unknown := sorted(set(given) - set(allowed)):
        raise TypeError(
            f"{owner} got the unknown option{'s' * (len(unknown) > 1)} {', '.join(unknown)}; "
            f"allowed are {', '.join(allowed)}"
        )


def check_order(sr: Tensor, gt: Tensor, names: tuple[str, str] = ("sr", "gt")) -> None:
    """Refuses swapped arguments. No gradient reaches the loss's second argument, so they would
    silently train nothing.

    Raises:
        ValueError: the second image requires a gradient and the first does not.
    """
    if torch.is_grad_enabled() and gt.requires_grad and not sr.requires_grad:
        first, second = names
        raise ValueError(
            f"{second} requires a gradient and {first} does not: the super-resolved image comes "
            f"first ({first}), the ground truth second ({second})"
        )


def pair(
    sr: Tensor, gt: Tensor, names: tuple[str, str] = ("sr", "gt")
) -> tuple[Tensor, Tensor, int]:
    """Both images with four dimensions, and the number of frames per clip (1 for images).

    Raises:
        TypeError: one is not a tensor.
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
    """One value per image -> one per clip; a scalar is unchanged."""
    return value.view(-1, frames).mean(1) if value.dim() and frames > 1 else value
