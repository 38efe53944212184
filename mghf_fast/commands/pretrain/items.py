"""The interface of a source of training images."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from ..pixels import Pixels

MARGIN = 32
"""Pixels that are cut off the pictures for distances, half on each side, because distortions and
networks have border effects."""
NO_LABEL = -1
"""Label of an item without an image, because no file could be read."""


class Item(NamedTuple):
    """One image with its label, and the files that were tried before it and could not be read."""

    pixels: Pixels
    label: int
    skipped: tuple[str, ...] = ()


class Source(Protocol):
    """Labelled images, (size, size, 3) of 8 bits.

    Attributes:
        classes: the names of the labels.
        epoch_images: training images in an epoch, a multiple of the batch for files.
        held_out_images: number of images that :meth:`training` never returns.
    """

    classes: tuple[str, ...]
    epoch_images: int
    held_out_images: int

    def training(self, position: int) -> Item:
        """The image at a position, 0 or more, in the endless order of training."""

    def held_out(self, index: int) -> Item:
        """Held-out image ``index``, below ``held_out_images``."""

    def description(self) -> dict[str, Any]:
        """A description of the data for JSON; equal for equal data."""
