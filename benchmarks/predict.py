"""Predicts how long the CUDA kernels of a step take on an H200, and says how far off it may be.

    python -m benchmarks.predict [--kernels "mghf_c paper 1x3x512x512"]

Counted, by counting.py: what a warp of each launch executes, and its cycles alone on the GPU.
Fixed: clock and bandwidth as measured on the H200, the rates of its units as published, and
`LAUNCH_SECONDS`. Fitted to the first measurements (results/h200.json, those of CUDA kernels): the
two `Fitted` numbers. The model:

    seconds of a launch = LAUNCH_SECONDS + cold code
                        + max(bytes / bandwidth, rounds * (alone + busiest) / clock)

``alone`` is how long the slowest warp of a block takes by itself, ``busiest`` how long the busiest
unit of a multiprocessor needs for all warps that it holds. They are added: the few warps that these
kernels have hide little of one another's latencies, and the larger of the two reproduces the
measurements no better. What a launch finds in L2 or as code in a cache is not modelled, and neither
are bank conflicts.

A measurement shorter than `HOST_SECONDS` is mostly the host's time and is not used for steps of
forward and backward.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .counting import Counts, Row, digest, load, sources_of, write

FOLDER = Path(__file__).resolve().parent
MEASURED, TODAY = FOLDER / "counts_h200.json", FOLDER / "counts.json"
RESULTS = FOLDER / "results" / "h200.json"

MULTIPROCESSORS, CLOCK = 132, 1.98e9
BANDWIDTH = 4.275e12
LAUNCH_SECONDS = 3e-6
HOST_SECONDS = 1e-3
CYCLES = {"fp32": 1.0, "integer": 2.0, "multiply": 2.0, "special": 8.0, "double": 2.0}
"""An instruction's, on a quarter of a multiprocessor: 32 lanes, 16, 16, 4 and 16."""
SHARED_BYTES_PER_CYCLE = 128
ATOMIC_REPEATS = 4
"""How often an atomic access of a warp to shared memory is repeated, since threads meet."""
LINE_BYTES, INSTRUCTION_BYTES = 128, 16


class Fitted(NamedTuple):
    """``far``: the share of global loads' latency that is memory's and not L2's. ``cold``: cycles
    until a line of instructions that is executed for the first time has come from memory."""

    far: float
    cold: float


GRID = tuple(Fitted(far / 20, cold) for far in range(21) for cold in range(0, 1025, 25))


def busiest(counts: Counts, blocks: float) -> float:
    """Cycles of the busiest unit of a multiprocessor that holds so many blocks."""
    warps = blocks * counts.warps
    quarter = warps / 4
    moved = counts.bytes.get
    shared = moved("shared load", 0) + moved("shared store", 0)
    shared += ATOMIC_REPEATS * moved("shared atomic", 0)
    of_units = (counts.units.get(unit, 0) * cycles for unit, cycles in CYCLES.items())
    return max(
        counts.issued * quarter,
        counts.tensor_cycles * quarter,
        max(of_units) * quarter,
        (shared / SHARED_BYTES_PER_CYCLE + counts.units.get("shuffle", 0)) * warps,
    )


GROUPS = 8
"""Groups of multiprocessors; the blocks of a cluster run in one of them."""


def rounds(counts: Counts) -> tuple[float, float]:
    """How often a multiprocessor is filled with blocks, and with how many. Blocks end one by one,
    so that with many rounds the last is half full on average."""
    each = min(counts.blocks_of_sm, math.ceil(counts.blocks / MULTIPROCESSORS))
    cluster, used = counts.blocks_of_cluster, MULTIPROCESSORS
    if cluster > 1:
        used = GROUPS * (MULTIPROCESSORS // GROUPS // cluster * cluster)
    times = counts.blocks / (used * each)
    return (math.ceil(times) if times <= 3 else times + 0.5), each


class Parts(NamedTuple):
    """The parts of a launch's time that do not depend on the fitted numbers: rounds, cycles,
    seconds of moving, and lines of code."""

    times: float
    near: float
    far: float
    busiest: float
    moving: float
    lines: float

    @staticmethod
    def of(counts: Counts) -> Parts:
        times, each = rounds(counts)
        a_warp = sum(v for kind, v in counts.bytes.items() if kind.startswith("global"))
        moving = a_warp * counts.warps * counts.blocks / BANDWIDTH
        lines = counts.reached * INSTRUCTION_BYTES / LINE_BYTES
        return Parts(times, counts.near, counts.far, busiest(counts, each), moving, lines)

    def alone(self, fitted: Fitted) -> float:
        return self.near + fitted.far * (self.far - self.near)

    def seconds(self, fitted: Fitted) -> float:
        computing = self.times * (self.alone(fitted) + self.busiest) / CLOCK
        return LAUNCH_SECONDS + self.lines * fitted.cold / CLOCK + max(computing, self.moving)


def seconds(counts: Counts, fitted: Fitted) -> float:
    """What a launch takes."""
    return Parts.of(counts).seconds(fitted)


def total(row: Row, fitted: Fitted) -> float:
    return sum(seconds(c, fitted) for c in row.launches) + row.pytorch * LAUNCH_SECONDS


class Measurement(NamedTuple):
    name: str
    row: Row
    seconds: float


def measurements(counts: Mapping[str, Row], results: Path = RESULTS) -> list[Measurement]:
    """The rows of the CUDA kernels, "forward" and "step" of each, by the shortest call."""
    found = []
    for row in json.loads(results.read_text())["rows"]:
        if row["kind"] != "forced" or "CUDA C++" not in row["form"]:
            continue
        name = f"{row['op']} {row['shape'].rsplit('x', 1)[1]} {row['dtype']}"
        forward, backward = counts[f"{name} forward"], counts[f"{name} backward"]
        both = Row(forward.launches + backward.launches)
        found.append(Measurement(f"{name} forward", forward, row["parts"]["forward"]["min_s"]))
        if row["parts"]["step"]["min_s"] >= HOST_SECONDS:
            found.append(Measurement(f"{name} step", both, row["parts"]["step"]["min_s"]))
    return found


def spread(ratios: Iterable[float]) -> float:
    """Root mean square of the logarithms."""
    logs = [math.log(ratio) ** 2 for ratio in ratios]
    return math.sqrt(sum(logs) / len(logs))


@dataclass(frozen=True)
class Calibration:
    """``within``, ``apart``, ``apart_by_op``: predicted / measured of each row, by numbers that are
    fitted to all rows, to all others, and to those of other ops."""

    fitted: Fitted
    within: dict[str, float]
    apart: dict[str, float]
    apart_by_op: dict[str, float]

    @property
    def error(self) -> float:
        """The error for a kernel that was not measured: a logarithm's root mean square."""
        return spread(self.apart_by_op.values())


def calibrate(rows: Sequence[Measurement]) -> Calibration:
    """Fits by the least spread of predicted / measured."""
    parts = [[Parts.of(counts) for counts in m.row.launches] for m in rows]
    ratios = {
        fitted: [
            sum(p.seconds(fitted) for p in launches) / m.seconds
            for m, launches in zip(rows, parts, strict=True)
        ]
        for fitted in GRID
    }
    ops = [m.name.split()[0] for m in rows]

    def fit(used: Sequence[bool]) -> Fitted:
        return min(GRID, key=lambda f: spread(itertools.compress(ratios[f], used)))

    fitted = fit([True] * len(rows))
    apart = [ratios[fit([r is not m for r in rows])][k] for k, m in enumerate(rows)]
    others = {op: fit([each != op for each in ops]) for op in set(ops)}
    by_op = [ratios[others[op]][k] for k, op in enumerate(ops)]
    names = [m.name for m in rows]
    found = (dict(zip(names, column, strict=True)) for column in (ratios[fitted], apart, by_op))
    return Calibration(fitted, *found)


TWO_SIDED = 1.645
"""Standard deviations of a normal distribution on either side that hold 90 %."""


def interval(predicted: float, error: float) -> tuple[float, float]:
    """That holds 90 % of measurements, as far as their errors are those of the calibration."""
    factor = math.exp(TWO_SIDED * error)
    return predicted / factor, predicted * factor


def table(rows: Sequence[Measurement], calibration: Calibration) -> Iterator[str]:
    yield "CUDA kernels measured on the H200 on 2026-11-26: ms, and the model's time / measured,"
    yield "fitted to all rows, to all others, and to those of other ops"
    for m in rows:
        ratios = (calibration.within, calibration.apart, calibration.apart_by_op)
        shown = "".join(f"{ratio[m.name]:8.2f}" for ratio in ratios)
        yield f"{m.name:34}{1e3 * m.seconds:9.3f}{shown}"
    for name in ("within", "apart", "apart_by_op"):
        error = spread(getattr(calibration, name).values())
        yield f"one standard deviation, {name}: a factor of {math.exp(error):.2f}"
    yield f"fitted: far {calibration.fitted.far:.2f}, cold {calibration.fitted.cold:.0f} cycles"


def launches_of(row: Row, fitted: Fitted) -> Iterator[str]:
    yield f"{'predicted, of a launch':24}{'blocks':>8}{'us':>8}{'alone':>9}{'busiest':>9}"
    for counts in row.launches:
        parts = Parts.of(counts)
        cycles = (parts.alone(fitted), parts.busiest)
        shown = "".join(f"{1e6 * parts.times * each / CLOCK:9.1f}" for each in cycles)
        yield f"{counts.name:24}{counts.blocks:8}{1e6 * parts.seconds(fitted):8.1f}{shown}"


def recount(host_modules: Path) -> str | None:
    """Counts today's kernels again into `TODAY`; returns what is missing for that, or None."""
    from . import launches, recording  # with torch, which the predictions need not

    nvcc, nvdisasm = recording.tool("nvcc"), recording.tool("nvdisasm")
    if nvcc is None or nvdisasm is None:
        return "--count needs nvcc and nvdisasm, and at least one of them is not here"
    module = launches.host_module(host_modules)
    if module is None:
        return (
            f"--host-modules is {host_modules}, which has no host build of the CUDA kernels; "
            "`make cuda-host` makes it"
        )
    write(TODAY, recording.steps(module, recording.compiled(nvcc, nvdisasm)), digest())
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict")
    parser.add_argument("--kernels", metavar="STEP", help="list a step's launches")
    parser.add_argument(
        "--count", action="store_true", help=f"count today's kernels anew, into {TODAY.name}"
    )
    parser.add_argument(
        "--host-modules",
        type=Path,
        default=Path("build/cuda-host"),
        help="folder of the CUDA kernels' host build, for --count",
    )
    options = parser.parse_args(arguments)
    if options.count and (missing := recount(options.host_modules)) is not None:
        print(missing, file=sys.stderr)
        return 2
    rows, steps = measurements(load(MEASURED)), load(TODAY)
    if options.kernels is not None and options.kernels not in steps:
        print(f"--kernels is {options.kernels!r}; allowed are {', '.join(steps)}", file=sys.stderr)
        return 2
    calibration = calibrate(rows)
    if options.kernels is not None:
        print(*launches_of(steps[options.kernels], calibration.fitted), sep="\n")
        return 0
    print(*table(rows, calibration), sep="\n")
    if sources_of(TODAY) != digest():
        print("\nThe sources have changed since their kernels were counted: --count counts anew.")
    print("\npredicted, no GPU has run it: ms of a step, and the interval of 90 %")
    for name, row in steps.items():
        predicted = total(row, calibration.fitted)
        low, high = interval(predicted, calibration.error)
        print(f"{name:45}{1e3 * predicted:8.2f}{1e3 * low:9.2f} to {1e3 * high:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
