"""What needs an NVIDIA GPU, in one command: `make gpu`, or `python -m benchmarks.gpu`.

The parts are the card's ceilings, the tests on the device, and each op's and each whole step's
time and peak memory. Every part runs in a process of its own under a time limit and leaves its
rows in a file of its own, so that a failure in one does not lose the others; the result is
`benchmarks/results/<gpu>.json` and a table in Markdown beside it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mghf_fast.backends import use_backend
from mghf_fast.measure import Measurement, machine_facts

from . import cases, report, results
from .cases import Case, Shape

SIZES = (Shape(1, 512), Shape(1, 256), Shape(1, 1024), Shape(1, 2048))  # the paper's first
TRAINING = (Shape(4, 512), Shape(16, 256), Shape(32, 64))
PAPER = Shape(1, 512)
WHOLE = ("mghf_c", "mghf_n")
OPS = (
    *WHOLE,
    "coupling",
    "content_style",
    "sinkhorn",
    "monce",
    "patches",
    "gram",
    "entropy",
    "dec",
)
TEST_LIMIT, OP_LIMIT, CEILING_LIMIT = 240.0, 120.0, 60.0  # seconds
BUDGET = 0.25  # seconds of timed calls for a part of a row
COMPILED_OPS = ("coupling", "content_style", "gram", "patches", "entropy", "dec")
"""Ops whose reference compiles in seconds; the Sinkhorn of 50 unrolled iterations does not."""


# ---- measuring, in the child ----


def time_on_device(function: Callable[[], object], budget: float = BUDGET) -> Measurement:
    """Device time of every call between two events, and the peak of allocated memory of a call
    above its inputs. Between two calls the L2 cache is overwritten."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before
    rounds = max(3, min(100, int(budget / max(once, 1e-6))))
    flush = torch.empty(64 << 20, dtype=torch.int32)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return Measurement(tuple(a.elapsed_time(b) / 1e3 for a, b in events), peak)


def ceilings() -> dict[str, float]:
    """The card's memory bandwidth and matrix rates, measured."""

    def best(function: Callable[[], object]) -> float:
        return min(time_on_device(function).seconds)

    source, target = torch.randn(2, 1 << 29)
    found = {"copy_tb_per_s": 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e12}
    n = 8192
    for name, dtype, tf32 in (
        ("bfloat16_tflop_per_s", torch.bfloat16, False),
        ("tf32_tflop_per_s", torch.float32, True),
        ("float32_tflop_per_s", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = torch.randn(2, n, n).to(dtype)
        found[name] = 2 * n**3 / best(functools.partial(torch.matmul, a, b)) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def shapes_of(case: Case, quick: bool) -> list[Shape]:
    if quick:
        return [PAPER]
    shapes = [*SIZES, *(TRAINING if case.op in WHOLE else ())]
    return [*shapes, *(s for s in case.shapes if s not in (*cases.SIZES, cases.TRAINING))]


def forms_of(case: Case, shape: Shape, quick: bool) -> list[str]:
    """Those that run at this shape; compiled ones at the paper's, where compiling is paid once."""
    compiled = shape == PAPER and not quick and case.op in (*WHOLE, *COMPILED_OPS)
    return [
        name
        for name, form in case.forms.items()
        if (compiled or not form.compiled) and (form.kind != "peer" or shape == PAPER)
    ]


def measure_op(op: str, quick: bool, write: Callable[[results.Row], None]) -> None:
    """Every row of one op on the current device, ours first at every size."""
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        importlib.import_module(f"benchmarks.{path.stem}")
    case = cases.CASES[op]
    for shape in shapes_of(case, quick):
        for form in forms_of(case, shape, quick):
            how, found = case.forms[form], {}
            for part in case.parts_of(form):
                torch.cuda.empty_cache()
                try:
                    function = how.make()
                    step = case.step(torch.compile(function) if how.compiled else function,
                                     shape, form, part)  # fmt: skip
                    found[part] = time_on_device(step)
                except Exception as error:
                    first = (str(error).strip().splitlines() or [""])[0]
                    memory = isinstance(error, torch.cuda.OutOfMemoryError)
                    text = "out of memory" if memory else f"{type(error).__name__}: {first[:160]}"
                    found[part] = Measurement(failure=text)
                step = function = None  # type: ignore[assignment]
            write(results.new_row(op, shape, form, torch.get_num_threads(), found))


def child(part: str, out: Path, quick: bool) -> None:
    torch.set_default_device("cuda")

    def write(row: dict[str, Any]) -> None:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    if part == "ceilings":
        write(ceilings())
        return
    with use_backend("triton"):
        measure_op(part, quick, write)


# ---- the parent ----


def run_part(
    command: Sequence[str], log: Path, limit: float, environment: dict[str, str] | None = None
) -> str:
    """Runs a command and says how it ended: "ok", or why not."""
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, timeout=limit,
                env={**os.environ, **(environment or {})},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"over {limit:.0f} s"
    last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
    return "ok" if code == 0 else f"exit code {code}: {last[:200]}"


def run_tests(folder: Path, quick: bool) -> dict[str, str]:
    """The suite on the device; without pytest it cannot run, and that is said."""
    if importlib.util.find_spec("pytest") is None:
        return {"tests": "pytest is not installed"}
    log = folder / "tests.log"
    selection = ["-k", "triton"] if quick else []
    command = [sys.executable, "-m", "pytest", "-q", "--device", "cuda", "-p", "no:cacheprovider"]
    ended = run_part([*command, "tests", *selection], log, TEST_LIMIT)
    summary = re.findall(r"\d+ (?:passed|failed|error|skipped)[^\n]*", log.read_text())
    return {"tests": f"{ended}: {summary[-1]}" if summary else ended}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines; the last may be cut short."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def markdown(run: results.Run) -> str:
    """The run as a table: an op and shape a line."""
    keys = dict.fromkeys((row["op"], row["shape"]) for row in run["rows"])
    lines = []
    for op, shape in keys:
        rows, part = results.select(run, op=op, shape=shape), report.part_of(op)
        ours = results.fastest([r for r in rows if r["kind"] == "ours"], part)
        eager = results.fastest([r for r in rows if r["kind"] == "eager"], part)
        compiled = results.fastest([r for r in rows if r["kind"] == "compile"], part)
        lines.append(
            [report.TITLES.get(op, op), shape.replace("x", " x ")]
            + [report.cell(row, part) for row in (eager, compiled, ours)]
            + [
                f"{report.speed(eager, ours, part)}, {report.speed(compiled, ours, part)}".strip(
                    ", "
                )
            ]
        )
    head = ["", "images", "best eager", "torch.compile", "mghf_fast", "faster than each"]
    facts, c = run["machine"], run["ceilings"]
    rates = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in c.items())
    state = "; ".join(f"{part}: {text}" for part, text in run["parts"].items() if text != "ok")
    return (
        f"{report.table(head, lines)}\n{facts['gpu']}, torch {facts['torch']}; ceilings, "
        f"measured in the same run: {rates or 'none'}.\n{state and f'Not complete: {state}.'}\n"
    )


def gpu_name() -> str:
    words = re.sub(r"nvidia|geforce|tesla|quadro", "", torch.cuda.get_device_name().lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="512 x 512 alone, nothing compiled")
    parser.add_argument("--only", nargs="*", choices=("ceilings", "tests", *OPS), help="parts")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the result")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part is not None:
        child(options.part, options.file, options.quick)
        return 0
    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device here", file=sys.stderr)
        return 1
    folder = report.ROOT / "build" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = options.only or ["ceilings", "tests", *OPS]
    run: dict[str, Any] = {"machine": machine_facts() | {"name": gpu_name()}, "ceilings": {},
                           "parts": {}, "rows": []}  # fmt: skip
    quick = ["--quick"] if options.quick else []
    for part in wanted:
        begun = time.perf_counter()
        if part == "tests":
            run["parts"] |= run_tests(folder, options.quick)
        else:
            file = folder / f"{part}.jsonl"
            file.unlink(missing_ok=True)
            command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--file", str(file)]
            limit = CEILING_LIMIT if part == "ceilings" else OP_LIMIT
            run["parts"][part] = run_part([*command, *quick], folder / f"{part}.log", limit)
            rows = read_rows(file)
            if part == "ceilings":
                run["ceilings"] = rows[0] if rows else {}
            else:
                run["rows"] += rows
        print(f"{part}: {run['parts'][part]} ({time.perf_counter() - begun:.0f} s)", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{run['machine']['name']}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    text = markdown(run)
    path.with_suffix(".md").write_text(text)
    print(text)
    return 0 if all(text.startswith("ok") for text in run["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
