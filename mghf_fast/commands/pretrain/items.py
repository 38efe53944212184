"""What a source of training images is, and what it gives."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from ..pixels import Pixels

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
