"""The photographs: those in scikit-image and scikit-learn, or the user's own."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from .. import rasters
from ..pixels import Pixels
from ..rasters import SUFFIXES, printable
from .settings import SCALE, SMALLEST_SIDE, DemoError, random_source

LONGEST_SIDE = 1024
"""Larger pictures are reduced to this many pixels, to bound time and memory."""

MOST_PICTURES = 64
HELD_OUT = 3

# The files are opened by path, because skimage.data may download missing ones.
# The three held-out ones are in the public domain, so crops of them may be shown anywhere.
BUNDLED_HELD_OUT = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
)
BUNDLED_TRAINING = (
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/retina.jpg"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)


@dataclass(frozen=True)
class Photograph:
    """A ground truth, its sides multiples of the scale, and its name for display."""

    name: str
    pixels: Pixels


@dataclass
class Collection:
    """The photographs of a run."""

    training: list[Photograph]
    held_out: list[Photograph]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of each file that was not used."""
    unread: int = 0
    """Number of files not read because there were already enough pictures."""


def decode(path: Path) -> Image.Image:
    """Reads one picture as RGB, upright.

    Raises:
        ValueError: the picture cannot be read; the message is the reason.
    """
    return rasters.rgb(path)


def load(path: Path) -> Pixels:
    """Reads one picture as RGB, upright, no side longer than ``LONGEST_SIDE``.

    Raises:
        ValueError: the picture cannot be read or is too small; the message is the reason.
    """
    upright = decode(path)
    if min(upright.size) < SMALLEST_SIDE:
        width, height = upright.size
        raise ValueError(f"too small ({width} x {height}, the least is {SMALLEST_SIDE} a side)")
    upright.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    if min(upright.size) < SMALLEST_SIDE:
        raise ValueError(f"too narrow once its long side is reduced to {LONGEST_SIDE}")
    pixels = np.asarray(upright, dtype=np.uint8)
    height, width = (side // SCALE * SCALE for side in pixels.shape[:2])
    return np.ascontiguousarray(pixels[:height, :width])


def bundled() -> Collection:
    """The photographs inside the installed scikit-image and scikit-learn; never downloads.

    Raises:
        DemoError: fewer than two training photographs or no held-out ones are installed.
    """
    skipped: list[tuple[str, str]] = []

    def read(files: tuple[tuple[str, str], ...]) -> Iterator[Photograph]:
        for package, file in files:
            name = Path(file).stem.removesuffix("_left").replace("_", " ")
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            try:
                yield Photograph(name, load(Path(spec.origin).parent / file))
            except ValueError as error:
                skipped.append((f"{package}/{file}", str(error)))

    collection = Collection(list(read(BUNDLED_TRAINING)), list(read(BUNDLED_HELD_OUT)), skipped)
    if len(collection.training) < 2 or not collection.held_out:
        raise DemoError(
            "this scikit-image and scikit-learn carry too few photographs; "
            "give a directory of pictures with --images"
        )
    return collection


def _picture_files(directory: Path, exclude: Path | None) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(directory):
        here = Path(folder)
        if exclude is not None and here.resolve() == exclude.resolve():
            subfolders.clear()
            continue
        files += [here / name for name in names if Path(name).suffix.lower() in SUFFIXES]
    return sorted(files)


def from_directory(directory: Path, seed: int, exclude: Path | None = None) -> Collection:
    """The user's pictures, split by ``seed`` into training and held-out ones.

    Args:
        directory: searched recursively for jpg, png, webp, bmp and tiff files.
        seed: decides the split, and which pictures are used if there are very many.
        exclude: a directory that is not searched (the results of an earlier run).

    Raises:
        DemoError: no such directory, or fewer than two usable pictures in it.
    """
    if not directory.is_dir():
        raise DemoError(f"--images {printable(str(directory))}: there is no such directory")
    files = _picture_files(directory, exclude)
    random_source(seed, "split").shuffle(files)
    photographs: list[Photograph] = []
    skipped: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    unread = 0
    for position, file in enumerate(files):
        if len(photographs) == MOST_PICTURES:
            unread = len(files) - position
            break
        name = printable(str(file.relative_to(directory)))
        try:
            pixels = load(file)
        except ValueError as error:
            skipped.append((name, str(error)))
            continue
        # With a copy on the other side of the split, training would see a held-out picture.
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        if digest in seen:
            skipped.append((name, f"the same picture as {seen[digest]}"))
            continue
        seen[digest] = name
        photographs.append(Photograph(name, pixels))
    if len(photographs) < 2:
        why = "".join(f"; {name}: {reason}" for name, reason in skipped[:3])
        raise DemoError(
            f"--images {printable(str(directory))}: {len(photographs)} of {len(files)} picture "
            f"files can be used, at least 2 are needed{why}"
        )
    held_out = min(HELD_OUT, len(photographs) // 2)
    return Collection(photographs[held_out:], photographs[:held_out], skipped, unread)
