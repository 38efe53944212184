"""The photographs inside scikit-image and scikit-learn: none of them trains an extractor that
learned from the procedural source. Opened by path, as scikit-image may download what a wheel lacks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mghf_fast.demo.photographs import decode
from mghf_fast.demo.train import busiest_window, to_tensor

FILES = (
    *(("skimage", f"data/{name}.png") for name in ("astronaut", "chelsea", "coffee", "ihc")),
    ("skimage", "data/motorcycle_left.png"),
    *(("skimage", f"data/{name}.jpg") for name in ("hubble_deep_field", "retina", "rocket")),
    *(("sklearn", f"datasets/images/{name}.jpg") for name in ("china", "flower")),
    *(("skimage", f"data/{name}.png") for name in ("brick", "grass", "gravel", "camera", "moon")),
    ("skimage", "data/coins.png"),
)
COLOUR = 10
"""How many of the files, the first ones, are in colour."""


class Scene(NamedTuple):
    """A photograph, (3, H, W) in [0, 1]."""

    name: str
    image: Tensor


def photographs(count: int | None = None) -> list[Scene]:
    """The first ``count`` that this machine has.

    Raises:
        ModuleNotFoundError: scikit-image or scikit-learn is missing.
        ValueError: fewer than two photographs are there.
    """
    found = []
    for package, file in FILES[:count]:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        path = Path(spec.origin).parent / file
        if path.exists():
            image = to_tensor(np.asarray(decode(path), dtype=np.uint8))[0]
            found.append(Scene(path.stem.removesuffix("_left").replace("_", " "), image))
    if len(found) < 2:
        raise ValueError("this scikit-image and scikit-learn carry too few photographs")
    return found


def busiest(scenes: Sequence[Scene], side: int) -> list[Scene]:
    """Of each the window with the most edges, (3, side, side); smaller photographs are left out."""
    result = []
    for name, image in scenes:
        if min(image.shape[1:]) >= side:
            pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            top, left = busiest_window(pixels, side)
            window = image[:, top : top + side, left : left + side]
            result.append(Scene(name, window.contiguous()))
    return result


class Crops(NamedTuple):
    """Square crops, (N, 3, side, side), with the photograph and the region each is of, (N,)."""

    images: Tensor
    scene: Tensor
    region: Tensor


def crops(scenes: Sequence[Scene], side: int, most: int, flat: float = 0.02) -> Crops:
    """Four crops, without overlap, of every region of 2 x 2 crops.

    Args:
        side: of a crop, pixels.
        most: regions of a photograph at most, spread over it.
        flat: regions with a crop whose grey levels deviate less than this are left out: there is
            no texture in them.

    The photographs with fewer than two regions are left out: a probe could not learn and be tried.
    """
    images: list[Tensor] = []
    scene_of: list[int] = []
    region_of: list[int] = []
    regions = 0
    for index, (_, image) in enumerate(scenes):
        cut = []
        for top in range(0, image.shape[1] - 2 * side + 1, 2 * side):
            for left in range(0, image.shape[2] - 2 * side + 1, 2 * side):
                four = [
                    image[:, y : y + side, x : x + side]
                    for y in (top, top + side)
                    for x in (left, left + side)
                ]
                if min(float(c.mean(0).std()) for c in four) >= flat:
                    cut.append(four)
        if len(cut) < 2:
            continue
        spread = np.unique(np.linspace(0, len(cut) - 1, min(most, len(cut))).round().astype(int))
        for position in spread:
            images += cut[position]
            scene_of += [index] * 4
            region_of += [regions] * 4
            regions += 1
    if not images:
        raise ValueError(f"no photograph has two textured regions of {2 * side} x {2 * side}")
    return Crops(torch.stack(images), torch.tensor(scene_of), torch.tensor(region_of))


def without_colour(images: Tensor) -> Tensor:
    """Grey, every crop with one mean and one contrast: what is left to tell crops apart by is their
    texture, not how bright, contrasty or coloured they are."""
    grey = images.mean(1, keepdim=True)
    deviation = grey.std((2, 3), keepdim=True).clamp_min(1e-4)
    return (0.5 + 0.15 * (grey - grey.mean((2, 3), keepdim=True)) / deviation).expand_as(images)
