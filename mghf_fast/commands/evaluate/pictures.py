"""Pairs pictures with their ground truths, and reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .. import rasters
from ..pixels import Pixels
from ..rasters import SUFFIXES, printable

SHOWN_NAMES = 8
"""Number of names that an error lists; it counts the others."""

# Suffixes that tools append to a picture's name: x4, 4x, SRF_4, SR, HR, GT, LR4, out ...; and the
# scale in DIV2K's names of low resolutions, 0801x4.
_MARK = r"(?:x\d+(?:\.\d+)?|\d+x|srf[_-]?\d+|sr|hr|gt|lr\d*|lq|hq|out|output|result)"
_MARKS = re.compile(rf"(?:[ ._-]{_MARK}|(?<=\d)x(?:[2-9]|1\d))+$", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """The files of a super-resolved picture and its ground truth, and their name for display."""

    name: str
    sr: Path
    hr: Path


def pair(sr: Path, hr: Path, names: tuple[str, str] = ("SR", "HR")) -> list[Pair]:
    """Two pictures, or the pictures of two folders by name. Messages call the two ``names``.

    In folders the names without suffix must be equal; other names are compared without the marks
    that tools append (``name_x4``, ``name_SR``). Subfolders and other files are ignored.

    Raises:
        FileNotFoundError: one of the two does not exist.
        ValueError: a file and a folder, a folder without pictures, names without a partner, or
            names with more than one.
    """
    of_sr, of_hr = names
    for what, path in ((of_sr, sr), (of_hr, hr)):
        if not path.exists():
            raise FileNotFoundError(f"{what}: there is no {_shown(path)}")
    if sr.is_dir() != hr.is_dir():
        folder, file = (sr, hr) if sr.is_dir() else (hr, sr)
        raise ValueError(
            f"{of_sr} and {of_hr} must be two pictures or two folders; {_shown(folder)} is a "
            f"folder and {_shown(file)} is not"
        )
    if not sr.is_dir():
        return [Pair(printable(sr.name), sr, hr)]

    left, right = _by_name(sr, of_sr), _by_name(hr, of_hr)
    exact = left.keys() & right.keys()
    pairs = [Pair(printable(name), left[name], right[name]) for name in exact]
    rest_sr = _without_marks({n: p for n, p in left.items() if n not in exact}, of_sr, sr)
    rest_hr = _without_marks({n: p for n, p in right.items() if n not in exact}, of_hr, hr)
    both = rest_sr.keys() & rest_hr.keys()
    pairs += [Pair(printable(name), rest_sr[name], rest_hr[name]) for name in both]
    lone = [
        f"{what} {_listed([p.name for n, p in sorted(rest.items()) if n not in both])}"
        for what, rest in ((of_sr, rest_sr), (of_hr, rest_hr))
        if rest.keys() - both
    ]
    if lone:
        raise ValueError(
            f"every picture needs a partner of its name in the other folder; {len(pairs)} have "
            f"one; without: {'; '.join(lone)}"
        )
    return sorted(pairs, key=lambda p: p.name)


def _by_name(folder: Path, what: str) -> dict[str, Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise ValueError(
            f"{what}: there is no picture in the folder {_shown(folder)} (subfolders are not "
            f"searched; pictures are {', '.join(sorted(SUFFIXES))})"
        )
    return _unique([(file.stem, file) for file in files], what, folder)


def _without_marks(files: dict[str, Path], what: str, folder: Path) -> dict[str, Path]:
    return _unique([(_MARKS.sub("", name), file) for name, file in files.items()], what, folder)


def _unique(named: Sequence[tuple[str, Path]], what: str, folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, file in named:
        if name in found:
            raise ValueError(
                f"{what}: {_listed([found[name].name, file.name])} in {_shown(folder)} both stand "
                f"for the name {printable(name)!r}; one of them must go"
            )
        found[name] = file
    return found


def _listed(names: list[str]) -> str:
    text = ", ".join(printable(name) for name in names[:SHOWN_NAMES])
    more = len(names) - SHOWN_NAMES
    return text if more <= 0 else f"{text} and {more} more"


def _shown(path: Path) -> str:
    return printable(str(path))


def check_sizes(pairs: list[Pair], border: int = 0) -> None:
    """Checks sizes and pixel formats in the files' headers, so that errors are found before
    anything is computed.

    Raises:
        ValueError: pictures of different sizes, a file that is no picture or has more than 8 bits
            per channel, or a picture that is empty without a ``border`` on each side; the message
            names them.
        OSError: a file cannot be read.
    """
    unequal = []
    for p in pairs:
        sr, hr = _size(p.sr), _size(p.hr)
        if sr != hr:
            unequal.append(
                f"{_shown(p.sr)} is {sr[0]} x {sr[1]} and {_shown(p.hr)} is {hr[0]} x {hr[1]}"
            )
        elif min(hr) <= 2 * border:
            raise ValueError(
                f"--border {border} leaves nothing of {printable(p.hr.name)}, which is {hr[0]} x "
                f"{hr[1]}"
            )
    if unequal:
        more = f" ({len(unequal)} pairs in all)" if len(unequal) > 3 else ""
        raise ValueError(
            f"SR and HR must be of one size (width x height): {'; '.join(unequal[:3])}{more}"
        )


def _size(path: Path) -> tuple[int, int]:
    """Width and height of a picture when upright."""
    with path.open("rb"):  # gives a clearer message for a missing file than a decoder
        pass
    try:
        return rasters.size(path)
    except ValueError as error:
        raise ValueError(f"{_shown(path)}: {error}") from error


def read(path: Path) -> tuple[Pixels, bool]:
    """One picture: ``(H, W, 3)`` of uint8, upright.

    A grey picture gets three equal channels. A transparent one is composited on white, because the
    colours of its hidden pixels are arbitrary.

    Returns:
        The pixels, and whether any was transparent.

    Raises:
        ValueError: the file is not a picture with 8 bits per channel.
    """
    try:
        image = rasters.upright(path)
    except ValueError as error:
        raise ValueError(f"{_shown(path)}: {error}") from error
    transparent = False
    if image.has_transparency_data:
        image = image.convert("RGBA")
        low = image.getchannel("A").getextrema()[0]
        transparent = isinstance(low, int | float) and low < 255
        if transparent:
            page = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(page, image)
    return np.asarray(image.convert("RGB"), dtype=np.uint8), transparent
