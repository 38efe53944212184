"""The sources of training images that ``--data`` can name.

A source maps every position 0, 1, 2, ... to a training image that depends only on the position and
the seed. To resume exactly after an interruption, or to split a batch over processes, it is enough
to know the next position.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import procedural
from .folders import Folders, PlainFolders
from .items import MARGIN, Item, Source
from .pictures import CropSource, PictureSource, Reader
from .settings import PROCEDURAL, PretrainError, Settings
from .shards import Shards


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
        PretrainError: it does not exist, or has no usable pictures.
    """
    distances = settings.objective == "distances"
    if settings.data == (PROCEDURAL,):
        size = settings.size + (MARGIN if distances else 0)
        return ProceduralSource(settings.seed, size, settings.epoch_images, settings.held_out)
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
