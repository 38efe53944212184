"""Choosing a weight beside L1: gradients in a network's parameters by crop size and training.

    python -m benchmarks.studies.weights

Takes the demo's network on the demo's training photographs and degradation: untrained (bicubic
interpolation), as it ships, and after 300 more steps on L1. For each loss of weight 1 it measures
the length of its gradient relative to L1's (median, minimum and maximum over batches), as
mghf_fast.integrations.calibrate does. It writes this machine's file into benchmarks/results and
prints the table of docs/integrations.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mghf_fast
from mghf_fast.commands.calibrate.pairs import draw
from mghf_fast.commands.demo import photographs
from mghf_fast.commands.demo.degradation import degrade
from mghf_fast.commands.demo.network import CompactEDSR, shipped_start
from mghf_fast.commands.demo.settings import SCALE
from mghf_fast.commands.pixels import Pixels
from mghf_fast.integrations.calibrate import measure
from mghf_fast.losses.mghf import DEFAULT_EXTRACTOR, DEFAULT_PRESET

from .. import results

BATCH, BATCHES, SIDES, STEPS, LEARNING_RATE = 4, 8, (64, 96, 128, 192), 300, 2e-4
MGHF = (
    ("c", DEFAULT_EXTRACTOR, DEFAULT_PRESET),
    ("n", DEFAULT_EXTRACTOR, DEFAULT_PRESET),
    ("c", DEFAULT_EXTRACTOR, "2026"),
    ("c", "random", "2026"),
    ("c", "procedural-v1", "2026"),
)
Loss = Callable[[Tensor, Tensor], Tensor]


def losses() -> dict[str, Loss]:
    """Every loss of the table, with weight 1, by its title."""
    found: dict[str, Loss] = {}
    for variant, extractor, preset in MGHF:
        name = f"MGHF-{variant}, `{extractor}`" + f', `"{preset}"`' * (variant == "c")
        found[name] = mghf_fast.MGHFLoss(variant, preset, extractor, input_range="0,1")
    found["DECLoss"] = mghf_fast.DECLoss()
    return found


def pictures() -> list[tuple[Tensor, Tensor]]:
    """The demo's training photographs, low resolution and ground truth, (3, H, W) of uint8."""
    random = np.random.default_rng(0)
    return [
        (_tensor(degrade(photo.pixels, random)), _tensor(photo.pixels))
        for photo in photographs.bundled().training
    ]


def _tensor(pixels: Pixels) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def networks(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, nn.Module]:
    """The network at three points of its training."""
    trained = shipped_start()
    optimizer = torch.optim.Adam(trained.parameters(), LEARNING_RATE)
    for low, gt in draw(pairs, SCALE, 96, BATCH, STEPS, seed=1):
        optimizer.zero_grad()
        F.l1_loss(trained(low), gt).backward()
        optimizer.step()
    fresh = CompactEDSR(torch.Generator().manual_seed(0))
    return {"untrained": fresh, "as it ships": shipped_start(), "300 steps later": trained}


def rows(pairs: list[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Median, minimum and maximum of the ratios, by network, crop and loss."""
    found = []
    for network_name, network in networks(pairs).items():
        for side in SIDES if network_name == "as it ships" else (128,):
            for name, loss in losses().items():
                batches = draw(pairs, SCALE, side, BATCH, BATCHES, seed=0)
                ratios = measure(loss, network, batches).ratios
                numbers = (statistics.median(ratios), min(ratios), max(ratios))
                row = dict(zip(("ratio", "least", "most"), numbers, strict=True))
                row = {key: float(f"{number:.3g}") for key, number in row.items()}
                found.append({"network": network_name, "crop": side, "loss": name, **row})
                print(found[-1], flush=True)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a row per loss and a column per crop or network."""
    columns = list(dict.fromkeys((row["network"], row["crop"]) for row in found))
    lines = ["| loss of weight 1 | " + " | ".join(f"{n}, {c} px" for n, c in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for name in dict.fromkeys(row["loss"] for row in found):
        cells = {
            (row["network"], row["crop"]): f"{row['ratio']:g} ({row['least']:g} to {row['most']:g})"
            for row in found
            if row["loss"] == name
        }
        lines.append(f"| {name} | " + " | ".join(cells[column] for column in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    found = rows(pictures())
    machine = results.this_machine(threads)
    run = results.new_run(machine, threads, [])
    settings = {"batch": BATCH, "batches": BATCHES, "steps": STEPS, "learning_rate": LEARNING_RATE}
    path = results.RESULTS / f"{machine}-weights.json"
    text = json.dumps({"settings": settings, "machine": run["machine"], "ratios": found}, indent=1)
    path.write_text(text + "\n")
    print(f"\n{table(found)}\n\n{path}")


if __name__ == "__main__":
    main()
