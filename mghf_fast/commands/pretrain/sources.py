"""Where training images come from.

A source numbers its training images without end and says what image stands at a position, as a
function of the position and the seed alone. To go on exactly after an interruption, or to split a
batch over processes, it is therefore enough to know the next position.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

from . import procedural
from .procedural import Pixels
from .settings import PROCEDURAL, PretrainError, Settings

MARGIN = 32
"""Pixels by which the pictures of distances are larger than what is learned from: distortions and
networks do not see beyond a border, which is therefore cut off, half on each side."""
NO_LABEL = -1
"""Of an item that stands for no image, as no file could be read."""


class Item(NamedTuple):
    """One image with its label, and the files that could not be read on the way to it."""

    pixels: Pixels
    label: int
    skipped: tuple[str, ...] = ()


class Source(Protocol):
    """Labelled images, (size, size, 3) of 8 bits.

    Attributes:
        classes: the names of the labels.
        epoch_images: training images in an epoch, a multiple of the batch for files.
        held_out_images: images that :meth:`training` never gives.
    """

    classes: tuple[str, ...]
    epoch_images: int
    held_out_images: int

    def training(self, position: int) -> Item:
        """The image at a position, 0 or more, in the endless order of training."""

    def held_out(self, index: int) -> Item:
        """Held-out image ``index``, below ``held_out_images``."""

    def description(self) -> dict[str, Any]:
        """What data these are, for JSON; equal for equal data."""


class ProceduralSource:
    """The pictures of :mod:`.procedural`: the even ones are trained on, the odd ones held out."""

    def __init__(self, seed: int, size: int, epoch_images: int, held_out: int) -> None:
        self.classes = tuple(kind.name for kind in procedural.CLASSES)
        self.epoch_images, self.held_out_images = epoch_images, held_out
        self._seed, self._size = seed, size

    def training(self, position: int) -> Item:
        return Item(*procedural.render(self._seed, 2 * position, self._size))

    def held_out(self, index: int) -> Item:
        return Item(*procedural.render(self._seed, 2 * index + 1, self._size))

    def description(self) -> dict[str, Any]:
        return {
            "source": PROCEDURAL,
            "version": procedural.VERSION,
            "classes": len(self.classes),
            "held out": self.held_out_images,
        }


def open_source(settings: Settings) -> Source:
    """The source that ``--data`` names.

    Raises:
        PretrainError: there is no such thing, or it holds no pictures of use.
    """
    distances = settings.objective == "distances"
    if settings.data == (PROCEDURAL,):
        size = settings.size + (MARGIN if distances else 0)
        return ProceduralSource(settings.seed, size, settings.epoch_images, settings.held_out)
    from .folders import Folders, PlainFolders
    from .pictures import CropSource, PictureSource, Reader
    from .shards import Shards

    paths = [Path(name) for name in settings.data]
    if distances:
        return CropSource(
            PlainFolders(paths), settings.seed, settings.size + MARGIN, settings.batch,
            settings.held_out, settings.skip_limit,
        )  # fmt: skip
    if len(paths) == 1 and paths[0].is_dir():
        reader: Reader = Folders(paths[0])
    elif all(path.suffix == ".tar" for path in paths):
        reader = Shards(paths)
    else:
        raise PretrainError(
            f"--data {' '.join(settings.data)}: allowed are {PROCEDURAL!r}, one directory with a "
            "folder of pictures for each class, or .tar files"
        )
    return PictureSource(
        reader, settings.seed, settings.size, settings.batch, settings.held_out, settings.skip_limit
    )
