"""How much high frequency a super-resolved picture has, and how much of it is right.

"High frequency" is the band above the Nyquist frequency of the low-resolution picture, 0.5 / scale
cycles per pixel: that picture cannot represent it, so all of it comes from the method. Everything
is measured on the luminance Y (BT.601, full range).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..pixels import Pixels, Plane, luminance
from .metrics import check_pair

SCALE = 4
RADIAL_BINS = 48
# Power spectral density of rounding to 8 bits; below it a spectrum carries no information.
QUANTISATION_POWER = 1 / 255**2 / 12


@dataclass(frozen=True)
class Detail:
    """The measures of one picture against its ground truth."""

    hf_error: float
    """Mean over the band's rings of abs(10 log10(power of SR / power of GT)), dB; 0 is best."""
    hf_energy: float
    """Energy in the band, SR / GT; 1 is ideal."""
    hf_correlation: float
    """Correlation of SR and GT within the band: 1 if all detail is right, 0 if it is noise."""
    sharpness: float
    """Mean gradient magnitude, SR / GT; 1 is ideal."""


def _spectrum(plane: Plane) -> npt.NDArray[np.complex128]:
    # The window keeps the jump between opposite borders from leaking into the whole spectrum.
    window = np.outer(np.hanning(plane.shape[0]), np.hanning(plane.shape[1]))
    window /= np.sqrt(np.sum(window**2))
    return np.fft.fft2((plane - plane.mean()) * window)


def _frequency(plane: Plane) -> Plane:
    radius: Plane = np.hypot(
        np.fft.fftfreq(plane.shape[0])[:, None], np.fft.fftfreq(plane.shape[1])[None, :]
    )
    return radius


def radial_power(plane: Plane) -> tuple[Plane, Plane]:
    """Power spectral density over rings of equal frequency.

    Returns:
        The rings' centres (cycles per pixel, 0 to 0.5) and the mean power in each, both
        ``(RADIAL_BINS,)``. White noise of variance v has power v in every ring.
    """
    edges = np.linspace(0, 0.5, RADIAL_BINS + 1)
    ring = np.digitize(_frequency(plane).ravel(), edges) - 1
    inside = ring < RADIAL_BINS
    power = np.abs(_spectrum(plane).ravel()[inside]) ** 2
    count = np.bincount(ring[inside], minlength=RADIAL_BINS)
    total = np.bincount(ring[inside], weights=power, minlength=RADIAL_BINS)
    return (edges[1:] + edges[:-1]) / 2, total / np.maximum(count, 1)


def gradient_magnitude(plane: Plane) -> float:
    """Mean length of the central-difference gradient."""
    dy, dx = np.gradient(plane)
    return float(np.hypot(dy, dx).mean())


def detail(sr: Pixels, gt: Pixels, scale: float = SCALE) -> Detail:
    """Measures ``sr`` against ``gt``, both ``(H, W, 3)`` of uint8 and of one size.

    Args:
        scale: the super-resolution factor, above 1; it determines where the band begins.

    Raises:
        ValueError: shapes, dtypes or ``scale`` are not allowed.
    """
    check_pair(sr, gt)
    if not scale > 1:
        raise ValueError(f"scale is {scale}; it must be above 1")
    band = 0.5 / scale
    s, g = luminance(sr), luminance(gt)
    frequency, power_s = radial_power(s)
    _, power_g = radial_power(g)
    high = frequency >= band
    ratio = (power_s[high] + QUANTISATION_POWER) / (power_g[high] + QUANTISATION_POWER)

    in_band = _frequency(g) >= band
    band_s, band_g = _spectrum(s)[in_band], _spectrum(g)[in_band]
    # The rounding's noise, so that flat pictures give finite ratios.
    floor = QUANTISATION_POWER * band_g.size
    energy_s, energy_g = (float(np.sum(np.abs(b) ** 2)) + floor for b in (band_s, band_g))
    shared = float(np.sum((band_s * band_g.conj()).real)) + floor
    return Detail(
        hf_error=float(np.mean(np.abs(10 * np.log10(ratio)))),
        hf_energy=energy_s / energy_g,
        hf_correlation=shared / math.sqrt(energy_s * energy_g),
        sharpness=gradient_magnitude(s) / max(gradient_magnitude(g), 1 / 255**2),
    )
