"""Two statistics that photographs have in common, measured on procedural pictures and photographs.

* The power spectrum falls as 1 / f^2 or slightly faster (Field 1987; Ruderman 1994).
* Differences of neighbouring pixels are far from normal: most are tiny, a few are large.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..pixels import Pixels, Plane, luminance
from . import procedural

CROP = 128
"""Side of the crops that are measured, pixels."""

PHOTOGRAPHS = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/retina.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)
"""Inside the installed scikit-image and scikit-learn: package, file."""


def spectrum_slope(grey: Plane) -> float:
    """The exponent of the power spectrum: the slope of log power over log frequency, from 4 periods
    per picture up to 0.35 cycles per pixel, in rings of equal width in log frequency.

    Args:
        grey: (S, S), S 32 or more.
    """
    size = grey.shape[0]
    window = np.hanning(size + 2)[1:-1]
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window[:, None] * window[None, :])) ** 2
    frequency = np.fft.fftfreq(size)
    radius = np.hypot(frequency[:, None], frequency[None, :])
    edges = np.geomspace(4 / size, 0.35, 11)
    rings = [(radius >= low) & (radius < high) for low, high in pairwise(edges)]
    rings = [ring for ring in rings if ring.any()]
    levels = np.log([power[ring].mean() + 1e-12 for ring in rings])
    places = np.log([np.exp(np.log(radius[ring]).mean()) for ring in rings])
    return float(np.polyfit(places, levels, 1)[0])


def gradient_kurtosis(grey: Plane) -> float:
    """E[d^4] / E[d^2]^2 of the differences d of horizontal and vertical neighbours; 3 for a normal
    distribution."""
    differences = np.concatenate([np.diff(grey, axis=axis).ravel() for axis in (0, 1)])
    square = differences**2
    return float((square**2).mean() / max(float(square.mean()) ** 2, 1e-24))


@dataclass(frozen=True)
class Statistics:
    """Medians and quartiles of the statistics over a set of crops."""

    crops: int
    slope: tuple[float, float, float]
    """Exponent of the power spectrum: first quartile, median, third quartile."""
    kurtosis: tuple[float, float, float]
    """Kurtosis of the gradient: first quartile, median, third quartile."""


def measure(crops: Iterable[Pixels]) -> Statistics:
    """Both statistics of crops, (S, S, 3) of 8 bits each; flat ones have none and are skipped."""
    greys = [luminance(crop) for crop in crops]
    greys = [grey for grey in greys if grey.std() > 0.01]

    def quartiles(values: list[float]) -> tuple[float, float, float]:
        low, middle, high = np.percentile(values, [25, 50, 75])
        return float(low), float(middle), float(high)

    return Statistics(
        len(greys),
        quartiles([spectrum_slope(grey) for grey in greys]),
        quartiles([gradient_kurtosis(grey) for grey in greys]),
    )


def photograph_crops(side: int = CROP) -> dict[str, list[Pixels]]:
    """Crops that tile each of ``PHOTOGRAPHS``, by the photograph's name; never downloads.

    Raises:
        ModuleNotFoundError: scikit-image, scikit-learn or Pillow is not installed.
    """
    from PIL import Image

    crops = {}
    for package, file in PHOTOGRAPHS:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        with Image.open(Path(spec.origin).parent / file) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.uint8)
        height, width = (length // side for length in pixels.shape[:2])
        crops[Path(file).stem] = [
            pixels[y * side : (y + 1) * side, x * side : (x + 1) * side]
            for y in range(height)
            for x in range(width)
        ]
    return crops


def _rows(pictures: int) -> Iterator[tuple[str, Statistics]]:
    photographs = photograph_crops()
    for name, crops in photographs.items():
        yield name, measure(crops)
    yield "all photographs", measure(crop for crops in photographs.values() for crop in crops)
    drawn = [procedural.render(0, i, CROP) for i in range(pictures)]
    for law in procedural.LAWS:
        some = [p for p, label in drawn if procedural.CLASSES[label].law == law]
        yield f"procedural, {law}", measure(some)
    yield "procedural", measure(pixels for pixels, _ in drawn)


def table(pictures: int = 300) -> str:
    """Both statistics of every photograph and of ``pictures`` procedural pictures, as Markdown."""
    lines = ["| crops | number | spectrum's exponent | gradient's kurtosis |", "|---|---|---|---|"]
    for name, found in _rows(pictures):
        slope, kurtosis = (
            f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
            for (low, middle, high), digits in ((found.slope, 2), (found.kurtosis, 1))
        )
        lines.append(f"| {name} | {found.crops} | {slope} | {kurtosis} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
