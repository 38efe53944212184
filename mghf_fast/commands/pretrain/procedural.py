"""An endless stream of labelled pictures that needs no files: textured dead leaves.

A picture is a pile of leaves whose radii have the density 1 / r^3 (Lee, Mumford and Huang 2001: the
pile then looks the same at every scale, as photographs do), coloured from a natural palette, each
leaf with a texture. Four parameters of the generator are the label; everything else - radii,
positions, colours, contrast, light, noise - is random. To distinguish the labels a network must
recognise what a perceptual loss must: the sharpness of edges, the scale and direction of textures.

Picture ``i`` of seed ``s`` depends only on ``(s, i)``, so that a stream can be split over processes
and continued anywhere. NumPy's generators give the same numbers on every platform; differences in
the rounding of its Fourier transforms and elementary functions are far below one of 255 levels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..pixels import Pixels

Plane = npt.NDArray[np.float32]

VERSION = 2
"""Incremented with every change after which the same seed gives other pictures."""

LAWS = ("discs", "slabs", "petals")
"""The shape law of the leaves: discs, oblong rectangles, ellipses with soft edges."""

PERIODS = {"fine": (2.5, 3.6), "middle": (4.0, 5.6), "coarse": (6.4, 9.0)}
"""The frequency bands, as periods in pixels."""

ORIENTATIONS = (0, 45, 90, 135)
"""Directions in degrees in which an oriented texture varies; a picture deviates by at most 8."""

ORIENTED = ("grating", "streaks")
ISOTROPIC = ("speckle", "dots", "cascade", "cloud")
"""Texture families: band-passed noise, spots, a multiplicative cascade (a random fractal), and
noise with a power-law spectrum, whose exponent takes the place of the band."""

CLOUD_EXPONENTS = {"fine": (0.5, 0.75), "middle": (1.1, 1.35), "coarse": (1.8, 2.1)}
"""Exponents a of the amplitude spectrum 1 / f^a of the family ``cloud``."""

LENS = (0.3, 1.0)
"""Range of the standard deviation of the lens's blur, pixels."""

NOISE = (0.0, 10.0)
"""Range of the standard deviation of the sensor's noise, on a scale of 0 to 255."""

_LAYERS = 5.0
"""Mean number of leaves over a point; e^-5 of the picture shows the ground."""

_PALETTE = np.array(
    [
        (0.55, 0.68, 0.85),  # sky
        (0.27, 0.38, 0.17),  # foliage
        (0.47, 0.52, 0.24),  # meadow
        (0.36, 0.27, 0.19),  # bark
        (0.74, 0.64, 0.49),  # sand
        (0.50, 0.50, 0.48),  # stone
        (0.90, 0.91, 0.92),  # snow
        (0.08, 0.08, 0.09),  # shadow
        (0.20, 0.33, 0.40),  # water
        (0.66, 0.24, 0.20),  # brick
        (0.80, 0.70, 0.34),  # straw
        (0.78, 0.58, 0.48),  # skin
    ],
    dtype=np.float32,
)


class TextureClass(NamedTuple):
    """A label: the parameters of the generator that define it."""

    law: str
    family: str
    band: str
    orientation: int | None

    @property
    def name(self) -> str:
        """The label's name, such as ``"discs-grating-fine-45"``."""
        words = [self.law, self.family, self.band]
        return "-".join(words if self.orientation is None else [*words, str(self.orientation)])


def _textures() -> list[tuple[str, str, int | None]]:
    oriented = [(f, b, o) for f in ORIENTED for b in ("fine", "coarse") for o in ORIENTATIONS]
    return [*oriented, *((family, band, None) for family in ISOTROPIC for band in PERIODS)]


CLASSES = tuple(TextureClass(law, *texture) for law in LAWS for texture in _textures())
"""The 84 labels, in the order of their indices."""


# ------------------------------------------------------------------------------------------- leaves


class _Leaves(NamedTuple):
    """Leaves of one octave of radii.

    ``geometry`` is (6, leaves): y and x of the middle, half the length, half the width, cosine and
    sine of the turn. ``order`` is a leaf's place in the pile, 0 on top.
    """

    geometry: Plane
    order: npt.NDArray[np.int64]

    def taken(self, index: npt.NDArray[np.int64]) -> _Leaves:
        """These leaves in that order."""
        return _Leaves(self.geometry[:, index], self.order[index])

    def cover(self, y: Plane, x: Plane, rectangle: bool) -> npt.NDArray[np.bool_]:
        """Whether each leaf covers the points; ``y`` and ``x`` broadcast against (leaves, 1, 1)."""
        centre_y, centre_x, half_length, half_width, cosine, sine = self.geometry[..., None, None]
        dy, dx = y - centre_y, x - centre_x
        along = (dx * cosine + dy * sine) / half_length
        across = (dy * cosine - dx * sine) / half_width
        if rectangle:
            covered: npt.NDArray[np.bool_] = np.maximum(np.abs(along), np.abs(across)) <= 1
        else:
            covered = along * along + across * across <= 1
        return covered


def _draw_leaves(
    rng: np.random.Generator, size: int, law: str, smallest: float
) -> tuple[list[tuple[float, _Leaves]], int]:
    """The leaves of a picture by octaves of their radii, each with its reach; and their number."""
    largest = float(size)
    # A rectangle with half sides r s and r / s has 4 / pi of the area of the ellipse.
    area = 4.0 if law == "slabs" else math.pi
    density = _LAYERS / (area * math.log(largest / smallest))
    octaves, low, total = [], smallest, 0
    while low < largest:
        high = min(2 * low, largest)
        reach = high * (1.0 if law == "discs" else 2.0)
        side = size + 2 * reach
        number = int(rng.poisson(density / 2 * (low**-2 - high**-2) * side * side))
        u = rng.random((4, number))
        radius = (low**-2 - u[0] * (low**-2 - high**-2)) ** -0.5
        place = u[1:3] * side - reach
        turn = u[3] * math.pi
        stretch = np.ones(number) if law == "discs" else rng.uniform(1.0, 1.7, number)
        octaves.append((reach, radius * stretch, radius / stretch, place, turn))
        total += number
        low = high
    pile = rng.permutation(total)
    leaves, start = [], 0
    for reach, half_length, half_width, (y, x), turn in octaves:
        order = pile[start : start + len(turn)]
        start += len(turn)
        front_first = np.argsort(order)
        geometry = np.stack([y, x, half_length, half_width, np.cos(turn), np.sin(turn)])
        leaves.append((reach, _Leaves(geometry.astype(np.float32), order).taken(front_first)))
    return leaves, total


def _front_leaf(
    leaves: list[tuple[float, _Leaves]], total: int, size: int, rectangle: bool
) -> npt.NDArray[np.int64]:
    """The visible leaf at each pixel, by its place in the pile; ``total`` is the ground."""
    shown = np.full(size * size, total, dtype=np.int64)
    axis = np.arange(size, dtype=np.float32)
    for reach, octave in leaves:
        if not len(octave.order):
            continue
        here = np.full(size * size, total, dtype=np.int64)
        window = 2 * math.ceil(reach) + 1
        if window >= size:
            covered = octave.cover(axis[:, None], axis[None, :], rectangle).reshape(-1, size * size)
            any_leaf = covered.any(0)
            here[any_leaf] = octave.order[covered.argmax(0)[any_leaf]]
        else:
            # Small leaves are painted one by one in windows, the front one last.
            octave = octave.taken(np.arange(len(octave.order))[::-1])
            offsets = np.arange(window)
            rows = np.floor(octave.geometry[0] - reach).astype(np.int64)[:, None] + offsets
            columns = np.floor(octave.geometry[1] - reach).astype(np.int64)[:, None] + offsets
            covered = octave.cover(
                rows[:, :, None].astype(np.float32),
                columns[:, None, :].astype(np.float32),
                rectangle,
            )
            inside = ((rows >= 0) & (rows < size))[:, :, None]
            covered &= inside & ((columns >= 0) & (columns < size))[:, None, :]
            leaf, row, column = np.nonzero(covered)
            here[rows[leaf, row] * size + columns[leaf, column]] = octave.order[leaf]
        np.minimum(shown, here, out=shown)
    return shown


# ----------------------------------------------------------------------------------------- textures


@lru_cache(maxsize=8)
def _frequencies(size: int) -> tuple[Plane, Plane, Plane]:
    """Vertical, horizontal and radial frequencies of a real Fourier transform, cycles per pixel."""
    fy = np.fft.fftfreq(size).astype(np.float32)[:, None]
    fx = np.fft.rfftfreq(size).astype(np.float32)[None, :]
    return fy, fx, np.hypot(fy, fx)


def _filtered(rng: np.random.Generator, size: int, response: Plane) -> Plane:
    """White noise filtered by a frequency response."""
    noise = rng.standard_normal((size, size), dtype=np.float32)
    return np.fft.irfft2(np.fft.rfft2(noise) * response, (size, size)).astype(np.float32)


def _grating(rng: np.random.Generator, size: int, period: float, angle: float) -> Plane:
    axis = np.arange(size, dtype=np.float32)
    ramp = axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)
    wave = np.sin(2 * math.pi * (ramp / period + rng.random()))
    hardness = rng.uniform(0.1, 3.0)  # from a sine to bars
    return np.tanh(hardness * wave).astype(np.float32)


def _streaks(rng: np.random.Generator, size: int, period: float, angle: float) -> Plane:
    fy, fx, radius = _frequencies(size)
    along = fx * math.cos(angle) + fy * math.sin(angle)
    across = fy * math.cos(angle) - fx * math.sin(angle)
    turned = np.arctan2(across, np.abs(along) + 1e-6)
    band = np.log(np.maximum(radius, 1e-3) * period) / 0.25
    response: Plane = np.exp(-0.5 * (band**2 + (turned / 0.2) ** 2))
    return _filtered(rng, size, response)


def _speckle(rng: np.random.Generator, size: int, period: float) -> Plane:
    _, _, radius = _frequencies(size)
    band = np.log(np.maximum(radius, 1e-3) * period) / 0.2
    response: Plane = np.exp(-0.5 * band**2)
    return _filtered(rng, size, response)


def _dots(rng: np.random.Generator, size: int, period: float) -> Plane:
    """Bright spots, one in each square of a jittered grid."""
    cells = int(size / period) + 2
    place = (np.arange(cells) - rng.random()) * period
    jitter = rng.uniform(-0.25, 0.25, (2, cells, cells)) * period
    rows = np.rint(place[:, None] + jitter[0]).astype(np.int64)
    columns = np.rint(place[None, :] + jitter[1]).astype(np.int64)
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    impulses = np.zeros((size, size), dtype=np.float32)
    impulses[rows[inside], columns[inside]] = 1
    _, _, radius = _frequencies(size)
    spot = np.exp(-2 * (math.pi * 0.17 * period * radius) ** 2)
    spots = np.fft.irfft2(np.fft.rfft2(impulses) * spot, (size, size))
    return np.minimum(spots * (period / 3) ** 2, 1).astype(np.float32)


def _cascade(rng: np.random.Generator, size: int, period: float) -> Plane:
    """Products of random factors on squares of doubling size, from half a period up."""
    total = np.zeros((size, size), dtype=np.float32)
    axis = np.arange(size)
    block = period / 2
    while block < size:
        cells = int(size / block) + 2
        index = ((axis + rng.random() * block) / block).astype(np.int64)
        column = ((axis + rng.random() * block) / block).astype(np.int64)
        factors = rng.standard_normal((cells, cells), dtype=np.float32)
        total += factors[index[:, None], column[None, :]]
        block *= 2
    return np.tanh(np.exp(0.5 * total) / 2).astype(np.float32)


def _cloud(rng: np.random.Generator, size: int, exponent: float) -> Plane:
    _, _, radius = _frequencies(size)
    return _filtered(rng, size, np.maximum(radius, 1 / size) ** np.float32(-exponent))


def _texture(rng: np.random.Generator, size: int, kind: TextureClass) -> Plane:
    """A texture of the class with mean 0 and variance 1, ``(size, size)``."""
    if kind.family == "cloud":
        field = _cloud(rng, size, rng.uniform(*CLOUD_EXPONENTS[kind.band]))
    else:
        low, high = PERIODS[kind.band]
        period = low * (high / low) ** rng.random()
        if kind.orientation is not None:
            angle = math.radians(kind.orientation + rng.uniform(-8.0, 8.0))
            draw = _grating if kind.family == "grating" else _streaks
            field = draw(rng, size, period, angle)
        else:
            field = {"speckle": _speckle, "dots": _dots, "cascade": _cascade}[kind.family](
                rng, size, period
            )
    field = field - field.mean()
    return (field / (field.std() + 1e-6)).astype(np.float32)


# ----------------------------------------------------------------------------------------- pictures


def _blur(image: Plane, sigma: float) -> Plane:
    """Gaussian blur over the first two axes; the border is repeated."""
    reach = max(1, math.ceil(2.5 * sigma))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (0, 1):
        pad = [(0, 0)] * image.ndim
        pad[axis] = (reach, reach)
        padded = np.pad(image, pad, mode="edge")
        length = image.shape[axis]
        parts = (
            tap * np.take(padded, range(k, k + length), axis=axis) for k, tap in enumerate(taps)
        )
        image = sum(parts, start=np.zeros_like(image))
    return image


def _colours(rng: np.random.Generator, number: int) -> Plane:
    """Colours of leaves, ``(number, 3)``: near a few of the palette, of varying lightness."""
    few = _PALETTE[rng.permutation(len(_PALETTE))[: int(rng.integers(2, 6))]]
    share = rng.dirichlet(np.full(len(few), 1.5))
    chosen = few[rng.choice(len(few), number, p=share)]
    lightness = np.exp(rng.normal(0.0, 0.35, (number, 1)))
    colours: Plane = (chosen * lightness + rng.normal(0.0, 0.03, (number, 3))).astype(np.float32)
    return colours


def render(seed: int, index: int, size: int = 64) -> tuple[Pixels, int]:
    """Picture ``index`` of the stream ``seed``.

    Args:
        seed: seed of the stream, 0 or more. Streams with different seeds share no picture.
        index: 0 or more, without a limit.
        size: side in pixels, 16 or more. Another size gives another picture.

    Returns:
        (size, size, 3) of 8 bits, and the label, an index of ``CLASSES``.

    Raises:
        ValueError: an argument is below its minimum.
    """
    for name, value, least in (("seed", seed, 0), ("index", index, 0), ("size", size, 16)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    rng = np.random.default_rng([VERSION, seed, index, size])
    label = int(rng.integers(len(CLASSES)))
    kind = CLASSES[label]

    smallest = 2.0 * 2.0 ** (2 * rng.random())
    leaves, total = _draw_leaves(rng, size, kind.law, smallest)
    shown = _front_leaf(leaves, total, size, kind.law == "slabs")

    colours = _colours(rng, total + 1)
    base = colours[shown].reshape(size, size, 3)
    base = _blur(base, rng.uniform(1.5, 2.2) if kind.law == "petals" else rng.uniform(0.35, 0.55))

    # Two textures of the class; each leaf has one of them, with a random contrast and sign.
    textures = np.stack([_texture(rng, size, kind).ravel() for _ in range(2)])
    strength = 0.05 * 3.5 ** rng.random() * np.exp(rng.normal(0.0, 0.4, total + 1))
    strength *= rng.choice((-1.0, 1.0), total + 1)
    carried = rng.integers(2, size=total + 1)
    tint = (1 + rng.normal(0.0, 0.15, (total + 1, 3))).astype(np.float32)
    texture = textures[carried[shown], np.arange(size * size)] * strength[shown].astype(np.float32)
    picture = base + (texture[:, None] * tint[shown]).reshape(size, size, 3)

    # The lens; light that falls off across the picture, exposure, white balance; the sensor's
    # noise. Without lens and noise the finest detail alone identified most classes, and the
    # features responded to little else.
    picture = _blur(picture, rng.uniform(*LENS))
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    slope = rng.normal(0.0, 0.15, 2).astype(np.float32)
    picture *= (1 + slope[0] * axis[:, None] + slope[1] * axis[None, :])[:, :, None]
    balance = rng.normal(0.0, 0.04, 3).astype(np.float32)
    contrast, brightness = rng.uniform(0.7, 1.25), rng.uniform(-0.12, 0.12)
    picture = (picture - 0.45) * np.float32(contrast) * (1 + balance) + np.float32(
        0.45 + brightness
    )
    noise = rng.uniform(*NOISE) / 255
    picture += np.float32(noise) * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8), label
