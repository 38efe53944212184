"""`make gpu` without a GPU: its queries of the machine, its parts and their time limits."""

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
from gpu_runs import CEILINGS, OPS, row

from benchmarks import (
    gpu,
    gpu_plan,
    gpu_processes,
    gpu_profile,
    gpu_setup,
    gpu_tables,
    gpu_tests,
    gpu_variants,
    report,
)

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
    """Handles SIGINT as in the command's own processes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_parts_side_by_side_say_how_they_ended(tmp_path: Path) -> None:
    """Parts over their limit are interrupted and keep the results until then."""
    sleep = "import time\ntry: time.sleep(99)\nexcept KeyboardInterrupt: print('5 passed')"
    codes = {
        "good": "print(1)", "bad": "raise SystemExit('no /opt/some/where/device')",
        "slow": sleep, "slow too": sleep,
    }  # fmt: skip
    begun = time.monotonic()
    commands = {name: python(code) for name, code in codes.items()}
    ended = gpu_processes.run_together(commands, tmp_path, 8.0)
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
    monkeypatch.setattr(gpu_processes, "GRACE", 1.0)
    assert (
        gpu_processes.run_together({"a": python(f"{code}; time.sleep(60)")}, tmp_path, 2.0)["a"]
        != "ok"
    )
    time.sleep(7)
    assert not file.exists()


def test_a_row_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    assert gpu_processes.read_rows(path) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert gpu_processes.read_rows(path) == [{"a": 1}, {"a": 2}]


def test_no_folder_gets_into_a_result() -> None:
    text = 'File "/opt/a b/c.py", /tmp/x-1/y.py: 3/4 of 1/2, https://a.b/c'
    assert (
        gpu_processes.without_folders('see "/root/z/a.py" and /tmp/x-1/y.py')
        == 'see "a.py" and y.py'
    )
    assert "3/4 of 1/2" in gpu_processes.without_folders(text)


class Pretence:
    """Parts that take time and write rows without running anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, seconds: float) -> None:
        self.now, self.seconds, self.folder = 0.0, seconds, folder
        self.limits: dict[str, float] = {}
        self.commands: dict[str, list[str]] = {}
        self.saved: list[dict[str, Any]] = []
        monkeypatch.setattr(gpu, "facts", lambda: {"name": "card"})
        monkeypatch.setattr(gpu, "state", lambda: {"driver": "1"})
        monkeypatch.setattr(gpu, "run_together", self.run)
        monkeypatch.setattr(gpu_profile, "run_together", self.run)
        monkeypatch.setattr(gpu_profile.shutil, "which", lambda name: name)
        monkeypatch.setattr(gpu_tests, "run_tests", self.tests)
        monkeypatch.setattr(gpu_tests, "run_sanitizer", self.tests)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setenv("MGHF_COMMIT", "abc1234")

    def passes(self, part: str, limit: float) -> str:
        self.limits[part] = self.limits.get(part, 0.0) + limit
        self.now += min(self.seconds, limit)
        return "ok" if self.seconds <= limit else f"over {limit:.0f} s"

    def tests(self, kind: Any, folder: Path, limit: float) -> gpu_tests.Outcome:
        name = kind if isinstance(kind, str) else "memcheck"
        wrong = {"run": name, "test": "t", "how": "failed", "message": "no"}
        return gpu_tests.Outcome(self.passes(name, limit), {name: "9 passed"}, [wrong])

    def run(
        self,
        commands: Any,
        folder: Path,
        limit: float,
        environment: Any = None,
        meanwhile: Any = None,
    ) -> dict[str, str]:
        ((part, command),) = commands.items()
        self.commands[part] = command
        if part == "counters":
            (folder / "counters.log").write_text("ERR_NVGPUCTRPERM")
            return {part: self.passes(part, limit)}
        if part.startswith(("variants", "newer")):
            return {part: self.passes(part.partition("-")[0], limit)}
        wrong = {"op": "dec", "form": "mghf_fast", "part": "step", "passed": False}
        table = {"op": "mghf_c", "kernels": [{"name": "mix", "us": 3.0, "launches": 1.0}],
                 "us": 3.0, "launches": 1.0, "shape": "1x3x512x512"}  # fmt: skip
        missing = {"form": "flash-sinkhorn", "part": {"failure": "is not installed"}}
        rows = {"ceilings": [CEILINGS], "values": [wrong], "profile": [table], "table5": [],
                "flash": [missing]}  # fmt: skip
        made_up = row("mghf_fast", "ours", 1e-3, part if part in OPS else "gram")
        written = rows.get(part, [made_up])
        Path(command[command.index(part) + 1]).write_text(
            "".join(json.dumps(r) + "\n" for r in written)
        )
        return {part: self.passes(part, limit)}

    def save(self, run: dict[str, Any]) -> None:
        self.saved.append(json.loads(gpu.to_json(run)))


def parts_of(*names: str) -> list[gpu_plan.Part]:
    return [gpu_plan.PARTS[name]._replace(seconds=20) for name in names]


def test_every_part_is_saved_and_bad_ones_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretence = Pretence(monkeypatch, tmp_path, 25)
    wanted = ("ceilings", "tests-cuda", "profile", "values", "mghf_c", "counters", "sanitizer")
    run = gpu.measure(parts_of(*wanted), 300, False, tmp_path, pretence.save)
    assert run["parts"] == dict.fromkeys(wanted, "over 20 s") | {
        "values": "wrong: dec step (mghf_fast)", "counters": "ok",
    }  # fmt: skip
    assert run["ceilings"] == CEILINGS and run["tests"] == {"cuda": "9 passed"}
    assert run["sanitizer"] == {"memcheck": "9 passed"} and len(run["failures"]) == 2
    assert run["counters"][0]["failure"] == "may not read this machine's counters"
    assert [r["op"] for r in run["rows"]] == ["mghf_c"]
    assert run["rows"][0]["parts"]["step"]["times_floor"] > 0
    for found in (*run["rows"], *run["profile"], *run["values"], *run["counters"]):
        assert found["commit"] == run["commit"] == "abc1234" and found["taken"].endswith("UTC")
    assert [len(saved["seconds"]) for saved in pretence.saved] == [1, 2, 3, 4, 5, 6, 7]
    assert set(run["state"]) == {"before", *(f"after {part}" for part in wanted)}


@pytest.mark.parametrize(
    ("quick", "baselines", "limit"), [(False, False, 540), (False, True, 570), (True, False, 120)]
)
def test_all_parts_together_have_a_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick: bool, baselines: bool, limit: float
) -> None:
    """Whatever their durations."""
    pretence = Pretence(monkeypatch, tmp_path, 1e9)
    parts, all_time = gpu_plan.wanted(quick, baselines), gpu_plan.all_time(quick, baselines)
    run = gpu.measure(parts, all_time, quick, tmp_path, pretence.save, gpu_variants.PAIRS)
    assert pretence.now <= all_time <= limit and set(run["parts"]) == {p.name for p in parts}
    assert run["parts"]["mghf_c"].startswith("over")
    assert all(seconds > 0 for seconds in pretence.limits.values())
    short = gpu.measure(parts, 50, quick, tmp_path, pretence.save, gpu_variants.PAIRS)
    assert list(short["parts"].values())[-1] == "left out: all 50 s were over"


def test_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The deciding parts come first and fit into the time; the plan is printed without a GPU."""
    names = [part.name for part in gpu_plan.PLAN]
    assert names[:3] == ["ceilings", "values", "newer"]
    order = [
        "profile",
        "mghf_c",
        "flash",
        "races",
        "tests-cuda",
        "tests-reference",
        "variants",
        "counters",
    ]
    assert sorted(order, key=names.index) == order and names[-2:] == ["sanitizer", "tests-triton"]
    with_baselines = [part.name for part in gpu_plan.wanted(False, True)]
    assert not {*gpu_plan.UNLESS} & {*with_baselines} and {*gpu_plan.UNLESS} <= {*names}
    assert not any(word in name for name in names for word in ("others", "compile", "table5"))
    for quick, baselines in ((False, False), (False, True), (True, False)):
        seconds = sum(part.seconds for part in gpu_plan.wanted(quick, baselines))
        assert seconds <= gpu_plan.all_time(quick, baselines)
    assert gpu.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[4] for line in lines[:-1]] == names and lines[-1].endswith("of 540 s")
    assert gpu.main(["--dry-run", "--only", "values"]) == 0
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--variants", str(tmp_path / "none.json")])
    assert "none.json" in capsys.readouterr().err


def test_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit from the environment, or git's, or none."""
    monkeypatch.setenv("MGHF_COMMIT", "1234567")
    assert gpu_setup.commit() == "1234567"
    monkeypatch.delenv("MGHF_COMMIT")

    def no_git(*arguments: Any, **options: Any) -> Any:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert gpu_setup.commit() == "unknown"


def test_a_committed_result_answers_for_others() -> None:
    committed = {
        "rows": [row("eager", "eager", 2.0), row("VGG-16", "peer", 3.0), row("old", "ours", 9.0),
                 row("mghf_fast Triton", "forced", 8.0)],
        "table5": [{"key": "gram"}],
    }  # fmt: skip
    ours = row("mghf_fast", "ours", 1.0) | {"commit": "b", "taken": "2026-01-01 00:00 UTC"}
    run: dict[str, Any] = {"rows": [ours], "table5": [], "commit": "b", "taken": ours["taken"]}
    found = gpu.carried(run, committed)
    assert [r["form"] for r in found["rows"]] == ["mghf_fast", "eager", "VGG-16"]
    assert found["table5"] == [{"key": "gram"}] and gpu.carried(run, None) is run
    text = gpu_tables.origin(found)
    assert text.startswith("Taken 2026-01-01 00:00 UTC of commit b; 2 rows of other libraries")
    again = run | {"rows": [row("eager", "eager", 5.0)]}
    assert [r["form"] for r in gpu.carried(again, committed)["rows"]] == ["eager", "VGG-16"]


# ---- processes ----


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_kernel_through_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In Triton's interpreter."""
    file = tmp_path / "rows"
    options = ["--device", "cpu", "--backend", "triton", "--size", "32"]
    command = [*gpu.part_command("entropy", file, True), *options]
    ended = gpu_processes.run_together(
        {"entropy": command}, tmp_path, 300, {"TRITON_INTERPRET": "1"}
    )
    assert ended == {"entropy": "ok"}, (tmp_path / "entropy.log").read_text()
    first = gpu_processes.read_rows(file)[0]
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
    # A GPU's limits are for a GPU's machine; this one may be busy.
    monkeypatch.setattr(
        gpu_plan, "PARTS", {name: p._replace(seconds=90) for name, p in gpu_plan.PARTS.items()}
    )
    monkeypatch.setattr(gpu_plan, "ALL_TIME_QUICK", 200.0)
    readme = (report.ROOT / "README.md").read_text()
    assert gpu.main(["--quick", "--only", "ceilings", "mghf_n", "--out", str(tmp_path)]) == 0
    run = json.loads((tmp_path / "card.json").read_text())
    assert run["quick"] and run["parts"] == {"ceilings": "ok", "mghf_n": "ok"}
    assert run["machine"]["name"] == "card" and set(run["ceilings"]) == set(CEILINGS)
    (ours,) = [r for r in run["rows"] if r["form"] == "mghf_fast"]
    assert ours["parts"]["step"]["times_floor"] > 0 and ours["commit"] == run["commit"]
    assert (tmp_path / "card.md").read_text() in capsys.readouterr().out
    assert (report.ROOT / "README.md").read_text() == readme
