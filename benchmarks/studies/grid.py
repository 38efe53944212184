"""Measures a grid in the pictures: pixel shuffle makes them in cells of four pixels, and a loss may
allow, or a squeeze by 4 reward, a pattern with that period.

Such a pattern has its power at the multiples of a quarter of the sampling frequency. The measure is
the power there over that around them, of the grey picture under a Hann window, as a geometric mean
over the 15 frequencies and the pictures. Without a pattern it is 0.6 to 1, because the mean of the
logarithms of few values is below the logarithm of their mean.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mghf_fast.commands.demo.train import super_resolve, to_tensor

from . import objectives
from .runs import TARGETS, Study

PERIOD = 4
INNER, GAP, OUTER = 1, 2, 6
"""Half sides of the square that is the peak, of the gap, and of the square around them."""


def _around(power: Tensor, row: int, column: int, half: int) -> Tensor:
    """The square of side 2 half + 1 about a frequency of a periodic spectrum."""
    rows = (torch.arange(-half, half + 1) + row) % power.shape[0]
    columns = (torch.arange(-half, half + 1) + column) % power.shape[1]
    return power[rows][:, columns]


def peaks(image: Tensor) -> float:
    """Mean natural logarithm of the power at the grid's frequencies over that around them.

    Args:
        image: (B, C, H, W), averaged over C and B; sides of 28 pixels or more.
    """
    grey = image.double().mean((0, 1))
    height, width = (side - side % PERIOD for side in grey.shape)
    grey = grey[:height, :width]
    window = torch.hann_window(height)[:, None] * torch.hann_window(width)
    power = torch.fft.fft2((grey - grey.mean()) * window).abs().square()
    found = []
    for i in range(PERIOD):
        for j in range(PERIOD):
            if i == j == 0:
                continue
            row, column = i * height // PERIOD, j * width // PERIOD
            outer, gap = (_around(power, row, column, half) for half in (OUTER, GAP))
            around = (outer.sum() - gap.sum()) / (outer.numel() - gap.numel())
            found.append(float(_around(power, row, column, INNER).mean().log() - around.log()))
    return math.fsum(found) / len(found)


@torch.no_grad()
def measure(study: Study) -> dict[str, Any]:
    """``rows``: ``objective`` ("gt" is the truth), ``target`` and ``ratio`` of the matched networks
    of the first seed on the validation pictures."""
    one = study.of_one_seed()
    torch.set_num_threads(1)
    pairs = one.setup().pairs
    seed = one.seeds[0]

    def ratio(logarithms: list[float]) -> float:
        return round(math.exp(math.fsum(logarithms) / len(logarithms)), 3)

    rows: list[dict[str, Any]] = [
        {
            "objective": "gt",
            "target": None,
            "ratio": ratio([peaks(to_tensor(pair.gt)) for pair in pairs]),
        }
    ]
    networks = one.networks()
    names: list[tuple[str, float | None, str]] = [
        (objectives.L1, None, f"{objectives.L1}|{seed}|"),
        *((name, t, f"{name}|{seed}|{t:g}") for name in one.compared for t in TARGETS),
    ]
    for name, target, key in names:
        found = [peaks(to_tensor(super_resolve(networks[key], pair.lr))) for pair in pairs]
        rows.append({"objective": name, "target": target, "ratio": ratio(found)})
    return {"period": PERIOD, "seed": seed, "rows": rows}
