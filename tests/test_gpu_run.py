"""`make gpu` without a GPU: what it asks of the machine, its parts and their limits."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_runs import CEILINGS, OPS, a_run, row

from benchmarks import floors, gpu, gpu_setup, gpu_tables, report

# ---- what the machine has ----


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (((3, 12), "2.11.0+cu130", "3.6.0", True), None),
        (((3, 10), "2.10.0", "3.5", True), None),
        (((3, 9), "2.11.0", "3.6.0", True), "Python 3.10 or newer is needed, this is 3.9"),
        (((3, 12), "2.9.1", "3.6.0", True), "torch 2.10 or newer is needed, this is 2.9.1"),
        (((3, 12), None, "3.6.0", True), "torch 2.10 or newer is needed, and there is none"),
        (((3, 12), "2.11.0", "3.4.0", True), "triton 3.5 or newer is needed, this is 3.4.0"),
        (((3, 12), "2.11.0", None, True), "triton 3.5 or newer is needed, and there is none"),
        (((3, 12), "2.11.0", "3.6.0", False), "torch sees no CUDA device here"),
    ],
)
def test_what_is_needed(found: tuple[Any, ...], said: str | None) -> None:
    assert gpu_setup.problem(*found) == said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert "make gpu: " in capsys.readouterr().err
    command = [sys.executable, "-m", "benchmarks.gpu_setup"]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1


def test_the_state_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown: set[str] = set()

    def answer(command: Sequence[str], **options: Any) -> Any:
        fields = command[1].partition("=")[2].split(",")
        if unknown & set(fields):
            return SimpleNamespace(returncode=2, stdout="is not a valid field")
        known = {"driver_version": "580.1", "power.limit": "700.00", "clocks.sm": "1980"}
        values = (known.get(f, "0x24" if f.endswith("active") else "7") for f in fields)
        return SimpleNamespace(returncode=0, stdout=", ".join(values) + "\n")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(subprocess, "run", answer)
    for field in ("", "clocks_event_reasons.active"):  # an old driver lacks it
        unknown.add(field)
        found = gpu.state()
        assert (found["driver"], found["power_limit_w"], found["sm_mhz"]) == (
            "580.1", "700.00", "1980",
        )  # fmt: skip
        assert found["held_down_by"] == ["software power cap", "software thermal slowdown"]

    def missing(*command: Any, **options: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert gpu.state() == {}


# ---- parts ----


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """As the command makes what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_parts_side_by_side_say_how_they_ended(tmp_path: Path) -> None:
    """And those over the limit, being interrupted, what they did until then."""
    sleep = "import time\ntry: time.sleep(99)\nexcept KeyboardInterrupt: print('5 passed')"
    codes = {
        "good": "print(1)", "bad": "raise SystemExit('no /opt/some/where/device')",
        "slow": sleep, "slow too": sleep,
    }  # fmt: skip
    begun = time.monotonic()
    commands = {name: python(code) for name, code in codes.items()}
    ended = gpu.run_together(commands, tmp_path, 8.0)
    assert time.monotonic() - begun < 30
    assert ended == {
        "good": "ok", "bad": "exit code 1: no device", "slow": "over 8 s", "slow too": "over 8 s",
    }  # fmt: skip
    logs = {name: (tmp_path / f"{name}.log").read_text() for name in codes}
    assert logs["good"] == "1\n" and logs["slow"] == logs["slow too"] == "5 passed\n"


def test_what_a_part_started_ends_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compilers, for example."""
    file = tmp_path / "file"
    hard = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    child = f"{hard}; time.sleep(8); open({str(file)!r}, 'w')"
    code = f"{hard}; import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    assert gpu.run_together({"a": python(f"{code}; time.sleep(60)")}, tmp_path, 2.0)["a"] != "ok"
    time.sleep(7)
    assert not file.exists()


def test_a_row_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    assert gpu.read_rows(path) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert gpu.read_rows(path) == [{"a": 1}, {"a": 2}]


def test_no_folder_gets_into_a_result() -> None:
    text = 'File "/opt/a b/c.py", /tmp/x-1/y.py: 3/4 of 1/2, https://a.b/c'
    assert gpu.without_folders('see "/root/z/a.py" and /tmp/x-1/y.py') == 'see "a.py" and y.py'
    assert "3/4 of 1/2" in gpu.without_folders(text)


class Pretence:
    """Parts that take time and write rows without running anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, seconds: float) -> None:
        self.now, self.seconds, self.folder = 0.0, seconds, folder
        self.limits: dict[str, float] = {}
        self.saved: list[dict[str, Any]] = []
        monkeypatch.setattr(gpu, "facts", lambda: {"name": "card"})
        monkeypatch.setattr(gpu, "state", lambda: {"driver": "1"})
        monkeypatch.setattr(gpu, "run_together", self.run)
        monkeypatch.setattr(gpu, "run_tests", lambda *_: ("ok", {"test_gram": "9 passed"}))
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def run(self, commands: Any, folder: Path, limit: float) -> dict[str, str]:
        ((part, command),) = commands.items()
        self.limits[part] = limit
        self.now += min(self.seconds, limit)
        wrong = {"op": "dec", "form": "mghf_fast", "part": "step", "passed": False}
        rows = {"ceilings": [CEILINGS], "values": [wrong]}
        made_up = row("mghf_fast", "ours", 1e-3, part)
        written = rows.get(part, [made_up])
        Path(command[command.index(part) + 1]).write_text(
            "".join(json.dumps(r) + "\n" for r in written)
        )
        return {part: "ok" if self.seconds <= limit else f"over {limit:.0f} s"}

    def save(self, run: dict[str, Any]) -> None:
        self.saved.append(json.loads(gpu.to_json(run)))


def test_every_part_is_saved_and_bad_ones_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretence = Pretence(monkeypatch, tmp_path, 25)
    wanted = ("ceilings", "tests", "values", "gram", "entropy")
    run = gpu.measure(wanted, False, tmp_path, pretence.save)
    assert run["parts"] == {
        "ceilings": "ok", "tests": "ok", "values": "wrong: dec step (mghf_fast)",
        "gram": "over 20 s", "entropy": "over 20 s",
    }  # fmt: skip
    assert run["ceilings"] == CEILINGS and run["tests"] == {"test_gram": "9 passed"}
    assert [r["op"] for r in run["rows"]] == ["gram", "entropy"]
    assert run["rows"][0]["parts"]["step"]["times_floor"] > 0
    assert [len(saved["seconds"]) for saved in pretence.saved] == [1, 2, 3, 4, 5]
    assert set(run["state"]) == {"before", *(f"after {part}" for part in wanted)}


@pytest.mark.parametrize(("quick", "limit"), [(False, 600), (True, 120)])
def test_all_parts_together_have_a_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick: bool, limit: float
) -> None:
    """However long each would take."""
    pretence = Pretence(monkeypatch, tmp_path, 1e9)
    run = gpu.measure(gpu.QUICK if quick else gpu.ALL, quick, tmp_path, pretence.save)
    assert pretence.now < limit - 10
    assert run["parts"]["mghf_c"].startswith("over")
    assert list(run["parts"].values())[-1].startswith("left out: all")
    assert all(seconds > 0 for seconds in pretence.limits.values())


def test_the_important_parts_come_first() -> None:
    assert gpu.ALL[:2] == ("ceilings", "tests") and gpu.ALL.index("mghf_c") < gpu.ALL.index("gram")
    assert set(gpu.ALL) >= {*OPS, "table5", "values", "mghf_c-compile", "ops-compile"}
    assert not any("compile" in part for part in gpu.QUICK)


def test_tests_without_pytest_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    how, counts = gpu.run_tests(tmp_path, 9, False)
    assert "pytest is not installed" in how and counts == {}


def test_every_tool_of_the_sanitizer_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Sequence[str]] = {}

    def run(commands: Any, folder: Path, limit: float) -> dict[str, str]:
        seen.update(commands)
        return {name: "exit code 9: races" if name == "racecheck" else "ok" for name in commands}

    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.run_sanitizer(tmp_path, 9) == ("ok", {"compute-sanitizer": "is not installed"})
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"bin/{name}")
    monkeypatch.setattr(gpu, "run_together", run)
    how, ended = gpu.run_sanitizer(tmp_path, 9)
    assert how == "failing: racecheck" and ended["memcheck"] == "ok" and len(ended) == 4
    for tool, command in seen.items():
        assert command[:3] == ["bin/compute-sanitizer", "--tool", tool]
        assert command[3:6] == ["--error-exitcode", "9", sys.executable]
        assert "values" in command and len({c[-1] for c in seen.values()}) == 4
    text = gpu_tables.complete(a_run() | {"sanitizer": ended})
    assert "racecheck exit code 9: races; initcheck ok" in text


def test_tests_run_by_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Sequence[str]] = {}

    def run(commands: Any, folder: Path, limit: float, environment: Any) -> dict[str, str]:
        seen.update(commands)
        assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        logs = {
            "gram": "...\n\n12 passed, 3 skipped in 4.56s\n",
            "dec": "= FAILURES =\n==== 1 failed, 2 passed in 7.0s (0:01:10) ====\n",
            "patches": "!!! KeyboardInterrupt !!!\n5 passed in 9.01s\n",
            "gpu": "no message",
            "gram-cuda": "9 deselected in 0.10s\n",
        }
        for name in commands:
            (folder / f"{name}.log").write_text(logs.get(name, "1 passed in 1s\n"))
        bad = {"dec": "exit code 1: 1 failed", "gpu": "over 9 s", "patches": "over 9 s",
               "gram-cuda": "exit code 5: 9 deselected"}  # fmt: skip
        return {name: bad.get(name, "ok") for name in commands}

    monkeypatch.setattr(gpu, "run_together", run)
    how, counts = gpu.run_tests(tmp_path, 9, True)
    assert how == "failing: gpu, dec, patches"
    assert counts["gram"] == "12 passed, 3 skipped in 4.56s"
    assert counts["dec"].startswith("1 failed, 2 passed") and counts["gpu"] == "over 9 s"
    assert counts["patches"] == "5 passed in 9.01s, over 9 s"
    assert set(seen) == {*floors.OPS, "gpu"}
    for command in seen.values():
        (file,) = [word for word in command if word.endswith(".py")]
        assert (report.ROOT / file).exists() and "--device" in command
    assert gpu.run_tests(tmp_path, 9, False)[0] == how
    kinds = ("", "-cuda", "-reference")
    assert set(seen) == {"gpu", *(op + kind for op in floors.OPS for kind in kinds)}
    selections = [seen["gram" + kind][-1] for kind in kinds]
    assert selections == ["triton", "cuda and not triton", "not triton and not cuda"]


# ---- processes ----


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_kernel_through_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In Triton's interpreter."""
    file = tmp_path / "rows"
    options = ["--device", "cpu", "--backend", "triton", "--size", "32"]
    command = [*gpu.part_command("entropy", file, True), *options]
    ended = gpu.run_together({"entropy": command}, tmp_path, 300, {"TRITON_INTERPRET": "1"})
    assert ended == {"entropy": "ok"}, (tmp_path / "entropy.log").read_text()
    first = gpu.read_rows(file)[0]
    assert first["backends"] == {"entropy": "triton"}
    assert first["parts"]["forward"]["median_s"] > 0


def test_the_whole_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On this machine's CPU in place of a GPU."""
    on_cpu = ["--device", "cpu", "--backend", "reference", "--size", "32"]
    command = gpu.part_command
    monkeypatch.setattr(gpu_setup, "problem_here", lambda: None)
    monkeypatch.setattr(gpu, "gpu_name", lambda: "card")
    monkeypatch.setattr(gpu, "part_command", lambda *arguments: [*command(*arguments), *on_cpu])
    readme = (report.ROOT / "README.md").read_text()
    assert gpu.main(["--quick", "--only", "ceilings", "entropy", "--out", str(tmp_path)]) == 0
    run = json.loads((tmp_path / "card.json").read_text())
    assert run["quick"] and run["parts"] == {"ceilings": "ok", "entropy": "ok"}
    assert run["machine"]["name"] == "card" and set(run["ceilings"]) == set(CEILINGS)
    (ours,) = [r for r in run["rows"] if r["form"] == "mghf_fast"]
    assert ours["parts"]["forward"]["times_floor"] > 0
    assert (tmp_path / "card.md").read_text() in capsys.readouterr().out
    assert (report.ROOT / "README.md").read_text() == readme
