"""Colour scales. Both are smooth in lightness, so that they also work in grey."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

Plane = npt.NDArray[np.float32]
Colours = npt.NDArray[np.float32]

HEAT = ("#05030f", "#3a0f6e", "#8c2369", "#d44842", "#f98e22", "#fde68a")
"""For non-negative values; zero is black."""
SIGNED = ("#0b3c8c", "#4f8fd6", "#b9d3ea", "#f4f2ee", "#f0c4a8", "#d96a48", "#8f1d1d")
"""For signed values: negative blue, positive red, zero pale."""


def _rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def scale(values: Plane, colours: tuple[str, ...]) -> Colours:
    """(H, W) in [0, 1] -> (H, W, 3) in [0, 1]."""
    anchors = np.array([_rgb(c) for c in colours], dtype=np.float32)
    place = np.clip(values, 0, 1) * (len(anchors) - 1)
    below = np.minimum(place.astype(np.int64), len(anchors) - 2)
    part = (place - below)[..., None].astype(np.float32)
    mixed: Colours = anchors[below] * (1 - part) + anchors[below + 1] * part
    return mixed


def quantile(values: Tensor, share: float) -> float:
    """The value below which a share of all values lies."""
    flat = values.detach().flatten().double()
    rank = max(1, min(len(flat), round(share * len(flat))))
    return float(flat.kthvalue(rank).values)


def upper(values: Tensor, share: float = 0.995) -> float:
    """The magnitude below which all but the largest half per cent lie, never 0, so that a few
    outliers do not darken everything else."""
    return quantile(values.abs(), share) or float(values.abs().max()) or 1.0


def to_plane(values: Tensor) -> Plane:
    plane: Plane = values.detach().cpu().numpy().astype(np.float32)
    return plane


def heat_over(picture: Tensor, values: Tensor) -> Colours:
    """A map of non-negative values, (H, W), in colours over the grey picture, (3, H, W), from dark
    for the lowest tenth of the values (0 if most are 0) to bright for the largest."""
    grey = to_plane(picture.mean(0))[..., None]
    positive = values[values > 0]
    low = quantile(positive, 0.1) if 2 * len(positive) > values.numel() else 0.0
    high = upper(values)
    share = np.clip((to_plane(values) - low) / max(high - low, 1e-30), 0, 1)
    strength = share[..., None] ** 0.5
    over: Colours = (1 - strength) * grey * 0.38 + strength * scale(share**0.75, HEAT)
    return over


def signed_over(picture: Tensor, values: Tensor) -> Colours:
    """The same for values of both signs."""
    grey = to_plane(picture.mean(0))[..., None]
    share = np.clip(to_plane(values) / upper(values), -1, 1)
    strength = np.abs(share)[..., None] ** 0.5
    colours = scale(share * 0.5 + 0.5, SIGNED)
    over: Colours = (1 - strength) * (0.55 + 0.4 * grey) + strength * colours
    return over


def signed(values: Tensor, limit: float) -> Colours:
    """(H, W) in colours, from -limit to limit."""
    return scale(to_plane(values) / (2 * limit) + 0.5, SIGNED)
