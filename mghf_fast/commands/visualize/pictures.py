"""Reads the pictures to show: cropped if necessary, never resized."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import rasters
from ..rasters import printable

LONGEST_SIDE = 512
"""Larger pictures are cropped to their centre; the features of 512 x 512 are 128 MiB."""
LARGEST_CROP = 2048
SMALLEST_SIDE = 8

Crop = tuple[int, int, int, int]
"""Left, top, width, height in pixels."""


@dataclass(frozen=True)
class Picture:
    """A picture to show: its name, and (3, H, W) in [0, 1]."""

    name: str
    image: Tensor


def read(path: Path) -> Image.Image:
    """The whole picture in RGB, 3 bytes per pixel.

    Raises:
        ValueError: the file is not a picture with 8 bits per channel.
        OSError: the file cannot be read.
    """
    path.stat()  # gives a clearer message for a missing file than a decoder
    try:
        return rasters.rgb(path)
    except ValueError as error:
        raise ValueError(f"{printable(str(path))}: {error}") from error


def size(path: Path) -> tuple[int, int]:
    """Width and height; raises as :func:`read` does, as far as the header shows errors."""
    path.stat()
    try:
        return rasters.size(path)
    except ValueError as error:
        raise ValueError(f"{printable(str(path))}: {error}") from error


def tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) in [0, 1]."""
    pixels = np.asarray(picture, dtype=np.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1).contiguous()


def window(height: int, width: int, crop: Crop | None) -> Crop:
    """The part to show: ``crop``, or the whole picture, or the centre of a large one.

    Raises:
        ValueError: the crop is empty, too large, too small or not inside the picture.
    """
    if crop is None:
        shown_width, shown_height = min(width, LONGEST_SIDE), min(height, LONGEST_SIDE)
        crop = (width - shown_width) // 2, (height - shown_height) // 2, shown_width, shown_height
    left, top, shown_width, shown_height = crop
    if min(left, top) < 0 or left + shown_width > width or top + shown_height > height:
        raise ValueError(
            f"--crop {left} {top} {shown_width} {shown_height} is not inside a picture of "
            f"{width} x {height} pixels"
        )
    if min(shown_width, shown_height) < SMALLEST_SIDE:
        raise ValueError(
            f"a picture or crop of {shown_width} x {shown_height} pixels is too small: at least "
            f"{SMALLEST_SIDE} a side are needed"
        )
    if max(shown_width, shown_height) > LARGEST_CROP:
        raise ValueError(f"--crop may be {LARGEST_CROP} pixels a side at most")
    return crop


def load(paths: list[Path], crop: Crop | None) -> tuple[list[Picture], Crop]:
    """The pictures, all cropped to the same window, and that window.

    Raises:
        ValueError, OSError: as :func:`read` and :func:`window`; or pictures of different sizes.
    """
    # Sizes are read from the headers, so that pictures of different sizes are not decoded, and only
    # one whole picture at a time is in memory.
    sizes = [size(path) for path in paths]
    if len(set(sizes)) > 1:
        named = " and ".join(
            f"{printable(path.name)} {width} x {height}"
            for path, (width, height) in zip(paths, sizes, strict=True)
        )
        raise ValueError(f"the two pictures must be of one size, got {named}")
    whole_width, whole_height = sizes[0]
    left, top, width, height = crop = window(whole_height, whole_width, crop)
    box = (left, top, left + width, top + height)
    pictures = [Picture(printable(path.name), tensor(read(path).crop(box))) for path in paths]
    return pictures, crop
