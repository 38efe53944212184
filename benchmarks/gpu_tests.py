"""The tests of `make gpu`: processes that share the files, and the outcome of every test that did
not pass. The sanitizer of the CUDA toolkit runs the same way."""

from __future__ import annotations

import collections
import importlib.util
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import floors
from .gpu_processes import read_rows, run_together, without_folders

PYTEST = (
    sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
    "--device", "cuda",
)  # fmt: skip
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
SELECTIONS = {
    "cuda": "cuda and not triton",
    "reference": "not triton and not cuda",
    "triton": "triton",
}
"""The tests of an op by backend, in the order in which they run."""

QUICK_TESTS = "(triton or cuda) and nan"
SHARES = {("triton", "coupling"): 5, ("triton", "content_style"): 4, ("triton", "entropy"): 2}
"""Processes for a file, if more than one, because its tests wait for Triton's compiler."""

SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
RACES = "cuda and not triton and (several_blocks or upstream or stops_early or 5-0.02)"
"""Three of Sinkhorn's CUDA tests failed on an H200 (benchmarks/results/h200.md). One failure is
explained; these tests are the likeliest to show the cause of the others. So they run first, under
racecheck."""

NO_PYTEST = "did not run: pytest is not installed (GPU_WHEELS=folder installs wheels)"
MESSAGE = 300  # characters


class Outcome(NamedTuple):
    """The outcome of a part in a word, that of each of its processes in a line, and the tests that
    did not pass: {"run", "test", "how": "failed" | "error" | "cut off", "message"}."""

    how: str
    summaries: dict[str, str]
    failures: list[dict[str, str]]


def test_commands(kind: str, folder: Path) -> dict[str, list[str]]:
    """Name -> command of the processes of a kind of tests, one of SELECTIONS or "quick"."""
    commands = {}
    if kind in ("cuda", "quick"):
        commands["gpu"] = [*PYTEST, "tests/test_gpu.py"]
    for op in floors.OPS:
        count = SHARES.get((kind, op), 1)
        for i in range(1, count + 1):
            name = op if kind == "quick" else f"{op}-{kind}" + (f"-{i}" if count > 1 else "")
            share = [f"--share={i}/{count}"] if count > 1 else []
            selection = SELECTIONS.get(kind, QUICK_TESTS)
            commands[name] = [*PYTEST, f"tests/test_{op}.py", "-k", selection, *share]
    return {n: [*c, f"--outcomes={folder / n}.outcomes"] for n, c in commands.items()}


def race_commands(program: str, folder: Path) -> dict[str, list[str]]:
    name = "sinkhorn-races"
    checked = [program, "--tool", "racecheck", "--error-exitcode", "9"]
    tests = [*PYTEST, "tests/test_sinkhorn.py", "-k", RACES]
    return {name: [*checked, *tests, f"--outcomes={folder / name}.outcomes"]}


def run_tests(kind: str, folder: Path, limit: float) -> Outcome:
    """Runs the tests of a kind, all processes at once; of kind "races" some, under racecheck."""
    if importlib.util.find_spec("pytest") is None:
        return Outcome(NO_PYTEST, {}, [])
    if kind == "races":
        if (program := shutil.which(SANITIZER)) is None:
            return Outcome("ok", {"sinkhorn-races": f"{SANITIZER} is not installed"}, [])
        commands = race_commands(program, folder)
    else:
        commands = test_commands(kind, folder)
    for name in commands:
        (folder / f"{name}.outcomes").unlink(missing_ok=True)
    ended = run_together(commands, folder, limit, ENVIRONMENT)
    # pytest exits with 5 if no test was selected, as for an op without kernels there.
    ended = {n: "ok" if how.startswith("exit code 5") else how for n, how in ended.items()}
    summaries, failures = {}, []
    for name, how in ended.items():
        summaries[name], found = told(read_rows(folder / f"{name}.outcomes"), how)
        failures += [{"run": name} | failure for failure in found]
    failing = [name for name, how in ended.items() if how != "ok"]
    how = f"failing: {', '.join(failing)}" if failing else "ok"
    return Outcome(how, summaries, failures)


def told(events: Sequence[Mapping[str, Any]], how: str) -> tuple[str, list[dict[str, str]]]:
    """A line of counts, and the tests that did not pass, from the events that a process wrote until
    it ended as ``how`` says."""
    counts = collections.Counter(event["event"] for event in events)
    failures = [
        {"test": e["test"], "how": e["event"], "message": without_folders(e["message"])[:MESSAGE]}
        for e in events
        if e["event"] in ("failed", "error")
    ]
    ended = {e["test"] for e in events if e["event"] not in ("begun", "selected")}
    begun = [e["test"] for e in events if e["event"] == "begun"]
    selected = sum(e["count"] for e in events if e["event"] == "selected")
    failures += [
        {"test": test, "how": "cut off", "message": how} for test in begun if test not in ended
    ]
    words = [f"{counts[w]} {w}" for w in ("failed", "error", "passed", "skipped") if counts[w]]
    if (missing := selected - len(begun)) > 0:
        words.append(f"{missing} not begun")
    if not events:
        failures.append({"test": "", "how": "error", "message": how})
    return ", ".join(words + ([how] if how != "ok" or not words else [])), failures


def run_sanitizer(command: Sequence[str], folder: Path, limit: float) -> Outcome:
    """Runs the command, with an output file appended, under each tool."""
    if (program := shutil.which(SANITIZER)) is None:
        return Outcome("ok", {SANITIZER: "is not installed"}, [])
    commands = {}
    for tool in TOOLS:
        checked = [program, "--tool", tool, "--error-exitcode", "9", *command]
        commands[tool] = [str(folder / f"{tool}.jsonl") if c == "FILE" else c for c in checked]
        (folder / f"{tool}.jsonl").unlink(missing_ok=True)
    ended = run_together(commands, folder, limit)
    failing = [tool for tool, how in ended.items() if how != "ok"]
    return Outcome(f"failing: {', '.join(failing)}" if failing else "ok", ended, [])
