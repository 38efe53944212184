"""Measures a super-resolved photograph against its ground truth with the functions of ``mghf-fast
evaluate``, excluding a border of 4 pixels."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import numpy as np

from ..evaluate.detail import RADIAL_BINS, detail, gradient_magnitude, radial_power
from ..evaluate.metrics import Judge, check_pair, judge, psnr_y, ssim_y, without_border
from ..pixels import Pixels
from .settings import SCALE

__all__ = [
    "BAND", "RADIAL_BINS", "Judge", "Quality", "gradient_magnitude", "judge", "measure",
    "radial_power",
]  # fmt: skip

BAND = 0.5 / SCALE
"""Lower edge of the high-frequency band, cycles per pixel."""


@dataclass(frozen=True)
class Quality:
    """One picture's measures, or the mean of several pictures'."""

    psnr: float
    """In the papers' convention (luma in 16 to 235), dB; higher is better."""
    ssim: float
    """In the papers' convention; 1 is best."""
    stlpips: float | None
    """Shift-tolerant LPIPS, AlexNet, lower is better; None if its package is missing."""
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
        """The mean of each measure; None for a measure that any picture lacks."""

        def of(values: list[float | None]) -> float | None:
            present = [v for v in values if v is not None]
            return float(np.mean(present)) if len(present) == len(values) else None

        means = {f.name: of([getattr(q, f.name) for q in qualities]) for f in fields(Quality)}
        return Quality(**means)  # type: ignore[arg-type]  # only stlpips can be None


def measure(sr: Pixels, gt: Pixels, judge: Judge | None = None) -> Quality:
    """Measures ``sr`` against ``gt``, both ``(H, W, 3)`` with 8 bits and of one size.

    Args:
        judge: result of :func:`judge`; without it ``stlpips`` is None.
    """
    check_pair(sr, gt)
    s, g = (without_border(p, SCALE) for p in (sr, gt))
    return Quality(
        psnr=psnr_y(s, g),
        ssim=ssim_y(s, g),
        stlpips=None if judge is None else judge(s, g),
        **asdict(detail(s, g, SCALE)),
    )
