"""Pictures as arrays, and the luma used by every command."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
"""An RGB picture, ``(H, W, 3)``, 0 to 255."""
Plane = npt.NDArray[np.float64]
"""One number per pixel, ``(H, W)``."""


def luma(pixels: Pixels) -> Plane:
    """Y of BT.601 within 16 to 235: ``(H, W, 3)`` of 0 to 255 -> ``(H, W)``, not rounded."""
    weights = np.array([65.481, 128.553, 24.966]) / 255
    plane: Plane = 16 + pixels.astype(np.float64) @ weights
    return plane


def luminance(pixels: Pixels) -> Plane:
    """Y of BT.601 in full range, here 0 to 1: ``(H, W, 3)`` of 0 to 255 -> ``(H, W)``."""
    weights = np.array([0.299, 0.587, 0.114])
    plane: Plane = pixels.astype(np.float64) @ weights / 255
    return plane
