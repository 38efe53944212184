"""The test part of `make gpu`, without a GPU: which tests run, in how many processes, and what is
recorded of failures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gpu_runs import a_run

from benchmarks import floors, gpu_processes, gpu_tables, gpu_tests, report

# ---- what runs ----


def test_without_pytest_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None)
    how, counts, failures = gpu_tests.run_tests("cuda", tmp_path, 9)
    assert "pytest is not installed" in how and counts == {} and failures == []


def test_the_processes_of_the_tests(tmp_path: Path) -> None:
    for kind, selection in gpu_tests.SELECTIONS.items():
        commands = gpu_tests.test_commands(kind, tmp_path)
        assert ("gpu" in commands) == (kind == "cuda")
        for op in floors.OPS:
            count = gpu_tests.SHARES.get((kind, op), 1)
            names = [f"{op}-{kind}" + (f"-{i}" if count > 1 else "") for i in range(1, count + 1)]
            for i, name in enumerate(names, 1):
                command = commands[name]
                assert (report.ROOT / f"tests/test_{op}.py").exists()
                assert f"tests/test_{op}.py" in command and command[command.index("-k") + 1] == (
                    selection
                )
                assert (f"--share={i}/{count}" in command) == (count > 1)
                assert f"--outcomes={tmp_path / name}.outcomes" in command
    quick = gpu_tests.test_commands("quick", tmp_path)
    assert set(quick) == {"gpu", *floors.OPS}


def test_every_tool_of_the_sanitizer_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Sequence[str]] = {}

    def run(commands: Any, *arguments: Any) -> dict[str, str]:
        seen.update(commands)
        return {name: "exit code 9: races" if "race" in name else "ok" for name in commands}

    command = ["python", "values", "FILE"]
    absent = gpu_tests.Outcome("ok", {"compute-sanitizer": "is not installed"}, [])
    monkeypatch.setattr(gpu_tests.shutil, "which", lambda name: None)
    assert gpu_tests.run_sanitizer(command, tmp_path, 9) == absent
    assert gpu_tests.run_tests("races", tmp_path, 9).how == "ok"
    monkeypatch.setattr(gpu_tests.shutil, "which", lambda name: f"bin/{name}")
    monkeypatch.setattr(gpu_tests, "run_together", run)
    how, ended, _ = gpu_tests.run_sanitizer(command, tmp_path, 9)
    assert how == "failing: racecheck" and ended["memcheck"] == "ok" and len(ended) == 2
    for tool, words in seen.items():
        assert words[:3] == ["bin/compute-sanitizer", "--tool", tool]
        assert words[3:] == ["--error-exitcode", "9", *command[:2], str(tmp_path / tool) + ".jsonl"]
    text = gpu_tables.complete(a_run() | {"sanitizer": ended})
    assert "memcheck ok; racecheck exit code 9: races" in text
    seen.clear()
    found = gpu_tests.run_tests("races", tmp_path, 9)
    assert found.how == "failing: sinkhorn-races" and found.failures[0]["message"].endswith("races")
    (words,) = seen.values()
    assert words[1:3] == ["--tool", "racecheck"] and "tests/test_sinkhorn.py" in words


# ---- what is kept ----

FILE = """
import os, time, pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "the message" + 400 * "x"
@pytest.fixture
def broken(): raise ValueError("no fixture")
def test_broken(broken): pass
@pytest.mark.skip
def test_left_out(): pass
@pytest.mark.parametrize("n", range(4))
def test_many(n): pass
"""
SLOW = "def test_slow(): {}\ndef test_after(): pass\n"


def run(folder: Path, text: str, limit: float, *options: str) -> tuple[str, list[dict[str, str]]]:
    (file := folder / "test_made_up.py").write_text(text)
    outcomes = folder / "made_up.outcomes"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "outcomes",
        f"--rootdir={folder}", f"--outcomes={outcomes}", *options, str(file),
    ]  # fmt: skip
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    ended = gpu_processes.run_together({"made_up": command}, folder, limit, environment)
    return gpu_tests.told(gpu_processes.read_rows(outcomes), ended["made_up"].partition(":")[0])


def test_what_failed_is_kept_by_name(tmp_path: Path) -> None:
    summary, failures = run(tmp_path, FILE, 60)
    assert summary == "1 failed, 1 error, 5 passed, 1 skipped, exit code 1"
    assert [(f["test"].partition("::")[2], f["how"]) for f in failures] == [
        ("test_bad", "failed"), ("test_broken", "error"),
    ]  # fmt: skip
    assert failures[0]["message"].startswith("test_made_up.py:4: AssertionError: the messagex")
    assert len(failures[0]["message"]) == gpu_tests.MESSAGE
    assert "ValueError: no fixture" in failures[1]["message"]
    summary, failures = run(tmp_path, "import nothing_of_that_name\n", 60)
    assert failures[0]["how"] == "error" and "nothing_of_that_name" in failures[0]["message"]


@pytest.mark.parametrize("end", ["time.sleep(99)", "os.kill(os.getpid(), 9)"])
def test_what_was_cut_off_is_kept_by_name(end: str, tmp_path: Path) -> None:
    """By the time limit, or for any other reason."""
    summary, failures = run(tmp_path, "import os, time\n" + SLOW.format(end), 8)
    assert summary.startswith("1 not begun, ")
    (failure,) = failures
    assert failure["test"].endswith("::test_slow") and failure["how"] == "cut off"
    assert failure["message"] == ("over 8 s" if "sleep" in end else "exit code -9")


def test_processes_share_a_file(tmp_path: Path) -> None:
    found = [run(tmp_path, FILE, 60, f"--share={i}/3", "-k", "many")[0] for i in (1, 2, 3)]
    assert found == ["2 passed", "1 passed", "1 passed"]
    summary, failures = run(tmp_path, FILE, 60, "--share=4/3")
    assert failures == [{"test": "", "how": "error", "message": summary}]


def test_the_table_names_what_failed() -> None:
    failures = [{"run": "gram-cuda", "test": "tests/test_gram.py::test_a[x|y]", "how": "cut off",
                 "message": "over 9 s | later"}]  # fmt: skip
    text = gpu_tables.complete(a_run() | {"failures": failures})
    assert "| `test_gram.py::test_a[x|y]` | cut off | over 9 s / later |" in text.replace(
        "/y", "|y"
    )
    assert "were cut off: 1" in text
    assert "were cut off" not in gpu_tables.complete(a_run())
