"""Everything that needs an NVIDIA GPU, in one command: `make gpu`, or `python -m benchmarks.gpu`.

gpu_plan.py lists its parts, their order and their seconds. Each runs in its own processes
(gpu_parts.py, gpu_ways.py, gpu_tests.py) under a time limit, and all of them under another: a part
that fails or takes too long does not lose the others, and results are written every few seconds,
every row with its time and commit. The result is `benchmarks/results/<gpu>.json`, and a table in
Markdown beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mghf_fast.commands.machine import machine_facts
from mghf_fast.precision import product_precision

from . import (
    floors,
    gpu_plan,
    gpu_processes,
    gpu_profile,
    gpu_setup,
    gpu_tables,
    gpu_tests,
    gpu_variants,
    report,
    results,
)
from .gpu_processes import read_rows, run_together, without_folders
from .text import TITLES

FOLDER = report.ROOT / "build" / "gpu"


PATIENCE = {"newer": 25.0, "variants": 90.0}  # seconds for a way; Triton's are compiled first


def part_command(part: str, file: Path, quick: bool, older: Sequence[str] = ()) -> list[str]:
    """The command of a part's process; ``older``: ops whose older CUDA kernels it is to use."""
    if part in PATIENCE:
        command = [sys.executable, "-m", "benchmarks.gpu_ways", str(file)]
        return [*command, "--patience", str(PATIENCE[part])]
    options = ["--quick"] if quick else []
    options += ["--older", *older] if older else []
    return [sys.executable, "-m", "benchmarks.gpu_parts", part, str(file), *options]


# ---- the state of the card ----

REASONS = {
    0x1: "idle", 0x2: "application clocks", 0x4: "software power cap", 0x8: "hardware slowdown",
    0x10: "sync boost", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
    0x80: "hardware power brake", 0x100: "display clocks",
}  # fmt: skip
QUERY = {
    "driver": "driver_version", "sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem",
    "most_sm_mhz": "clocks.max.sm", "power_w": "power.draw", "power_limit_w": "power.limit",
    "celsius": "temperature.gpu",
}  # fmt: skip
REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


def nvidia_smi(fields: Sequence[str]) -> list[str] | None:
    """The values of the current card; ``None`` if the program or a field is missing."""
    card = []
    if torch.cuda.is_available():
        card = ["--id", f"GPU-{torch.cuda.get_device_properties(0).uuid}"]
    query = ["nvidia-smi", *card, f"--query-gpu={','.join(fields)}"]
    try:
        done = subprocess.run(
            [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return [v.strip() for v in lines[0].split(",")] if done.returncode == 0 and lines else None


def state() -> dict[str, Any]:
    """Driver, clocks, power, temperature, and what limits the clocks; changes nothing."""
    found: dict[str, Any] = dict(zip(QUERY, nvidia_smi(list(QUERY.values())) or [], strict=False))
    for field in REASON_FIELDS:
        if reasons := nvidia_smi([field]):
            with contextlib.suppress(ValueError):
                mask = int(reasons[0], 16)
                found["held_down_by"] = [text for bit, text in REASONS.items() if mask & bit]
                break
    return found


def gpu_name() -> str:
    words = re.sub(r"nvidia|geforce|tesla|quadro", "", torch.cuda.get_device_name().lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def facts() -> dict[str, Any]:
    """Facts of the machine, and PyTorch's settings for the precision of eager convolutions."""
    return machine_facts() | {
        "name": gpu_name(),
        "triton": gpu_setup.version_of("triton", "pytorch-triton"),
        "cuda": torch.version.cuda,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "precision": product_precision("auto", "cuda"),  # of our own
    }


# ---- the command ----


def take(run: dict[str, Any], part: str, rows: list[dict[str, Any]]) -> None:
    """Puts a part's rows into the run, with their time and commit."""
    dated = {"taken": now(), "commit": run["commit"]}
    if part == "ceilings":
        run["ceilings"] = rows[0] if rows else {}
    elif part in ("values", "table5", "profile", "flash"):
        run[part] = [row | dated for row in rows]
        if part == "values" and not all(row["passed"] for row in rows):
            wrong = ", ".join(
                f"{r['op']} {r['part']} ({r['form']})" for r in rows if not r["passed"]
            )
            run["parts"][part] = f"wrong: {wrong}"
    else:
        run["rows"] += [row | dated for row in rows]
    for row in run["rows"]:
        floors.annotate(row, run["ceilings"])
    for pair in run["variants"]:
        floors.annotate_pair(pair, run["ceilings"])


def take_outcome(run: dict[str, Any], part: str, outcome: gpu_tests.Outcome) -> None:
    run["parts"][part] = outcome.how
    run["sanitizer" if part == "sanitizer" else "tests"] |= outcome.summaries
    run["failures"] += outcome.failures


def run_part(
    run: dict[str, Any],
    part: str,
    folder: Path,
    limit: float,
    quick: bool,
    pairs: Sequence[dict[str, Any]],
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Runs one part and puts its result into the run. Newer kernels that failed in the part
    `newer` are not used in the parts after it."""
    older = gpu_variants.failing(run["variants"])
    file = folder / f"{part}.jsonl"
    file.unlink(missing_ok=True)
    dated = {"taken": now(), "commit": run["commit"]}
    if part == "races" or part.startswith("tests-"):
        outcome = gpu_tests.run_tests(part.removeprefix("tests-"), folder, limit)
        take_outcome(run, part, outcome)
    elif part == "sanitizer":
        command = [str(word) for word in part_command("values", Path("FILE"), False, older)]
        take_outcome(run, part, gpu_tests.run_sanitizer(command, folder, limit))
    elif part in PATIENCE:
        compared = pairs_of(part, pairs)
        run["parts"][part], rows = run_variants(compared, folder, limit, part, meanwhile)
        run["variants"] += [row | dated for row in rows]
        for pair in run["variants"]:
            floors.annotate_pair(pair, run["ceilings"])
    elif part == "counters":
        command = part_command("counters", file, quick, older)
        how, rows = gpu_profile.run_counters(run["profile"], command, folder, limit)
        run["parts"][part], run["counters"] = how, [row | dated for row in rows]
    else:
        command = part_command(part, file, quick, older)
        run["parts"] |= run_together({part: command}, folder, limit, meanwhile=meanwhile)
        take(run, part, read_rows(file))


def pairs_of(part: str, pairs: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    return gpu_variants.newer_pairs() if part == "newer" else pairs


def run_variants(
    pairs: Sequence[dict[str, Any]],
    folder: Path,
    limit: float,
    part: str = "variants",
    meanwhile: Callable[[], None] | None = None,
) -> tuple[str, list[dict[str, Any]]]:
    """Runs a process for each environment, all in turn, twice; another one for the ways that are
    left after one that ended the process."""
    (wanted := folder / f"{part}-pairs.json").write_text(json.dumps(pairs))
    file, begun = folder / f"{part}.jsonl", time.monotonic()
    problems: list[str] = []
    turns = gpu_variants.ROUNDS * gpu_variants.environments(pairs)
    for turn, environment in enumerate(turns):
        left = limit - (time.monotonic() - begun)
        if left < gpu_plan.LEAST:
            problems.append(f"{len(turns) - turn} of {len(turns)} turns were left out")
            break
        # Every turn gets its share of the time, so that both ways of every pair are measured.
        end = time.monotonic() + left / (len(turns) - turn)
        ways, done = gpu_variants.ways_of(pairs, environment), 0
        while done < len(ways):
            command = [
                *part_command(part, file, False), "--pairs", str(wanted),
                "--environment", json.dumps(environment), "--begin", str(done),
            ]  # fmt: skip
            name, before = f"{part}-{turn}-{done}", len(read_rows(file))
            share = end - time.monotonic()
            (how,) = run_together({name: command}, folder, share, environment, meanwhile).values()
            if how == "ok":
                break
            problems.append(how)
            if not (more := len(read_rows(file)) - before):  # the process could not tell
                append_row(file, ways[done], how)
            done += max(more, 1)
            if end - time.monotonic() < gpu_plan.LEAST or how.startswith("over"):
                break
    rows = read_rows(file)
    if failed := sum("failure" in row["part"] for row in rows):
        problems.append(f"{failed} of {len(rows)} measurements failed")
    return "; ".join(dict.fromkeys(problems)) or "ok", gpu_variants.joined(rows, pairs)


def append_row(file: Path, way: tuple[int, str], failure: str) -> None:
    row = {"pair": way[0], "way": way[1], "part": {"failure": failure}}
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def under_way(
    run: Mapping[str, Any], part: str, folder: Path, pairs: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The run with what a part that has not ended has measured so far."""
    rows = read_rows(folder / f"{part}.jsonl")
    found: dict[str, Any] = {
        key: value.copy() if isinstance(value, list | dict) else value for key, value in run.items()
    }
    if part in PATIENCE:
        dated = {"taken": now(), "commit": run["commit"]}
        compared = gpu_variants.joined(rows, pairs_of(part, pairs))
        found["variants"] += [row | dated for row in compared]
    elif not part.startswith("tests-") and part not in ("races", "sanitizer", "counters"):
        take(found, part, rows)
    found["parts"][part] = "did not end"
    return found


def save_progress(
    run: Mapping[str, Any],
    part: str,
    folder: Path,
    pairs: Sequence[dict[str, Any]],
    save: Callable[[dict[str, Any]], None],
) -> None:
    file = folder / f"{part}.jsonl"
    if file.exists() and time.time() - file.stat().st_mtime < 2 * gpu_processes.POLL:
        save(under_way(run, part, folder, pairs))


def measure(
    parts: Sequence[gpu_plan.Part],
    all_time: float,
    quick: bool,
    folder: Path,
    save: Callable[[dict[str, Any]], None],
    pairs: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Runs all parts, and saves what there is every few seconds, so that a run that is ended from
    outside leaves its rows."""
    run: dict[str, Any] = {
        "machine": facts(), "quick": quick, "taken": now(), "commit": gpu_setup.commit(),
        "ceilings": {}, "state": {"before": state()}, "parts": {}, "seconds": {}, "tests": {},
        "failures": [], "sanitizer": {}, "profile": [], "variants": [], "flash": [],
        "counters": [], "values": [], "table5": [], "rows": [],
    }  # fmt: skip
    start = time.monotonic()
    for part in parts:
        begun = time.monotonic()
        left = all_time - (begun - start)
        if left < gpu_plan.LEAST:
            run["parts"][part.name] = f"left out: all {all_time:.0f} s were over"
        else:
            progress = functools.partial(save_progress, run, part.name, folder, pairs, save)
            run_part(run, part.name, folder, min(part.seconds, left), quick, pairs, progress)
        run["seconds"][part.name] = round(time.monotonic() - begun, 1)
        run["state"]["after " + part.name] = state()
        save(run)
        text = f"{part.name}: {run['parts'][part.name]} ({run['seconds'][part.name]:.0f} s)"
        print(text, flush=True)
    return run


# ---- rows from a committed result ----


def carried(run: dict[str, Any], committed: dict[str, Any] | None) -> dict[str, Any]:
    """The run, completed by rows of other libraries and of eager PyTorch from the committed result
    of the same GPU. Our own rows are never taken from there."""
    if committed is None:
        return run
    measured = {(row["op"], row["shape"], row["form"]) for row in run["rows"]}
    kept = [
        row
        for row in committed["rows"]
        if row["kind"] not in ("ours", "forced")
        and (row["op"], row["shape"], row["form"]) not in measured
    ]
    table5 = run["table5"] or committed.get("table5", [])
    return run | {"rows": [*run["rows"], *kept], "table5": table5}


LISTS = ("failures", "profile", "variants", "flash", "counters", "values", "table5", "rows")


def to_json(run: Mapping[str, Any]) -> str:
    """One row per line, as in the other results."""
    lines = []
    for key, value in run.items():
        if key in LISTS:
            rows = ",\n".join(json.dumps(row, sort_keys=True) for row in value)
            lines.append(f'"{key}": [\n{rows}\n]')
        else:
            lines.append(f'"{key}": {json.dumps(value)}')
    return without_folders("{" + ",\n".join(lines) + "}\n")


def replace(path: Path, text: str) -> None:
    """Writes a file as a whole, whenever the process may be ended."""
    (half := path.with_name(path.name + ".half")).write_text(text)
    os.replace(half, path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true",
        help="512 x 512 and latents alone, some of the tests, in less than two minutes",
    )  # fmt: skip
    parser.add_argument(
        "--baselines", action="store_true",
        help="eager PyTorch, torch.compile and other libraries too, which else the committed "
        "result of the same GPU answers",
    )  # fmt: skip
    parts = ", ".join(gpu_plan.PARTS)
    parser.add_argument("--only", nargs="+", choices=gpu_plan.PARTS, metavar="PART", help=parts)
    parser.add_argument(
        "--variants", type=Path, help="a JSON list of pairs to compare, see gpu_variants.py"
    )
    parser.add_argument(
        "--out", type=Path,
        help="folder of the result; by default benchmarks/results for a whole run, else build/gpu",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and its seconds; needs no GPU"
    )
    options = parser.parse_args(arguments)
    try:
        options.pairs = gpu_variants.read(options.variants, TITLES)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    parts = gpu_plan.wanted(options.quick, options.baselines, options.only)
    all_time = gpu_plan.all_time(options.quick, options.baselines)
    if options.dry_run:
        print(gpu_plan.described(parts, all_time))
        return 0
    if (problem := gpu_setup.problem_here()) is not None:
        print(f"make gpu: {problem}", file=sys.stderr)
        return 1
    # A shell's background jobs ignore interrupts, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    whole = not options.quick and options.only is None
    # The folder is in the repository, wherever this copy of the package runs.
    out = report.ROOT / (options.out or (results.RESULTS if whole else FOLDER))
    FOLDER.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{gpu_name()}.json"
    committed = results.load(gpu_name()) if whole else None

    def save(run: dict[str, Any]) -> None:
        run = carried(run, committed)
        replace(path, to_json(run))
        replace(path.with_suffix(".md"), gpu_tables.markdown(run))

    run = measure(parts, all_time, options.quick, FOLDER, save, options.pairs)
    print(f"\n{path.with_suffix('.md').read_text()}\nwritten: {path}")
    if out.resolve() == results.RESULTS.resolve():
        report.update()
    return 0 if all(text == "ok" for text in run["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
