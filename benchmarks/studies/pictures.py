"""The pictures of a study: ground truths for training, and pairs for judging."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mghf_fast.commands.demo.degradation import degrade
from mghf_fast.commands.demo.photographs import Photograph, decode
from mghf_fast.commands.demo.settings import SCALE, random_source
from mghf_fast.commands.pixels import Pixels
from mghf_fast.commands.rasters import SUFFIXES

SEED = 0
"""Seed of the degradation of pictures for judging; the same for every network."""


class Pair(NamedTuple):
    """A ground truth and the picture four times smaller."""

    name: str
    gt: Pixels
    lr: Pixels


def read(path: Path) -> Pixels:
    """A picture without the rows and columns beyond a multiple of the scale."""
    pixels = np.asarray(decode(path), dtype=np.uint8)
    height, width = (side // SCALE * SCALE for side in pixels.shape[:2])
    return np.ascontiguousarray(pixels[:height, :width])


def files(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{folder} holds no picture")
    return found


def training(folder: Path, least: int = 96) -> list[Photograph]:
    """Every picture below ``folder`` with no side under ``least`` pixels."""
    found = [Photograph(p.relative_to(folder).as_posix(), read(p)) for p in files(folder)]
    found = [p for p in found if min(p.pixels.shape[:2]) >= least]
    if not found:
        raise ValueError(f"{folder} holds no picture of at least {least} pixels a side")
    return found


def _centre(pixels: Pixels, side: int, scale: int = 1) -> Pixels:
    """The middle of at most ``side`` pixels a side, on a corner that ``scale`` divides."""
    top, left = (max(0, (n - side) // 2 // scale * scale) for n in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def degraded(folder: Path, crop: int = 0) -> list[Pair]:
    """The pictures of a folder with the demo's degradation, whose random numbers depend on the
    picture's name alone. ``crop`` keeps the middle of that many pixels a side, cut after
    degrading the whole."""
    pairs = []
    for path in files(folder):
        name, gt = path.relative_to(folder).as_posix(), read(path)
        low = degrade(gt, random_source(SEED, "judged", path.stem))
        pairs.append(_cropped(Pair(name, gt, low), crop))
    return pairs


def _cropped(pair: Pair, crop: int) -> Pair:
    if not crop:
        return pair
    if crop % SCALE:
        raise ValueError(f"crop is {crop}; allowed are multiples of {SCALE}, and 0 for all")
    gt = _centre(pair.gt, crop, SCALE)
    top, left = (max(0, (n - crop) // 2 // SCALE) for n in pair.gt.shape[:2])
    side = crop // SCALE
    low = np.ascontiguousarray(pair.lr[top : top + side, left : left + side])
    return Pair(pair.name, gt, low)


def real(folder: Path, crop: int = 0) -> list[Pair]:
    """Pairs of a camera: two folders of ``folder``, one with "HR" or "gt" in its name and one with
    "LR" or "lq", whose pictures match by their sorted names.

    Raises:
        ValueError: there are not two such folders, their counts differ, or sizes are not 4 to 1.
    """
    below = [p for p in sorted(folder.rglob("*")) if p.is_dir()]
    high = [p for p in below if re.search(r"hr|gt", p.name.lower())]
    low = [p for p in below if re.search(r"lr|lq", p.name.lower())]
    if len(high) != 1 or len(low) != 1:
        raise ValueError(f"{folder} must hold one folder of HR and one of LR pictures")
    ours, theirs = files(high[0]), files(low[0])
    if len(ours) != len(theirs):
        raise ValueError(f"{folder}: {len(ours)} HR and {len(theirs)} LR pictures do not match")
    pairs = []
    for one, other in zip(ours, theirs, strict=True):
        gt, small = read(one), np.ascontiguousarray(np.asarray(decode(other), dtype=np.uint8))
        if gt.shape[:2] != tuple(SCALE * n for n in small.shape[:2]):
            raise ValueError(f"{other} is not {SCALE} times smaller than {one}")
        pairs.append(_cropped(Pair(one.name, gt, small), crop))
    return pairs
