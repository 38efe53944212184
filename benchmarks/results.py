"""What a run writes, benchmarks/results/<machine>.json with one row a line, and comparing two runs.

A row is one form of one op at one shape. Its parts have the median, the shortest time, the spread
(inter-quartile range over median) and the peak of resident memory above the inputs, or say why they
have not; `backward` is the step less the forward. A ratio is always of two rows of the same run.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mghf_fast import native
from mghf_fast.backends import current_backend
from mghf_fast.commands.machine import cpu_model, machine_facts
from mghf_fast.commands.table5.measure import MIB, Measurement
from mghf_fast.ops import OPS

from .cases import CASES, Shape, package_version

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1.15  # how much slower against its baseline a row may have become

Row = dict[str, Any]
Run = dict[str, Any]


def machine_name(cpu: str, cores: int, threads: int, family: int = 0, model: int = 0) -> str:
    """A short name such as "epyc-zen5-2c": processor (with the architecture, which AMD's names do
    not tell), cores, and the threads if there are not as many."""
    text = re.sub(r"\(.*?\)|@.*|\b\d+-core\b|\b(amd|intel|cpu|processor)\b", " ", cpu.lower())
    if "amd" in cpu.lower():
        zen4 = 0x10 <= model < 0x20 or 0x60 <= model < 0x80 or model >= 0xA0
        zen = {23: 1 + (model >= 0x30), 25: 3 + zen4, 26: 5}.get(family)
        text += f" zen{zen}" if zen else ""
    return f"{slug(text) or 'cpu'}-{cores}c" + (f"-{threads}t" if threads != cores else "")


def slug(text: str) -> str:
    """As part of a file's name: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def this_machine(threads: int) -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    family, model = (
        int(found[1]) if (found := re.search(rf"^{key}\s*: (\d+)$", text, re.M)) else 0
        for key in ("cpu family", "model")
    )
    return machine_name(cpu_model(), machine_facts(threads)["cores"], threads, family, model)


def new_run(machine: str, threads: int, rows: Sequence[Row]) -> Run:
    compiler = native.build_facts().get("compiler")
    facts = machine_facts(threads) | {"name": machine, "compiler": compiler}
    return {"machine": facts, "rows": list(rows)}


def facts_of_row(op: str, shape: Shape, form: str, threads: int) -> Row:
    """What is to be known of a row beside its parts."""
    case, facts = CASES[op], machine_facts(threads)
    how = case.forms[form]
    row: Row = {"op": op, "shape": str(shape), "form": form, "versions": {}}
    row["device"] = torch.get_default_device().type
    row |= {key: getattr(how, key) for key in ("kind", "dtype", "channels_last")}
    row |= {key: facts[key] for key in ("threads", "load")}
    row["versions"] |= {key: facts[key] for key in ("torch", "mghf_fast")}
    if how.package is not None:
        row["versions"][how.package] = package_version(how.package)
    if how.kind == "ours":
        forced = current_backend()
        row["backends"] = {
            name: OPS[name].preferred() if forced == "auto" else forced
            for name in case.ops or (op,)
        }
    return row


def new_row(
    op: str, shape: Shape, form: str, threads: int, found: Mapping[str, Measurement]
) -> Row:
    row = facts_of_row(op, shape, form, threads)
    row["parts"] = {part: part_facts(measurement) for part, measurement in found.items()}
    step, forward = value(row, "step"), value(row, "forward")
    # Noise can make the difference of two medians negative.
    if step and forward and step >= forward:
        row["parts"]["backward"] = {"median_s": _round(step - forward)}
    return row


def part_facts(found: Measurement) -> dict[str, Any]:
    if found.failure is not None:
        return {"failure": found.failure}
    seconds = found.seconds if len(found.seconds) > 1 else found.seconds * 2
    low, _, high = statistics.quantiles(seconds, method="inclusive")
    return {
        "median_s": _round(found.median),
        "min_s": _round(min(found.seconds)),
        "spread": _round((high - low) / found.median, 2),
        "rounds": len(found.seconds),
        "peak_mib": mib(found.peak_bytes),
    }


def mib(count: int | None) -> float | None:
    return None if count is None else round(count / MIB, 1)


def _round(number: float, digits: int = 4) -> float:
    return float(f"{number:.{digits}g}")


# ---- files ----


def to_json(run: Run) -> str:
    def order(row: Row) -> tuple[Any, ...]:
        return row["op"], [int(n) for n in row["shape"].split("x")], row["form"]

    machine = json.dumps(run["machine"], sort_keys=True)
    rows = ",\n".join(json.dumps(row, sort_keys=True) for row in sorted(run["rows"], key=order))
    return f'{{"machine": {machine},\n"rows": [\n{rows}\n]}}\n'


def load(machine: str) -> Run | None:
    """The committed result of a machine, if there is one."""
    path = RESULTS / f"{machine}.json"
    return json.loads(path.read_text()) if path.exists() else None


def merge(committed: Run, run: Run) -> Run:
    """``run``, with the committed rows of every op and shape that it did not measure."""
    measured = {(row["op"], row["shape"]) for row in run["rows"]}
    kept = [row for row in committed["rows"] if (row["op"], row["shape"]) not in measured]
    return run | {"rows": kept + run["rows"]}


# ---- reading ----


def select(run: Run, **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in run["rows"] if all(row[key] == wanted[key] for key in wanted)]


def value(row: Row | None, part: str, key: str = "median_s") -> float | None:
    return None if row is None else row["parts"].get(part, {}).get(key)


def fastest(rows: Sequence[Row], part: str) -> Row | None:
    """The row with the smallest median; one that failed if all did."""
    return min(rows, key=lambda row: value(row, part) or math.inf, default=None)


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """p of the least-squares fit y = a x^p; ``None`` for fewer than three points."""
    if len(points) < 3:
        return None
    logarithms = [[math.log(v) for v in axis] for axis in zip(*points, strict=True)]
    return statistics.linear_regression(*logarithms).slope


# ---- comparing ----


class Comparison(NamedTuple):
    """``slower``: (op, shape, form, baseline form); ``failures``: a sentence for each of them and
    for whatever else fails; ``notes``: what is to be known besides."""

    slower: list[tuple[str, str, str, str]]
    failures: list[str]
    notes: list[str]


def compare(run: Run, committed: Run | None, partial: bool = False) -> Comparison:
    """Whether our rows kept their distance to their baselines.

    The baseline of a row is the fastest form of the same op and shape that is not ours and ran in
    both. Shortest times are compared, which repeat best. A ``partial`` run need not have all rows.
    """
    result = Comparison([], [], [])
    if committed is None:
        result.failures.append(f"there is no committed result of {run['machine']['name']}")
        return result
    for fact in ("cpu", "cores", "threads"):
        if (now := run["machine"][fact]) != (was := committed["machine"][fact]):
            text = f"another machine: {fact} is {now!r}, in the committed result {was!r}"
            result.failures.append(text)
    rows = {_key(row): row for row in run["rows"]}
    left_out = 0
    for old in select(committed, kind="ours"):
        key, new = _key(old), rows.get(_key(old))
        for part in old["parts"]:
            if (before := value(old, part, "min_s")) is None:
                continue
            label = f"{', '.join(key)}, {part}"
            if new is None:
                left_out += 1
                if not partial:
                    result.failures.append(f"{label}: not in this run")
                continue
            if (after := value(new, part, "min_s")) is None:
                reason = new["parts"].get(part, {}).get("failure", "not measured")
                result.failures.append(f"{label}: {reason}")
                continue
            baselines = [
                (a, b, rival["form"])
                for rival in select(committed, op=old["op"], shape=old["shape"])
                if rival["kind"] != "ours"
                and (a := value(rival, part, "min_s"))
                and (b := value(rows.get(_key(rival)), part, "min_s"))
            ]
            if not baselines:
                result.notes.append(f"{label}: not compared, no baseline ran in both")
                continue
            a, b, baseline = min(baselines)
            if (slowdown := (after / b) / (before / a)) > TOLERANCE:
                result.slower.append((*key, baseline))
                text = f"{label}: {slowdown:.2f} times as slow against {baseline} as it was"
                result.failures.append(text)
    if left_out and partial:
        result.notes.append(f"{left_out} figures of the committed result are not in this run")
    known = {_key(row) for row in committed["rows"]}
    result.notes.extend(
        f"{', '.join(key)}: new"
        for key, row in rows.items()
        if key not in known and row["kind"] == "ours"
    )
    return result


def _key(row: Row) -> tuple[str, str, str]:
    return row["op"], row["shape"], row["form"]
