"""The paper's Table 5 with our counts and with measurements on this machine: `mghf-fast table5`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from ...ops import OPS
from ..machine import machine_facts
from . import cost
from .measure import MIB, Measurement, measure_apart
from .workloads import CHANNELS, ROW_OPS, VARIANTS

BUDGET = 2.0  # seconds after which a step is not run again
WIDTH = 110

MEASURED_NOTES = (
    "Ours: M = C/2 kept maps (the measured steps too), the stem included, one similarity product.",
    "Time: median of forward, and backward to SR alone, for both images; after the comma "
    "(longest - shortest) / median. Peak: peak rise of a fresh process's resident memory over its "
    "level before the step, so without the step's inputs and weights.",
    "The op content_style computes AWDFE MSE, correlation and Gram with MGHF-n, entropies and "
    "pruning in one call, so under mghf_fast these three rows show that joint op, while reference "
    "and compile run the row's term alone.",
)


def kernels(row: str) -> dict[str, str]:
    """The backend that "auto" picks for each op of a row on this machine's CPU: op -> backend."""
    return {name: OPS[name].preferred() for name in ROW_OPS[row]}


def measure_row(
    row: str,
    variant: str,
    size: int,
    *,
    rounds: int,
    threads: int | None,
    limit: float,
    memory: bool,
) -> Measurement:
    """Time and peak memory of one variant of one row (see :mod:`.workloads`)."""
    return measure_apart(
        "mghf_fast.commands.table5.workloads:workload",
        {"row": row, "variant": variant, "size": size},
        timeout=limit, threads=threads, rounds=rounds, budget=BUDGET, memory=memory,
    )  # fmt: skip


def variants(row: str) -> tuple[str, ...]:
    """The variants measured for a row; "mghf_fast" where the row runs an op of ours."""
    return VARIANTS if ROW_OPS[row] else tuple(v for v in VARIANTS if v != "mghf_fast")


def _count(count: cost.Cost) -> dict[str, float | int]:
    return {"gmacs": count.gmacs, "mib": count.mib, "parameters": count.parameters}


def _measured(result: Measurement) -> dict[str, Any]:
    found = result.failure is None
    return {
        "seconds": list(result.seconds),
        "median_s": result.median if found else None,
        "spread": result.spread if found else None,
        "peak_bytes": result.peak_bytes,
        "failure": result.failure,
    }


def _row_facts(row: cost.Row) -> dict[str, Any]:
    """A row of the JSON result, before anything is measured."""
    gflops, mib, millions = row.paper
    return {
        "key": row.key,
        "name": row.name,
        "paper": {"gflops": gflops, "mib": mib, "parameters_m": millions},
        "published": _count(row.published),
        "ours": _count(row.ours),
        "kernels": kernels(row.key),
        "measured": {},
    }


def machine_line(machine: dict[str, Any], size: int) -> str:
    """One line on the machine and the problem of the measurement."""
    return (
        f"{machine['cpu']} ({machine['isa']}), {machine['cores']} cores, {machine['threads']} "
        f"threads, {machine['memory_gib']} GiB; torch {machine['torch']}; float32, B=1, "
        f"C={CHANNELS}, {size}x{size}"
    )


def counts_text(rows: list[dict[str, Any]]) -> list[str]:
    """The table of counts: the paper, the same algorithm counted by us, and our defaults."""
    lines = [
        f"{'':16}|{'the paper':^25}|{'the paper, counted by us':^25}|{'our defaults, counted':^25}",
        f"{'row':16}" + f"|{'GFLOP':>8}{'MiB':>8}{'Mparam':>8} " * 3,
        "-" * 16 + ("+" + "-" * 25) * 3,
    ]
    for row in rows:
        paper = row["paper"]
        cells = [f"{paper['gflops']:8.3f}{paper['mib']:8.2f} {paper['parameters_m']:7.3f} "]
        for side in ("published", "ours"):
            count = row[side]
            millions = count["parameters"] / 1e6
            cells.append(f"{count['gmacs']:8.3f}{count['mib']:9.3f}{millions:7.3f} ")
        text = "|".join(cells)
        lines.append(f"{row['name']:16}|{text}")
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def cell(result: dict[str, Any] | None) -> str:
    """Time, spread and peak of one variant, or why they are missing."""
    if result is None:
        return "-"
    if result["failure"] is not None:
        return str(result["failure"])
    spread = f"{result['spread']:.0%}" if len(result["seconds"]) > 1 else "1 run"
    text = f"{_duration(result['median_s'])}, {spread}"
    if result["peak_bytes"] is not None:
        text = f"{text:>15}{result['peak_bytes'] / MIB:8.0f} MiB"
    return text


def measured_text(row: dict[str, Any]) -> str:
    """The measured line of a row, without its backends."""
    width = 29
    cells = (cell(row["measured"].get(variant)) for variant in VARIANTS)
    return f"{row['name']:16}" + "".join(
        f"|{text if len(text) < width else text[: width - 4] + '...':>{width - 1}}"
        for text in cells
    )


MEASURED_HEADER = f"{'row':16}" + "".join(f"|{name:>28}" for name in VARIANTS)


def notes(rows: list[dict[str, Any]], machine: dict[str, Any]) -> list[str]:
    """What a reader of the table must know, with the full text of every failure."""
    texts = [*cost.NOTES, *MEASURED_NOTES]
    fused = {f"{op}: {b}" for row in rows for op, b in row["kernels"].items() if b != "reference"}
    texts.append("Kernels in mghf_fast on this machine: " + (", ".join(sorted(fused)) or "none"))
    if machine["load"] is not None and machine["load"] > 0.5 * machine["cores"]:
        texts.append(
            f"Other programs were running (load average {machine['load']} at the start): times are "
            "longer and less steady than on an idle machine."
        )
    for row in rows:
        for variant, result in row["measured"].items():
            if result["failure"] is not None:
                texts.append(f"{row['name']}, {variant}: {result['failure']}.")
    return texts


def show_progress(text: str) -> None:
    """Shows ``text`` on one line of stderr if it is a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def run(arguments: argparse.Namespace) -> int:
    """Counts, measures, prints row by row and writes the JSON, in which a row may be a failure.

    Args:
        arguments: checked arguments of :mod:`.command`.
    """
    table = arguments.json != "-"

    def show(*lines: str) -> None:
        if table:
            print("\n".join(lines), flush=True)

    machine = machine_facts(arguments.threads)
    rows = [
        _row_facts(row)
        for row in cost.table5(arguments.size, arguments.size, channels=CHANNELS)
        if arguments.rows is None or row.key in arguments.rows
    ]
    show(machine_line(machine, arguments.size), "", *counts_text(rows), "")
    if arguments.size != 512:
        show("(the paper's figures are for 512x512)", "")
    show(MEASURED_HEADER, "-" * 16 + ("+" + "-" * 28) * len(VARIANTS))
    for row in rows:
        for variant in variants(row["key"]):
            if variant == "compile" and arguments.skip_compile:
                continue
            show_progress(f"{row['name']}, {variant} ...")
            result = measure_row(
                row["key"], variant, arguments.size, rounds=arguments.rounds,
                threads=arguments.threads, limit=arguments.limit,
                memory=not arguments.skip_memory,
            )  # fmt: skip
            row["measured"][variant] = _measured(result)
        show_progress("")
        show(measured_text(row))
    texts = notes(rows, machine)
    show("", *(textwrap.fill(t, WIDTH, initial_indent="* ", subsequent_indent="  ") for t in texts))

    if arguments.json is not None:
        setting = dataclasses.asdict(
            cost.Setting(height=arguments.size, width=arguments.size, kept=CHANNELS // 2)
        )
        facts = {
            "machine": machine, "dtype": "float32", "setting": setting,
            "rows": rows, "notes": texts,
        }  # fmt: skip
        text = json.dumps(facts, indent=2) + "\n"
        if arguments.json == "-":
            sys.stdout.write(text)
        else:
            Path(arguments.json).write_text(text)
    return 0
