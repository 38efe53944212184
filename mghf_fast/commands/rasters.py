"""How all commands read picture files: upright, 8 bits per channel."""

from __future__ import annotations

import io
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
"""Suffixes of the files in a folder that count as pictures."""
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


def printable(text: str) -> str:
    """``text`` with escapes for the characters that a terminal or UTF-8 cannot show."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _source(file: Path | bytes) -> Path | io.BytesIO:
    if isinstance(file, bytes):
        return io.BytesIO(file)
    if file.is_dir():
        raise ValueError("a directory, not a picture's file")
    # Opening a pipe would block until another process writes to it.
    if file.exists() and not stat.S_ISREG(file.stat().st_mode):
        raise ValueError("not a regular file")
    return file


def _reason(error: Exception) -> ValueError:
    return ValueError(f"not readable as a picture ({type(error).__name__})")


def _deep(mode: str) -> ValueError | None:
    """What is wrong with a mode of more than 8 bits per channel."""
    if mode[0] not in "IF":
        return None
    return ValueError(f"its pixel format {mode} is not 8 bits a channel")


def upright(file: Path | bytes) -> Image.Image:
    """A decoded picture file, rotated by its EXIF orientation, in the file's own mode.

    Args:
        file: a path or the content.

    Raises:
        ValueError: not a regular file, not a complete picture, or more than 8 bits per channel
            (16-bit grey, integers, floating point), which a conversion would clip; the message is
            the reason.
    """
    from PIL import Image, ImageOps

    source = _source(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(source) as opened:
                problem = _deep(opened.mode)
                if problem is None:
                    # In place, because a copy would double the memory of a large picture.
                    ImageOps.exif_transpose(opened, in_place=True)
                    opened.load()
                    return opened
    except Exception as error:  # decoders raise many types on a broken file
        raise _reason(error) from error
    raise problem


def rgb(file: Path | bytes) -> Image.Image:
    """:func:`upright` converted to RGB from any mode; transparency is dropped."""
    image = upright(file)
    if image.mode == "RGB":
        return image
    try:
        return image.convert("RGB")
    except Exception as error:  # a mode without a conversion to RGB
        raise _reason(error) from error


def size(file: Path | bytes) -> tuple[int, int]:
    """Width and height of :func:`upright`, read from the file's header.

    Raises:
        ValueError: as in :func:`upright`, except that the picture may be incomplete.
    """
    from PIL import Image

    source = _source(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(source) as opened:
                problem = _deep(opened.mode)
                width, height = opened.size
                turned = opened.getexif().get(0x0112) in _TURNED
    except Exception as error:  # as above
        raise _reason(error) from error
    if problem is not None:
        raise problem
    return (height, width) if turned else (width, height)
