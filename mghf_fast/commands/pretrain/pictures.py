"""Training images cut from picture files, from folders or archives."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .. import rasters
from ..pixels import Pixels
from .items import NO_LABEL, Item
from .settings import PretrainError

SUFFIXES = rasters.SUFFIXES | {".ppm"}

LARGEST_CROP = 2.0
"""A crop is at most this many times as large as the training image, so that shrinking it removes
little of the detail to be learned."""


LONGEST_SIDE = 1024
"""Larger pictures are reduced to this many pixels before squares are cut out of them."""
MOST_KEPT_BYTES = 512 * 2**20
"""Maximum size of the decoded pictures that a process keeps."""


class Reader(Protocol):
    """Picture files with labels.

    Attributes:
        classes: the names of the labels.
        names: the files' names for messages.
        labels: each file's label, an index of ``classes``.
    """

    classes: tuple[str, ...]
    names: list[str]
    labels: npt.NDArray[np.int64]

    def read(self, index: int) -> bytes:
        """The content of file ``index``; ``OSError`` if it cannot be read."""

    def description(self) -> dict[str, Any]:
        """A description of the files for JSON; equal for equal files."""


def _decoded(content: bytes) -> Any:
    """A picture file's PIL image, RGB and upright; ``OSError`` if it is not a complete picture with
    8 bits per channel."""
    try:
        return rasters.rgb(content)
    except ValueError as error:
        raise OSError(str(error)) from error


def crop(content: bytes, size: int, rng: np.random.Generator | None) -> Pixels:
    """A square training image from a picture file: a random crop with ``rng``, else the centre.

    A random crop is 1 to ``LARGEST_CROP`` times as large as the result, mirrored at random, and
    varied in contrast, brightness, colour and noise. A picture smaller than ``size`` is enlarged.

    Returns:
        (size, size, 3).

    Raises:
        OSError: the bytes are not a complete picture with 8 bits per channel.
    """
    from PIL import Image

    image = _decoded(content)
    width, height = image.size
    shorter = min(width, height)
    if rng is None:
        side = min(float(shorter), LARGEST_CROP * size)
        left, top = (width - side) / 2, (height - side) / 2
    else:
        most = min(float(shorter), LARGEST_CROP * size)
        side = min(size * (most / size) ** rng.random(), shorter) if most > size else shorter
        left, top = rng.random() * (width - side), rng.random() * (height - side)
    box = (left, top, left + side, top + side)
    if side == size:  # nothing to resample
        left, top = float(round(left)), float(round(top))
        box = (left, top, left + side, top + side)
    resized = image.resize((size, size), Image.Resampling.BICUBIC, box)
    pixels = np.asarray(resized, dtype=np.uint8)
    return pixels if rng is None else _varied(pixels, rng)


def _varied(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    picture = pixels.astype(np.float32) / 255
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
    contrast, brightness = rng.uniform(0.7, 1.25), rng.uniform(-0.12, 0.12)
    balance = 1 + rng.normal(0.0, 0.04, 3)
    picture = (picture - 0.45) * (contrast * balance).astype(np.float32)
    picture = picture + np.float32(0.45 + brightness)
    noise = np.float32(rng.uniform(0.0, 2.5) / 255)
    picture = picture + noise * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)


class PictureSource:
    """A :class:`Source` of picture files.

    Args:
        reader: the files.
        seed: seed of the order, of the held-out files and of the crops.
        size: side of the training images, pixels.
        batch: images per step; an epoch ends with its last complete batch.
        held_out: number of held-out files, at most a fifth of all.
        skip_limit: number of consecutive unreadable files that are skipped.

    An unreadable file is replaced by the next one in the order of the epoch.

    Raises:
        PretrainError: too few files for one batch.
    """

    def __init__(
        self, reader: Reader, seed: int, size: int, batch: int, held_out: int, skip_limit: int
    ) -> None:
        self.classes, self._reader, self._seed, self._size = reader.classes, reader, seed, size
        self._skip_limit = skip_limit
        order = np.random.default_rng([seed, 0]).permutation(len(reader.names))
        self.held_out_images = min(held_out, len(order) // 5)
        self._held_out, self._training = np.split(order, [self.held_out_images])
        self.epoch_images = len(self._training) // batch * batch
        if not self.epoch_images or not self.held_out_images:
            raise PretrainError(
                f"--data has {len(order)} pictures, which is too few: {self.held_out_images} are "
                f"held out, and --batch {batch} are needed besides"
            )
        # A method's cache would keep the source alive, and be shared by all sources.
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        shuffled: npt.NDArray[np.int64] = np.random.default_rng([self._seed, 1, epoch]).permutation(
            self._training
        )
        return shuffled

    def training(self, position: int) -> Item:
        epoch, offset = divmod(position, self.epoch_images)
        rng = np.random.default_rng([self._seed, 2, position])
        return self._first_readable(self._order(epoch), offset, rng)

    def held_out(self, index: int) -> Item:
        return self._first_readable(self._held_out, index, None)

    def _cut(self, file: int, rng: np.random.Generator | None) -> Pixels:
        """A training image of a file; ``OSError`` if it cannot be read."""
        return crop(self._reader.read(file), self._size, rng)

    def _first_readable(
        self, files: npt.NDArray[np.int64], start: int, rng: np.random.Generator | None
    ) -> Item:
        skipped: list[str] = []
        for tried in range(min(len(files), self._skip_limit + 1)):
            file = int(files[(start + tried) % len(files)])
            try:
                pixels = self._cut(file, rng)
            except OSError:
                skipped.append(self._reader.names[file])
            else:
                return Item(pixels, int(self._reader.labels[file]), tuple(skipped))
        # All files, or more than the limit: the caller, who counts them, ends the training.
        empty = np.zeros((self._size, self._size, 3), dtype=np.uint8)
        return Item(empty, NO_LABEL, tuple(skipped))

    def description(self) -> dict[str, Any]:
        return {
            **self._reader.description(),
            "pictures": len(self._reader.names),
            "classes": len(self.classes),
            "held out": self.held_out_images,
        }


class CropSource(PictureSource):
    """Squares cut out of pictures at their own resolution, rotated by quarter turns and mirrored at
    random. A picture with a side below ``size`` counts as unreadable; one with a side above
    ``LONGEST_SIDE`` is reduced to it."""

    def __init__(
        self, reader: Reader, seed: int, size: int, batch: int, held_out: int, skip_limit: int
    ) -> None:
        super().__init__(reader, seed, size, batch, held_out, skip_limit)
        self._kept: dict[int, Pixels] = {}
        self._kept_bytes = 0

    def _picture(self, file: int) -> Pixels:
        # Each picture is needed once per epoch, so keeping the first ones is as good as any.
        if (kept := self._kept.get(file)) is not None:
            return kept
        from PIL import Image

        image = _decoded(self._reader.read(file))
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        pixels = np.asarray(image, dtype=np.uint8)
        if min(pixels.shape[:2]) < self._size:
            raise OSError(f"smaller than {self._size} x {self._size}")
        if self._kept_bytes + pixels.nbytes <= MOST_KEPT_BYTES:
            self._kept[file] = pixels
            self._kept_bytes += pixels.nbytes
        return pixels

    def _cut(self, file: int, rng: np.random.Generator | None) -> Pixels:
        pixels = self._picture(file)
        room = [side - self._size for side in pixels.shape[:2]]
        if rng is None:
            top, left = (space // 2 for space in room)
        else:
            top, left = (int(rng.integers(space + 1)) for space in room)
        square = pixels[top : top + self._size, left : left + self._size]
        if rng is not None:
            square = np.rot90(square, int(rng.integers(4)))
            if rng.random() < 0.5:
                square = square[:, ::-1]
        return np.ascontiguousarray(square)
