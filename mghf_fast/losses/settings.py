"""Parses a loss's options as users and configuration files write them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import _checks as check
from .. import weights
from ..nn import DetailFeatureExtractor
from ..nn.initial import reproducibly
from .frozen import frozen_copy

RANGES = {"0,1": (0.0, 1.0), "-1,1": (-1.0, 1.0)}
"""The named ranges of images, and their bounds."""


@dataclass(frozen=True)
class Preset:
    """The weights of MGHF-c: ``gammas`` for the naive, content-style and local terms (Gamma1 to
    Gamma3), ``betas`` within content-style, ``alpha`` and ``gamma`` for the entropy weights; and
    the patches' ``stride`` in pixels."""

    gammas: tuple[float, float, float]
    betas: tuple[float, float, float]
    alpha: float
    gamma: float
    stride: int

    def factors(self) -> dict[str, float]:
        """Each term's factor in the total, by the names of :meth:`MGHFLoss.terms`."""
        return factors(self.gammas, self.betas)


def factors(
    gammas: tuple[float, float, float], betas: tuple[float, float, float]
) -> dict[str, float]:
    """Each term's factor in MGHF-c, by name."""
    (gamma1, gamma2, gamma3), (beta1, beta2, beta3) = gammas, betas
    return {
        "naive": gamma1,
        "csc_mse": gamma2 * beta1,
        "csc_correlation": gamma2 * beta2,
        "csc_gram": gamma2 * beta3,
        "lip": gamma3,
    }


PRESETS = {
    "balanced": Preset((0.28, 1, 8e-3), (2.6e-2, 4e-2, 0.2), 1.1, 2**0.5, 24),
    "2026": Preset((2, 2, 8e-2), (6e-3, 1e-1, 5e-4), 1.1, 2**0.5, 24),
    "2025": Preset((2, 1.5, 1e-3), (0.1333, 1, 0.1333), 1.1, 2**0.5, 16),
}
"""The published weights, by the year of the paper; and ``"balanced"``, for the features of
``perceptual-v1``: the naive term contributes three fifths of the gradients' lengths and the others
3 to 24 per cent each, for crops from 64 to 256 pixels (``docs/features.md``)."""


RANDOM = "random"
DEFAULT_EXTRACTOR = "perceptual-v1"
"""The default extractor of a loss: ``RANDOM``, or a name of :mod:`mghf_fast.weights`."""
DEFAULT_PRESET = "balanced"


def random_extractor() -> DetailFeatureExtractor:
    """An untrained extractor with the curved start (:mod:`mghf_fast.nn.start`), the same in every
    process."""
    with reproducibly(seed=0):
        extractor = DetailFeatureExtractor()
    return extractor.to(torch.get_default_device(), torch.get_default_dtype())


def default_extractor() -> DetailFeatureExtractor:
    """The default extractor of a loss."""
    return named_extractor(DEFAULT_EXTRACTOR)


def named_extractor(name: str) -> DetailFeatureExtractor:
    """The extractor ``"random"``, or one of the shipped weights, by name."""
    check.check_choice("extractor", name, (RANDOM, *weights.SHA256))
    return random_extractor() if name == RANDOM else DetailFeatureExtractor.from_pretrained(name)


def read_extractor(value: Any) -> tuple[nn.Module, str]:
    """The extractor for a loss to keep, in evaluation mode, and its name for display. ``value`` is
    a module, which is copied, a name, a path to a safetensors file, or None.

    Raises:
        FileNotFoundError, ValueError: no such file; neither a name nor a safetensors file.
        TypeError: ``value`` has another type.
    """
    if value is None:
        value = DEFAULT_EXTRACTOR
    if isinstance(value, str) and not value.endswith(".safetensors"):
        names = ", ".join(repr(name) for name in (RANDOM, *weights.SHA256))
        if value not in (RANDOM, *weights.SHA256):
            raise ValueError(
                f"extractor must be one of {names} or a path that ends in .safetensors, got "
                f"{value!r}"
            )
        return named_extractor(value).eval(), repr(value)
    if isinstance(value, (str, os.PathLike)):
        path = Path(value)
        return DetailFeatureExtractor.from_pretrained(path).eval(), repr(str(path))
    if isinstance(value, nn.Module):
        return frozen_copy(value), type(value).__name__
    raise TypeError(
        f"extractor must be a torch.nn.Module, a name, a path to a safetensors file or None, got "
        f"{type(value).__name__}"
    )


def read_preset(value: Any) -> tuple[Preset, str]:
    """A preset, and its name for display, from its name, its year as an integer, or a `Preset`."""
    if isinstance(value, Preset):
        gammas = check.check_numbers("preset.gammas", value.gammas, 3)
        betas = check.check_numbers("preset.betas", value.betas, 3)
        own = Preset(
            (gammas[0], gammas[1], gammas[2]),
            (betas[0], betas[1], betas[2]),
            check.check_number("preset.alpha", value.alpha),
            check.check_number("preset.gamma", value.gamma),
            check.check_integer("preset.stride", value.stride, 1),
        )
        return own, "own"
    name = value
    if not isinstance(value, (str, bool)):
        try:
            name = str(check.check_integer("preset", value, 0))
        except (TypeError, ValueError):
            name = value
    if not isinstance(name, str) or name not in PRESETS:
        check.check_choice("preset", value, tuple(PRESETS))
    return PRESETS[name], name


def read_range(value: Any) -> str | None:
    """``"0,1"``, ``"-1,1"`` or None, from None, a string with or without spaces and brackets, or
    two numbers."""
    if value is None:
        return None
    bounds: tuple[float, ...] = ()
    try:
        if isinstance(value, str):
            bounds = tuple(float(part) for part in value.strip(" []()").split(","))
        elif isinstance(value, Iterable):
            bounds = tuple(float(part) for part in value)
    except (TypeError, ValueError):
        bounds = ()
    for name, named in RANGES.items():
        if bounds == named:
            return name
    raise ValueError(
        f"input_range must be one of None, '0,1', '-1,1' (or such a pair of numbers), got {value!r}"
    )


def downscale_of(extractor: nn.Module) -> int:
    """Image pixels per pixel of the extractor's features: its attribute ``downscale``, by default 1
    (a layer of that name is ignored).

    Raises:
        TypeError, ValueError: the attribute is a number but not an integer of 1 or more.
    """
    downscale = getattr(extractor, "downscale", 1)
    if isinstance(downscale, (nn.Module, torch.Tensor)) or not hasattr(downscale, "__int__"):
        return 1
    return check.check_integer("extractor.downscale", downscale, 1)
