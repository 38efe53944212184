"""What needs an NVIDIA GPU, in one command: `make gpu`, or `python -m benchmarks.gpu`.

The parts are the card's ceilings, the tests on the device, and every op's and every whole step's
time and peak memory. Each runs in processes of its own (gpu_parts.py) under a time limit, and all
together under one: a part that fails or takes too long does not lose the others, and what was
measured is written after each. The result is `benchmarks/results/<gpu>.json`, a table in Markdown
beside it, and the same table in README.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mghf_fast.measure import machine_facts

from . import floors, gpu_setup, gpu_tables, report, results

FOLDER = report.ROOT / "build" / "gpu"
# Seconds. The most important parts come first, and a part gets at most what is left.
LIMITS = {
    "ceilings": 30,
    "tests": 180,
    "values": 30,
    "mghf_c": 80,
    "mghf_n": 45,
    "mghf_c-compile": 120,
    "coupling": 30,
    "content_style": 25,
    "monce": 25,
    "sinkhorn": 30,
    "patches": 25,
    "gram": 20,
    "entropy": 20,
    "dec": 20,
    "sanitizer": 90,
    "table5": 40,
    "mghf_n-compile": 60,
    "ops-compile": 90,
    "ops": 45,
}
QUICK = ("ceilings", "tests", "values", "mghf_c", "mghf_n", "ops", "table5")
ALL = tuple(part for part in LIMITS if part != "ops")  # a process for each op instead
QUICK_LIMIT, QUICK_TEST_LIMIT = 25.0, 40.0
ALL_TIME, ALL_TIME_QUICK = 560.0, 105.0
LEAST = 5.0  # seconds without which no part is begun
QUICK_TESTS = "(triton or cuda) and nan"
GRACE = 5.0  # seconds for an interrupted process to say what it did

# ---- running ----


def run_together(
    commands: Mapping[str, Sequence[str]],
    folder: Path,
    limit: float,
    environment: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Runs commands side by side and says how each ended: "ok", or why not. Their output goes to
    <name>.log; what is over the limit is interrupted, and a little later ended together with the
    processes that it started."""
    children = {}
    for name, command in commands.items():
        with (folder / f"{name}.log").open("w") as output:
            children[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})}, start_new_session=True,
            )  # fmt: skip
    ended = {}
    try:
        in_time = wait_for(children.values(), limit)
        for name, child in children.items():
            if (code := child.poll()) is None:
                ended[name] = f"over {limit:.0f} s"
                send(child, signal.SIGINT)
            else:
                ended[name] = "ok" if code == 0 else f"exit code {code}: {last_line(folder, name)}"
        if not in_time:
            wait_for(children.values(), GRACE)
    finally:
        for child in children.values():
            send(child, signal.SIGKILL)
            child.wait()
    return ended


def wait_for(children: Iterable[subprocess.Popen[bytes]], limit: float) -> bool:
    """Whether all of them ended within the limit."""
    end = time.monotonic() + limit
    try:
        for child in children:
            child.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def send(child: subprocess.Popen[bytes], number: int) -> None:
    """To all processes of the child's group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def last_line(folder: Path, name: str) -> str:
    text = (folder / f"{name}.log").read_text(errors="replace")
    return without_folders((text.strip().splitlines() or ["no message"])[-1][:200])


def without_folders(text: str) -> str:
    """A result names no path of the machine that it was taken on."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines; the last may be cut short."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def run_tests(folder: Path, limit: float, quick: bool) -> tuple[str, dict[str, str]]:
    """The suite on the device, three processes a file, all at once: it is the compiler that they
    wait for. How it went, and how each did."""
    if importlib.util.find_spec("pytest") is None:
        return "did not run: pytest is not installed (GPU_WHEELS=folder installs wheels)", {}
    command = [sys.executable, "-m", "pytest", "-q", "--device", "cuda", "-p", "no:cacheprovider"]
    commands = {"gpu": [*command, "tests/test_gpu.py"]}
    for op in floors.OPS:
        file = f"tests/test_{op}.py"
        if quick:
            commands[op] = [*command, file, "-k", QUICK_TESTS]
        else:
            commands[op] = [*command, file, "-k", "triton"]
            commands[f"{op}-cuda"] = [*command, file, "-k", "cuda and not triton"]
            commands[f"{op}-reference"] = [*command, file, "-k", "not triton and not cuda"]
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
    ended = run_together(commands, folder, limit, environment)
    # pytest's 5 is that nothing was selected: an op without kernels there.
    ended = {n: "ok" if how.startswith("exit code 5") else how for n, how in ended.items()}
    summaries = {}
    for name, how in ended.items():
        log = (folder / f"{name}.log").read_text(errors="replace")
        counts = re.findall(
            r"^=*\s*(\d+ (?:passed|failed|error|skipped|deselected)[^=\n]*)", log, re.M
        )
        summaries[name] = counts[-1].strip() if counts else how
        if counts and how.startswith("over"):
            summaries[name] += f", {how}"
    failing = [name for name, how in ended.items() if how != "ok"]
    return f"failing: {', '.join(failing)}" if failing else "ok", summaries


SANITIZER = "compute-sanitizer"
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def run_sanitizer(folder: Path, limit: float) -> tuple[str, dict[str, str]]:
    """Every op at a tiny size under each tool of the CUDA toolkit's sanitizer, if it is there."""
    if (program := shutil.which(SANITIZER)) is None:
        return "ok", {SANITIZER: "is not installed"}
    commands = {}
    for tool in SANITIZER_TOOLS:
        (file := folder / f"{tool}.jsonl").unlink(missing_ok=True)
        checked = [program, "--tool", tool, "--error-exitcode", "9"]
        commands[tool] = [*checked, *part_command("values", file, False)]
    ended = run_together(commands, folder, limit)
    failing = [tool for tool, how in ended.items() if how != "ok"]
    return f"failing: {', '.join(failing)}" if failing else "ok", ended


def part_command(part: str, file: Path, quick: bool) -> list[str]:
    options = ["--quick"] if quick else []
    return [sys.executable, "-m", "benchmarks.gpu_parts", part, str(file), *options]


# ---- what the card is doing ----

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
    """The values of one card, the current one; ``None`` where the program or a field is missing."""
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
    """Driver, clocks, power, temperature, and what holds the clocks down; only reads."""
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


def facts() -> dict[str, Any]:
    """Of the machine, with PyTorch's settings, which decide what eager convolutions compute in."""
    return machine_facts() | {
        "name": gpu_name(),
        "triton": gpu_setup.version_of("triton", "pytorch-triton"),
        "cuda": torch.version.cuda,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
    }


# ---- the command ----


def take(run: dict[str, Any], part: str, rows: list[dict[str, Any]]) -> None:
    """Puts what a part wrote into the run."""
    if part == "ceilings":
        run["ceilings"] = rows[0] if rows else {}
    elif part in ("values", "table5"):
        run[part] = rows
        if part == "values" and not all(row["passed"] for row in rows):
            wrong = ", ".join(
                f"{r['op']} {r['part']} ({r['form']})" for r in rows if not r["passed"]
            )
            run["parts"][part] = f"wrong: {wrong}"
    else:
        run["rows"] += rows
    for row in run["rows"]:
        floors.annotate(row, run["ceilings"])


def measure(
    wanted: Sequence[str], quick: bool, folder: Path, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """All parts, each saved as soon as it ended."""
    run: dict[str, Any] = {
        "machine": facts(), "quick": quick, "ceilings": {}, "state": {"before": state()},
        "parts": {}, "seconds": {}, "tests": {}, "sanitizer": {},
        "values": [], "table5": [], "rows": [],
    }  # fmt: skip
    start, all_time = time.monotonic(), ALL_TIME_QUICK if quick else ALL_TIME
    limits = dict.fromkeys(LIMITS, QUICK_LIMIT) | {"tests": QUICK_TEST_LIMIT} if quick else LIMITS
    for part in wanted:
        begun = time.monotonic()
        left = all_time - (begun - start)
        if left < LEAST:
            run["parts"][part] = f"left out: all {all_time:.0f} s were over"
        elif part == "tests":
            limit = min(limits[part], left)
            run["parts"][part], run["tests"] = run_tests(folder, limit, quick)
        elif part == "sanitizer":
            run["parts"][part], run["sanitizer"] = run_sanitizer(folder, min(limits[part], left))
        else:
            file = folder / f"{part}.jsonl"
            file.unlink(missing_ok=True)
            commands = {part: part_command(part, file, quick)}
            run["parts"] |= run_together(commands, folder, min(limits[part], left))
            take(run, part, read_rows(file))
        run["seconds"][part] = round(time.monotonic() - begun, 1)
        run["state"]["after " + part] = state()
        save(run)
        print(f"{part}: {run['parts'][part]} ({run['seconds'][part]:.0f} s)", flush=True)
    return run


def to_json(run: Mapping[str, Any]) -> str:
    """Rows one a line, as in the other results."""
    lines = []
    for key, value in run.items():
        if key in ("rows", "table5", "values"):
            rows = ",\n".join(json.dumps(row, sort_keys=True) for row in value)
            lines.append(f'"{key}": [\n{rows}\n]')
        else:
            lines.append(f'"{key}": {json.dumps(value)}')
    return without_folders("{" + ",\n".join(lines) + "}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true",
        help="512 x 512 and latents alone, some of the tests, nothing compiled by torch.compile",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=LIMITS, metavar="PART", help=", ".join(LIMITS))
    parser.add_argument(
        "--out", type=Path,
        help="folder of the result; by default benchmarks/results for a whole run, else build/gpu",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if (problem := gpu_setup.problem_here()) is not None:
        print(f"make gpu: {problem}", file=sys.stderr)
        return 1
    # A shell's background jobs ignore interrupts, and what they start inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    whole = not options.quick and options.only is None
    # A folder is one of the repository's, wherever this copy of the package runs.
    out = report.ROOT / (options.out or (results.RESULTS if whole else FOLDER))
    wanted = options.only or (QUICK if options.quick else ALL)
    FOLDER.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{gpu_name()}.json"

    def save(run: dict[str, Any]) -> None:
        path.write_text(to_json(run))
        path.with_suffix(".md").write_text(gpu_tables.markdown(run))

    run = measure(wanted, options.quick, FOLDER, save)
    print(f"\n{gpu_tables.markdown(run)}\nwritten: {path}")
    if out.resolve() == results.RESULTS.resolve():
        report.update()
    return 0 if all(text == "ok" for text in run["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
