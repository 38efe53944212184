"""README's small tables: the whole losses beside the VGG-16 loss on a device, below a sentence of
judgement that is derived from the figures by rule."""

from __future__ import annotations

from collections.abc import Sequence

from . import gpu_tables
from .cases import PAPER
from .results import Row, Run, fastest, select, value
from .text import cell, table

STEP = "step"
LOSSES = {"mghf_n": "MGHF-n", "mghf_c": "MGHF-c"}
SAME = 1.05
"""Times whose ratio is below this count as equal."""


def vgg16(run: Run) -> Row | None:
    """The loss that is replaced, in its fastest float32 form."""
    rows = [r for r in select(run, op="mghf_c", shape=str(PAPER)) if "VGG-16" in r["form"]]
    of_features = [r for r in rows if "LPIPS" not in r["form"] and r["dtype"] == "float32"]
    return fastest(of_features, STEP)


def own(run: Run, op: str) -> Row | None:
    """The row of the kernels that "auto" takes, or else the one that was measured."""
    if "ceilings" in run:
        return gpu_tables.ours(run, op, str(PAPER))
    return fastest(select(run, op=op, shape=str(PAPER), form="mghf_fast"), STEP)


def judgement(device: str, ratios: Sequence[tuple[str, float]]) -> str:
    """``On DEVICE MGHF-n takes 0.2 and MGHF-c 0.4 times as long as the VGG-16 loss: ...``"""
    if not ratios:
        return f"On {device} the losses were not measured beside the VGG-16 loss."
    (first, ratio), *others = ratios
    times = " and ".join([f"{first} takes {ratio:.2g}", *(f"{n} {r:.2g}" for n, r in others)])
    if all(ratio * SAME < 1 for _, ratio in ratios):
        verdict = "both are cheaper than what they replace"
    elif all(ratio > SAME for _, ratio in ratios):
        verdict = "neither saves time there"
    else:
        cheaper = [name for name, ratio in ratios if ratio * SAME < 1]
        verdict = f"only {cheaper[0]} saves time" if cheaper else "neither saves much time"
    if len(ratios) == 1:
        verdict = "cheaper than what it replaces" if ratios[0][1] * SAME < 1 else "it saves no time"
    return f"On {device}, {times} times as long as the VGG-16 loss: {verdict}."


def short(run: Run) -> str:
    """A device's sentence and table."""
    machine, beside = run["machine"], vgg16(run)
    rows: list[list[str]] = []
    ratios: list[tuple[str, float]] = []
    other = value(beside, STEP)
    for op, title in LOSSES.items():
        row = own(run, op)
        seconds = value(row, STEP)
        ratio = None if seconds is None or other is None else seconds / other
        if ratio is not None:
            ratios.append((title, ratio))
        text = cell(row, STEP) + gpu_tables.by(row) if "ceilings" in run else cell(row, STEP)
        rows.append([title, text, "" if ratio is None else f"{ratio:.2g} x"])
    rows.append(["VGG-16 loss", cell(beside, STEP), ""])
    device = (
        f"an {machine['gpu']}"
        if "ceilings" in run
        else f"this CPU ({machine['cpu']}, {machine['isa']}, {machine['threads']} threads)"
    )
    head = ["512 x 512, forward and backward", "time, peak memory", "relative to VGG-16"]
    return f"{judgement(device, ratios)}\n\n{table(head, rows)}"


def on_gpus() -> str:
    """Table and sentence for every GPU that has a committed result."""
    return "\n".join(map(short, gpu_tables.runs())) or gpu_tables.NONE
