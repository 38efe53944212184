"""How a super-resolved photograph is measured against its ground truth.

Everything is measured on the luminance Y (BT.601, full range) of 8-bit pictures without a border
of 4 pixels. "High frequency" is the band above 0.125 cycles a pixel: what a picture four times
smaller cannot carry, so all of it in a super-resolved picture comes from the method.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from skimage.metrics import structural_similarity

from .photographs import Pixels
from .settings import SCALE

Plane = npt.NDArray[np.float64]

BAND = 0.5 / SCALE
"""Lower edge of the high-frequency band, cycles a pixel."""
RADIAL_BINS = 48
# Power spectral density of rounding to 8 bits: below it a spectrum says nothing about a picture.
QUANTISATION_POWER = 1 / 255**2 / 12


@dataclass(frozen=True)
class Quality:
    """One picture's measures, or the mean of several pictures'."""

    psnr: float
    """dB, higher is better."""
    ssim: float
    """1 is best."""
    hf_error: float
    """Mean over the band's rings of abs(10 log10(power of SR / power of GT)), dB; 0 is best."""
    hf_energy: float
    """Energy in the band, SR / GT; 1 is ideal."""
    hf_correlation: float
    """Correlation of SR and GT within the band: 1 if all detail is right, 0 if it is noise."""
    sharpness: float
    """Mean gradient magnitude, SR / GT; 1 is ideal."""

    @staticmethod
    def mean(qualities: list[Quality]) -> Quality:
        rows = [asdict(q) for q in qualities]
        return Quality(**{k: float(np.mean([row[k] for row in rows])) for k in rows[0]})


def luminance(pixels: Pixels) -> Plane:
    """Y of an RGB picture, 0 to 1: ``(H, W, 3)`` -> ``(H, W)``."""
    weights = np.array([0.299, 0.587, 0.114])
    plane: Plane = pixels.astype(np.float64) @ weights / 255
    return plane


def _spectrum(plane: Plane) -> npt.NDArray[np.complex128]:
    # The window keeps the jump between opposite borders from leaking over the whole spectrum.
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
        The rings' centres (cycles a pixel, 0 to 0.5) and the mean power in each, both
        ``(RADIAL_BINS,)``. A white picture of variance v has the power v in every ring.
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


def measure(sr: Pixels, gt: Pixels) -> Quality:
    """Measures ``sr`` against ``gt``, both ``(H, W, 3)`` with 8 bits and of one size."""
    if sr.shape != gt.shape:
        raise ValueError(f"sr is {sr.shape} and gt is {gt.shape}; they must be of one size")
    inner = slice(SCALE, -SCALE)
    s, g = (luminance(p[inner, inner]) for p in (sr, gt))
    mse = float(np.mean((s - g) ** 2))
    # 100 dB stands for equality; rounding to 8 bits alone costs 59 dB.
    psnr = -10 * math.log10(max(mse, 1e-10))

    frequency, power_s = radial_power(s)
    _, power_g = radial_power(g)
    high = frequency >= BAND
    ratio = (power_s[high] + QUANTISATION_POWER) / (power_g[high] + QUANTISATION_POWER)

    in_band = _frequency(g) >= BAND
    band_s, band_g = _spectrum(s)[in_band], _spectrum(g)[in_band]
    # One grey level of white noise, so that flat pictures give finite ratios.
    floor = QUANTISATION_POWER * band_g.size
    energy_s, energy_g = (float(np.sum(np.abs(b) ** 2)) + floor for b in (band_s, band_g))
    shared = float(np.sum((band_s * band_g.conj()).real)) + floor
    return Quality(
        psnr=psnr,
        ssim=float(structural_similarity(g, s, data_range=1.0)),
        hf_error=float(np.mean(np.abs(10 * np.log10(ratio)))),
        hf_energy=energy_s / energy_g,
        hf_correlation=shared / math.sqrt(energy_s * energy_g),
        sharpness=gradient_magnitude(s) / max(gradient_magnitude(g), 1 / 255**2),
    )
