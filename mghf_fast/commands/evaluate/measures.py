"""The measures that ``mghf-fast evaluate`` reports: names, meanings and functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..pixels import Pixels
from . import niqe as natural
from . import stlpips
from .detail import detail
from .metrics import (
    SSIM_WINDOW,
    judge,
    psnr_rgb,
    psnr_y,
    psnr_y_full,
    ssim_rgb,
    ssim_y,
    without_border,
)


@dataclass(frozen=True)
class Measure:
    """A column of the table."""

    name: str
    """Its name in the JSON file and for ``--metrics``."""
    heading: tuple[str, str, str]
    """Two lines of heading, and which values are good."""
    digits: int
    least_side: int
    """Minimum side of a picture in pixels; smaller ones have no value."""
    text: str


# The spectrum of a smaller picture has too few frequencies in the band.
DETAIL_SIDE = 32
NIQE_WARNING = (
    "NIQE looks at one picture alone and can reward artefacts; read it beside the other measures "
    "and beside the ground truth's own value."
)
MEASURES = {
    m.name: m
    for m in (
        Measure(
            "psnr_y", ("PSNR", "Y", "higher"), 3, 1,
            "PSNR in the papers' convention: on the luma of BT.601 within 16 to 235, range 255, dB",
        ),
        Measure(
            "ssim_y", ("SSIM", "Y", "higher"), 4, SSIM_WINDOW,
            "SSIM of the same luma, Gaussian window of 11 pixels and sigma 1.5",
        ),
        Measure(
            "psnr_y_full", ("PSNR", "Y full", "higher"), 3, 1,
            "PSNR of the luminance in full range, dB",
        ),
        Measure(
            "psnr_rgb", ("PSNR", "RGB", "higher"), 3, 1, "PSNR over the three channels, dB"
        ),
        Measure(
            "ssim_rgb", ("SSIM", "RGB", "higher"), 4, SSIM_WINDOW, "mean SSIM of the channels"
        ),
        Measure(
            "stlpips_alex", ("ST-LPIPS", "AlexNet", "lower"), 4, stlpips.SMALLEST_SIDE,
            "shift-tolerant LPIPS with AlexNet",
        ),
        Measure(
            "stlpips_vgg", ("ST-LPIPS", "VGG-16", "lower"), 4, stlpips.SMALLEST_SIDE,
            "shift-tolerant LPIPS with VGG-16",
        ),
        Measure("niqe", ("NIQE", "SR", "lower"), 3, natural.BLOCK, "NIQE"),
        Measure(
            "niqe_hr", ("NIQE", "HR", "-"), 3, natural.BLOCK,
            "NIQE of the ground truth itself",
        ),
        Measure(
            "hf_error", ("HF", "error", "lower"), 2, DETAIL_SIDE,
            "spectral error above the low resolution's Nyquist frequency (HF), dB",
        ),
        Measure(
            "hf_energy", ("HF", "energy", "near 1"), 3, DETAIL_SIDE, "energy in HF, SR / HR"
        ),
        Measure(
            "hf_correlation", ("HF", "corr.", "higher"), 3, DETAIL_SIDE,
            "correlation of SR and HR in HF: 1 if all detail is right, 0 if it is noise",
        ),
        Measure(
            "sharpness", ("sharp-", "ness", "near 1"), 3, DETAIL_SIDE,
            "mean gradient magnitude, SR / HR",
        ),
    )
}  # fmt: skip
NEEDS = {
    "stlpips_alex": stlpips.unavailable_reason,
    "stlpips_vgg": stlpips.unavailable_reason,
    "niqe": natural.unavailable_reason,
    "niqe_hr": natural.unavailable_reason,
}
WITHOUT_TRUTH = ("niqe", "niqe_hr")
PLAIN: dict[str, Callable[[Pixels, Pixels], float]] = {
    "psnr_y": psnr_y,
    "ssim_y": ssim_y,
    "psnr_y_full": psnr_y_full,
    "psnr_rgb": psnr_rgb,
    "ssim_rgb": ssim_rgb,
}
DETAIL = ("hf_error", "hf_energy", "hf_correlation", "sharpness")


@dataclass(frozen=True)
class Selection:
    """The measures to compute, and why others are not available."""

    names: tuple[str, ...]
    missing: dict[str, str] = field(default_factory=dict)


def select(wanted: str | None) -> Selection:
    """The measures in a comma-separated list, in the table's order; None selects all available.

    Raises:
        ValueError: an unknown name, NIQE alone, or a measure whose package is not installed.
    """
    reasons = {name: reason for name, why in NEEDS.items() if (reason := why()) is not None}
    if wanted is None:
        return Selection(tuple(n for n in MEASURES if n not in reasons), reasons)
    asked = {name.strip() for name in wanted.split(",")}
    if unknown := sorted(asked - MEASURES.keys()):
        raise ValueError(
            f"--metrics: there is no {', '.join(map(repr, unknown))}; allowed are "
            f"{', '.join(MEASURES)}"
        )
    if asked <= set(WITHOUT_TRUTH):
        raise ValueError(
            "--metrics: NIQE is not reported alone, as it can reward artefacts; name a measure "
            "against the ground truth beside it, such as psnr_y or stlpips_alex"
        )
    if "niqe" in asked:
        asked.add("niqe_hr")
    for name in MEASURES:
        if name in asked and name in reasons:
            # Not ModuleNotFoundError: the reason already says which package to install, and how.
            raise ValueError(f"--metrics {name}: {reasons[name]}")
    return Selection(tuple(name for name in MEASURES if name in asked))


class Meter:
    """Measures pairs of pictures; loads the networks and models of the chosen measures once.

    Args:
        names: names in ``MEASURES``.
        border: pixels cut off on each side.
        scale: the super-resolution factor, which determines the high-frequency band.
    """

    def __init__(self, names: Sequence[str], border: int = 0, scale: float = 4) -> None:
        self.names, self.border, self.scale = tuple(names), border, scale
        self._functions = {name: PLAIN[name] for name in names if name in PLAIN}
        for net in stlpips.NETS:
            if (name := f"stlpips_{net}") in names and (distance := judge(net)) is not None:
                self._functions[name] = distance
        self._model = natural.load_model() if set(WITHOUT_TRUTH) & set(names) else None

    def __call__(self, sr: Pixels, hr: Pixels) -> dict[str, float | None]:
        """The measures of a pair, ``(H, W, 3)`` of uint8 each; None if a side is too small."""
        sr, hr = (without_border(picture, self.border) for picture in (sr, hr))
        least = min(hr.shape[:2])
        possible = [name for name in self.names if least >= MEASURES[name].least_side]
        found: dict[str, float | None] = dict.fromkeys(self.names)
        for name in possible:
            if name in self._functions:
                found[name] = self._functions[name](sr, hr)
        if "niqe" in possible:
            found["niqe"] = natural.niqe(sr, self._model)
        if "niqe_hr" in possible:
            found["niqe_hr"] = natural.niqe(hr, self._model)
        if in_band := [name for name in possible if name in DETAIL]:
            values = detail(sr, hr, self.scale)
            found.update({name: getattr(values, name) for name in in_band})
        return found
