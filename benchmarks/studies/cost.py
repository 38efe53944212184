"""The cost of a step of each loss beside the VGG-16 loss: forward and gradient to the picture.

All losses take turns in one process, so that other load of the machine affects them equally.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import objectives
from .runs import Study

ROUNDS, BATCH, SIDE = 15, 4, 96


def measure(
    study: Study, names: Sequence[str], rounds: int = ROUNDS, side: int = SIDE
) -> dict[str, Any]:
    """``rows``: each objective's median seconds, spread (quartiles' distance over the median) and
    the median over the rounds of its ratio to the VGG loss."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    gt = torch.rand(BATCH, 3, side, side, generator=generator)
    sr = (gt + 0.05 * torch.randn(gt.shape, generator=generator)).requires_grad_()
    terms = {name: objectives.build(study.full_name(name)) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, term in terms.items():
            began = time.perf_counter()
            torch.autograd.grad(term(sr, gt), sr)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, found in seconds.items():
        low, middle, high = statistics.quantiles(found, method="inclusive")
        row: dict[str, Any] = {
            "objective": name,
            "median_s": float(f"{middle:.4g}"),
            "spread": round((high - low) / middle, 3),
        }
        if objectives.VGG in seconds:
            pairs = zip(found, seconds[objectives.VGG], strict=True)
            row["of_vgg"] = float(f"{statistics.median(a / b for a, b in pairs):.3g}")
        rows.append(row)
    return {"batch": BATCH, "side": side, "threads": 1, "rounds": rounds, "rows": rows}
