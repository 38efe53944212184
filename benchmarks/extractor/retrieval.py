"""Part (a): do the features know textures?

A crop's descriptor is the mean and the deviation of each feature map, which say nothing of where
things are. Three questions: *region*, whether a crop's nearest neighbour among all others is of the
same region (three are); *photograph*, whether its nearest neighbour outside its region is of the
same photograph; *probe*, whether a ridge regression to the photographs, learned on every other
region, names that of the rest. Distances are Euclidean, every entry brought to deviation 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import Crops, Scene, crops, without_colour
from .subjects import PIXELS, Subject

SIDE, REGIONS = 64, 12
PENALTIES = tuple(10.0**power for power in range(-2, 5))


@torch.no_grad()
def descriptors(subject: Subject, images: Tensor, batch: int = 32) -> Tensor:
    """(N, 3, H, W) -> (N, 2 C), float64; of raw pixels an 8 x 8 thumbnail, (N, 192)."""
    parts = []
    for images_ in images.split(batch):
        features = subject.features(images_.contiguous())
        if subject.name == PIXELS:
            parts.append(F.adaptive_avg_pool2d(features, 8).flatten(1).double())
        else:
            maps = features.flatten(2)
            parts.append(torch.cat((maps.mean(2), maps.std(2)), 1).double())
    return torch.cat(parts)


def _scaled(x: Tensor, like: Tensor) -> Tensor:
    return (x - like.mean(0)) / like.std(0).clamp_min(1e-9)


def neighbours(x: Tensor, data: Crops) -> tuple[float, float]:
    """Share of the crops with the right nearest neighbour: by region, by photograph."""
    x = _scaled(x, x)
    distance = torch.cdist(x, x).fill_diagonal_(torch.inf)
    by_region = data.region[distance.argmin(1)] == data.region
    same_region = data.region[:, None] == data.region[None]
    by_photograph = data.scene[distance.masked_fill(same_region, torch.inf).argmin(1)] == data.scene
    return float(by_region.double().mean()), float(by_photograph.double().mean())


def probe(x: Tensor, data: Crops) -> float:
    """Share of the crops of the odd regions that the probe puts into their photograph."""
    train = data.region % 2 == 0
    classes, label = data.scene.unique(return_inverse=True)
    inputs = _scaled(x, x[train])
    inputs = torch.cat((inputs, torch.ones(len(x), 1, dtype=x.dtype)), 1)
    target = F.one_hot(label, len(classes)).to(x.dtype)
    a, y = inputs[train], target[train]
    # The penalty with the least leave-one-out error on the training crops.
    u, s, _ = torch.linalg.svd(a, full_matrices=False)
    best: tuple[float, Tensor] | None = None
    for penalty in PENALTIES:
        shrink = s**2 / (s**2 + penalty)
        residual = y - u @ (shrink[:, None] * (u.mT @ y))
        leverage = (u.square() * shrink).sum(1, keepdim=True)
        error = float((residual / (1 - leverage).clamp_min(1e-9)).square().mean())
        if best is None or error < best[0]:
            identity = torch.eye(a.shape[1], dtype=a.dtype)
            best = error, torch.linalg.solve(a.mT @ a + penalty * identity, a.mT @ y)
    assert best is not None
    guess = (inputs[~train] @ best[1]).argmax(1)
    return float((guess == label[~train]).double().mean())


def chances(data: Crops) -> dict[str, float]:
    """What guessing gets right; the probe by the most frequent photograph."""
    count = len(data.images)
    same = data.scene.bincount()[data.scene].double() - 4
    tried = data.scene[data.region % 2 == 1]
    return {
        "region": round(3 / (count - 1), 4),
        "photograph": round(float((same / (count - 4)).mean()), 4),
        "probe": round(float(tried.bincount().max()) / len(tried), 4),
    }


def measure(
    subjects: Sequence[Subject], scenes: Sequence[Scene], side: int = SIDE, regions: int = REGIONS
) -> dict[str, Any]:
    """The part's result."""
    data = crops(scenes, side, regions)
    rows = []
    for colour, images in (("grey", without_colour(data.images)), ("colour", data.images)):
        for subject in subjects:
            x = descriptors(subject, images)
            region, photograph = neighbours(x, data)
            rows.append(
                {
                    "subject": subject.name,
                    "seed": subject.seed,
                    "images": colour,
                    "region": round(region, 4),
                    "photograph": round(photograph, 4),
                    "probe": round(probe(x, data), 4),
                }
            )
    return {
        "side": side,
        "crops": len(data.images),
        "crops_probed": int((data.region % 2 == 1).sum()),
        "regions": int(data.region.max()) + 1,
        "photographs": len(data.scene.unique()),
        "chance": chances(data),
        "rows": rows,
    }
