"""`make gpu` without a GPU: its parts, limits and tables, and a tiny op through the process that
measures."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import conftest
import pytest
import torch
import without_hypothesis
from contract import relative_error

from benchmarks import cases, floors, gpu, gpu_parts, gpu_setup, gpu_tables, report, results
from benchmarks.cases import Form, Shape
from benchmarks.gpu_parts import AUTOTUNED, CAPTURED, LATENTS, PAPER
from mghf_fast import backends, ops, preferences, workloads
from mghf_fast.measure import Measurement
from mghf_fast.ops import _dispatch

CASES = cases.load_all()
OPS = sorted(CASES)
CEILINGS = {
    "copy_tb_per_s": 4.3,
    "bfloat16_tflop_per_s": 790.0,
    "tf32_tflop_per_s": 400.0,
    "float32_tflop_per_s": 50.0,
}


@pytest.fixture
def gpu_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases with a GPU's forms, until the end of the test."""
    for op, case in CASES.items():
        monkeypatch.setitem(cases.CASES, op, gpu_parts.on_gpu(case))


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


def row(
    form: str, kind: str, seconds: float | None, op: str = "gram", shape: Shape = PAPER, **more: Any
) -> dict[str, Any]:
    part: dict[str, Any] = {"failure": "out of memory"}
    if seconds is not None:
        part = {"median_s": seconds, "min_s": seconds, "peak_mib": 10.0}
    facts = {"op": op, "shape": str(shape), "form": form, "kind": kind, "dtype": "float32"} | more
    return facts | {"parts": {"forward": dict(part), "step": dict(part)}}


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
        }
        for name in commands:
            (folder / f"{name}.log").write_text(logs.get(name, "1 passed in 1s\n"))
        bad = {"dec": "exit code 1: 1 failed", "gpu": "over 9 s", "patches": "over 9 s"}
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
    gpu.run_tests(tmp_path, 9, False)
    assert set(seen) == {*floors.OPS, *(f"{op}-reference" for op in floors.OPS), "gpu"}


# ---- rows ----


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_rows(op: str) -> None:
    case = gpu_parts.on_gpu(CASES[op])
    rows = gpu_parts.rows_of(case, quick=False, compiled=False)
    whole = op in gpu_parts.WHOLE
    assert {shape for shape, _ in rows} >= {Shape(1, s) for s in (256, 512, 1024, 2048)}
    assert rows[0] == (PAPER, "mghf_fast") and (PAPER, "eager") in rows
    assert not any(case.forms[form].compiled for _, form in rows)
    for shape in (Shape(4, 512), Shape(16, 256), LATENTS):
        assert ((shape, "mghf_fast") in rows) == whole
        assert ((shape, "mghf_fast bfloat16") in rows) == whole
        assert ((shape, "mghf_fast" + CAPTURED) in rows) == whole
    quick = gpu_parts.rows_of(case, quick=True, compiled=False)
    assert {shape for shape, _ in quick} == ({PAPER, LATENTS} if whole else {PAPER})


def test_the_losses_to_replace_are_measured_at_every_shape() -> None:
    rows = gpu_parts.rows_of(gpu_parts.on_gpu(CASES["mghf_c"]), quick=False, compiled=False)
    for form in ("VGG-16", "LPIPS AlexNet", "LPIPS VGG-16"):
        assert {shape for shape, name in rows if name == form} == {shape for shape, _ in rows}


def test_compiled_rows() -> None:
    for op, case in CASES.items():
        rows = gpu_parts.rows_of(gpu_parts.on_gpu(case), quick=False, compiled=True)
        expected = op in (*gpu_parts.WHOLE, *gpu_parts.COMPILED_OPS)
        wanted = [(PAPER, "compile"), (PAPER, "compile" + AUTOTUNED)]
        assert rows[:2] == (wanted if expected else [])
        # make bench measures none of these
        assert not any(name.endswith((AUTOTUNED, CAPTURED)) for name in case.forms)


# ---- measuring ----


class Watch(gpu_parts.Host):
    """A clock that runs only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def event(self) -> Any:
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def flush(self) -> None:
        self.now += 1000
        self.calls.append("flush")

    def captured(self, function: Callable[[], object]) -> Callable[[], object]:
        self.calls.append("captured")
        return function


def test_time_is_taken_between_events() -> None:
    watch = Watch()

    def work() -> None:
        watch.now += 3  # milliseconds

    found = gpu_parts.timed(watch, work)
    assert len(found.seconds) == gpu_parts.CALLS == watch.calls.count("flush")
    assert found.seconds == pytest.approx([3e-3] * gpu_parts.CALLS)


def test_what_is_slow_is_called_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "SLOW", 0.01)
    calls = []
    found = gpu_parts.timed(gpu_parts.Host(), lambda: calls.append(time.sleep(0.02)))
    assert len(calls) == 2 and len(found.seconds) == 1 and found.seconds[0] >= 0.02


@pytest.mark.usefixtures("gpu_cases")
def test_how_a_form_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def compiler(function: Any, mode: str) -> Any:
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(gpu_parts, "CALLS", 1)
    watch, tiny = Watch(), Shape(1, 32)

    def measured(op: str, form: str, part: str) -> Measurement:
        return gpu_parts.measure_part(watch, cases.CASES[op], tiny, form, part)

    assert measured("gram", "compile", "step").failure is None
    assert measured("gram", "compile" + AUTOTUNED, "step").failure is None
    assert modes == ["default", "max-autotune"] and "captured" not in watch.calls
    assert measured("mghf_n", "mghf_fast" + CAPTURED, "step").failure is None
    assert "captured" in watch.calls
    monkeypatch.setattr(cases, "package_version", lambda package: None)
    assert measured("sinkhorn", "POT", "forward").failure == "POT is not installed"


def test_a_form_that_fails_is_told() -> None:
    assert gpu_parts.failure(torch.OutOfMemoryError("tried to")) == "out of memory"
    assert gpu_parts.failure(KeyError("a\nb")).startswith("KeyError: ")


def test_a_row_of_table_5_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("tried to")

    monkeypatch.setattr(workloads, "workload", broken)
    written: list[dict[str, Any]] = []
    gpu_parts.table5(Watch(), 64, False, written.append)
    assert [list(r["measured"]) for r in written][:2] == [
        ["mghf_fast", "reference"], ["mghf_fast", "reference", "compile"],
    ]  # fmt: skip
    assert all(m == {"failure": "out of memory"} for r in written for m in r["measured"].values())


@pytest.mark.usefixtures("gpu_cases")
def test_a_whole_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "CALLS", 1)
    written: list[dict[str, Any]] = []
    gpu_parts.run("mghf_n", written.append, quick=True, backend="reference", size=64)
    forms = [r["form"] for r in written]
    assert forms[:2] == ["mghf_fast", "eager"] and "mghf_fast bfloat16" in forms
    for found in written:
        assert found["shape"] == "1x3x64x64" and found["parts"]["step"]["median_s"] > 0
        floors.annotate(found, CEILINGS)
    assert written[0]["parts"]["step"]["times_floor"] > 1
    assert written[0]["backends"] == {"coupling": "reference"}


@pytest.mark.usefixtures("gpu_cases")
def test_ceilings_values_and_table_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "CALLS", 1)

    def part(name: str) -> list[dict[str, Any]]:
        written: list[dict[str, Any]] = []
        gpu_parts.run(name, written.append, quick=True, backend="reference", size=64)
        return written

    (found,) = part("ceilings")
    assert set(found) == set(CEILINGS) and all(rate > 0 for rate in found.values())
    rows = part("table5")
    assert [r["key"] for r in rows] == list(workloads.ROW_OPS)
    assert all(m.get("median_s", 0) > 0 for r in rows for m in r["measured"].values())
    checked = part("values")
    assert {r["op"] for r in checked} == set(floors.OPS) and all(r["passed"] for r in checked)


@pytest.mark.usefixtures("gpu_cases")
def test_wrong_values_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.CASES["gram"]
    wrong = cases.Form(lambda: lambda x: 1.01 * case.forms["eager"].make()(x), "ours")
    monkeypatch.setitem(case.forms, "mghf_fast", wrong)  # type: ignore[arg-type]
    written: list[dict[str, Any]] = []
    gpu_parts.values(written.append)
    assert {r["op"] for r in written if not r["passed"]} == {"gram"}


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


# ---- the peers ----


@pytest.mark.parametrize(
    ("network", "parameters", "shapes"),
    [
        ("alex", 2_470_848, [(64, 15), (192, 7), (384, 3), (256, 3), (256, 3)]),
        ("vgg", 14_716_160, [(64, 64), (128, 32), (256, 16), (512, 8), (512, 4)]),
    ],
)
def test_the_layout_of_lpips(network: str, parameters: int, shapes: list[tuple[int, int]]) -> None:
    """Parameters and stages as in the package lpips, and its formula, by hand."""
    loss = workloads.LPIPSLayout(network)
    assert sum(p.numel() for p in loss.parameters()) == parameters
    sr, gt = workloads.image_pair(64, 2)
    stages = [loss._stages(2 * x.detach() - 1) for x in (sr, gt)]
    assert [tuple(s.shape[1:3]) for s in stages[0]] == shapes
    assert loss(gt, gt) == 0
    expected = 0.0
    for head, s, g in zip(loss.heads, *stages, strict=True):
        torch.testing.assert_close(s.norm(dim=1)[s.norm(dim=1) > 0.5].mean(), torch.tensor(1.0))
        weights = head.get_parameter("weight")[0]
        expected += float((weights * (s - g) ** 2).sum(1).mean())
    assert float(loss(sr, gt).detach()) == pytest.approx(expected, rel=1e-4)
    (gradient,) = torch.autograd.grad(loss(sr, gt), sr)
    assert gradient.isfinite().all() and gradient.norm() > 0


def test_inputs_are_the_same_on_every_device() -> None:
    pairs = zip(workloads.feature_pair(8, 4), workloads.feature_pair(8, 4), strict=True)
    assert all(relative_error(a, b) == 0 for a, b in pairs)
    with torch.device("meta"):
        made = (
            *workloads.image_pair(8), *workloads.feature_pair(8, 4),
            cases.features(Shape(1, 512)), *cases.embeddings(Shape(1, 64)),
        )  # fmt: skip
    assert all(x.device.type == "meta" for x in made)


# ---- tables ----


def a_run(machine: str = "card") -> dict[str, Any]:
    """Made-up figures for every row."""
    rows = []
    for op in OPS:
        case = gpu_parts.on_gpu(CASES[op])
        for compiled in (False, True):
            for shape, form in gpu_parts.rows_of(case, False, compiled):
                kind = case.forms[form].kind
                seconds = {"ours": 1e-3, "eager": 2e-2, "compile": 5e-3, "peer": 4e-3}[kind]
                failed = kind == "eager" and shape == Shape(1, 2048)
                rows.append(
                    row(
                        form,
                        kind,
                        None if failed else seconds,
                        op,
                        shape,
                        dtype=case.forms[form].dtype,
                    )
                )
                floors.annotate(rows[-1], CEILINGS)
    part = {"median_s": 1e-3, "peak_mib": 4.0}
    measured = {"reference": part, "mghf_fast": {"failure": "out of memory"}}
    counts = {"paper_gflop": 8.59, "published_gmacs": 8.59, "ours_gmacs": 2.15}
    return {
        "machine": {"name": machine, "gpu": "NVIDIA Card", "torch": "2.x", "triton": "3.x",
                    "tf32_convolutions": True},
        "ceilings": CEILINGS,
        "state": {"before": {"driver": "580", "power_limit_w": "700", "held_down_by": ["idle"]},
                  "after gram": {"held_down_by": ["software power cap"]}},
        "parts": {"gram": "ok", "dec": "over 20 s"},
        "tests": {"test_gram": "9 passed"},
        "table5": [{"key": "gram", "name": "Gram", "measured": measured} | counts],
        "rows": rows,
    }  # fmt: skip


def test_the_tables() -> None:
    text = gpu_tables.markdown(a_run())
    gram = next(line for line in text.splitlines() if line.startswith("| Gram matrices | "))
    assert gram.startswith(
        "| Gram matrices | 20 ms, 10 MiB | 5 ms, 10 MiB | 5 ms, 10 MiB | 1 ms, 10 MiB | 20x, 5.0x,"
    )
    assert "; " in gram and gram.endswith(" % |")
    assert "Tests on the device: test_gram 9 passed." in text
    assert "**Not complete:** dec over 20 s." in text
    assert "clocks held down by: software power cap; torch 2.x" in text
    assert "copy tb per s 4.3" in text
    assert "| whole MGHF-c step, 32 x 3 x 64 x 64 | 20 ms<br>10 MiB | 1 ms" in text
    assert "out of memory" in text
    assert "| Gram | 8.59 | 8.59 | 2.15 | 1 ms, 4.0 MiB |  | out of memory |" in text
    assert "POT 4 ms, 10 MiB 4.0x" in text
    assert "| VGG-16, for comparison | 4 ms, 10 MiB | 4 ms, 10 MiB | 4 ms, 10 MiB |  |" in text


def test_a_run_of_which_nothing_is_left_has_a_text() -> None:
    empty = a_run() | {"rows": [], "table5": [], "ceilings": {}, "tests": {}, "parts": {"a": "no"}}
    text = gpu_tables.markdown(empty)
    assert "none ran" in text and "**Not complete:** a no." in text


MARKER = "<!-- benchmarks: on GPUs -->\nold\n<!-- benchmarks: end -->\n"


def test_the_readme_has_the_tables_of_every_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (tmp_path / "cpu.json").write_text('{"machine": {}, "rows": []}')
    text, _ = report.generate(f"before\n{MARKER}after\n")
    assert text == f"before\n{MARKER}after\n".replace("old\n", gpu_tables.NONE)
    for name in ("card-a", "card-b"):
        (tmp_path / f"{name}.json").write_text(gpu.to_json(a_run(name)))
    text, _ = report.generate(f"before\n{MARKER}after\n")
    assert text.startswith("before\n<!--") and text.endswith("<!-- benchmarks: end -->\nafter\n")
    assert text.count("| Gram matrices | ") == 2 and "results/card-b.json" in text
    assert report.generate(text)[0] == text


def test_the_readme_says_whether_figures_were_taken() -> None:
    """The block is that of the committed results, and nothing outside it says otherwise."""
    readme = (report.ROOT / "README.md").read_text()
    assert len(report.ON_GPUS.findall(readme)) == 1
    assert report.generate(readme)[0] == readme, "python -m benchmarks.report"
    outside = report.ON_GPUS.sub("", readme)
    assert "No GPU figure" not in outside


# ---- the CUDA kernels beside those of Triton ----


def test_ops_with_two_kinds_of_kernels_have_forms_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [n + t for n in gpu_parts.FORCED.values() for t in ("", gpu_parts.IN_BFLOAT16)]
    assert not set(names) & set(gpu_parts.on_gpu(CASES["entropy"]).forms)
    monkeypatch.setattr(ops.OPS["entropy"], "why_not", lambda backend: None)
    case = gpu_parts.on_gpu(CASES["entropy"])
    assert {case.forms[name].kind for name in names} == {"forced"}
    rows = gpu_parts.rows_of(case, False, False)
    for name in names:
        shapes = {shape for shape, form in rows if form == name}
        assert gpu_parts.PAPER in shapes
        assert (gpu_parts.SIZES[-1] in shapes) == ("bfloat16" not in name)
    assert not set(names) & set(gpu_parts.on_gpu(CASES["mghf_c"]).forms)


def test_a_form_on_a_backend_of_its_own() -> None:
    seen = []
    form = Form(lambda: lambda x: seen.append(backends.current_backend()) or x, "ours")
    function = gpu_parts.with_backend("cuda", form).make()
    with backends.use_backend("triton"):
        assert function(torch.ones(1)) == 1
        assert backends.current_backend() == "triton"
    assert seen == ["cuda"]


@pytest.mark.parametrize("op", ["gram", "sinkhorn", "content_style"])
def test_a_form_with_inputs_of_its_own(op: str) -> None:
    case = CASES[op]
    form = dataclasses.replace(case.forms["mghf_fast"], inputs=torch.bfloat16)
    case = dataclasses.replace(case, forms={"ours": form})
    (gradient,) = case.step(form.make(), gpu_parts.TINY, "ours", "step")()
    assert gradient.dtype == torch.bfloat16


def forced_rows(times: dict[str, float], shape: str = "1x3x512x512") -> list[results.Row]:
    return [
        {"op": "gram", "shape": shape, "form": gpu_parts.FORCED[backend], "kind": "forced",
         "dtype": "float32", "parts": {"step": {"median_s": seconds}}}
        for backend, seconds in times.items()
    ]  # fmt: skip


def test_results_are_held_against_the_table_of_preferences() -> None:
    elements = 128 * 512 * 512
    rules = [
        preferences.Rule("gram", ("triton", "cuda"), below=elements),
        preferences.Rule("gram", ("cuda", "triton")),
    ]
    run = a_run("card") | {"rows": forced_rows({"cuda": 3e-3, "triton": 2e-3})}
    (found,) = gpu_tables.contradictions(run, rules)
    assert found.startswith("card: gram, 1x3x512x512, float32, 33554432 elements: cuda takes 1.50")
    assert "| gram | 1 x 3 x 512 x 512 | float32 | 3 ms | 2 ms | triton |" in gpu_tables.markdown(
        run
    )
    small = forced_rows({"cuda": 3e-3, "triton": 2e-3}, "1x3x256x256")
    assert gpu_tables.contradictions(run | {"rows": small}, rules) == []
    assert gpu_tables.contradictions(run, [preferences.Rule("gram", ("triton",))]) == []
    alike = forced_rows({"cuda": 2.05e-3, "triton": 2e-3})
    assert gpu_tables.contradictions(run | {"rows": alike}, rules) == []
    assert gpu_tables.contradictions(run | {"rows": forced_rows({"cuda": 1.0})}, rules) == []


def test_no_committed_result_contradicts_the_table_of_preferences() -> None:
    assert [text for run in gpu_tables.runs() for text in gpu_tables.contradictions(run)] == []


# ---- the suite on a device ----


def test_the_backends_of_a_cuda_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels and the reference, as if there were a CUDA device."""
    monkeypatch.setattr(backends, "_triton_unavailable_reason", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(_dispatch, "_triton_lacks", lambda device: None)
    probe: Any = SimpleNamespace(
        device=torch.device("cuda"), is_cuda=True, dtype=torch.float32, shape=(1, 2, 2),
        dim=lambda: 3,
    )  # fmt: skip
    for op in floors.OPS:
        assert conftest.runnable_backends(op, probe) == ["triton", "reference"], op


def test_pytorch_is_exact_and_repeatable_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with torch.backends.cudnn.flags(enabled=True), gpu_parts.tf32_products(True):
        try:
            conftest.as_float32_and_repeatable()
            assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic
            assert not torch.backends.cuda.matmul.allow_tf32
            assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
            assert torch.empty(9).isnan().all()  # what is left unwritten shows
        finally:
            torch.use_deterministic_algorithms(False)


def test_what_runs_on_a_device() -> None:
    def item(name: str, *fixtures: str, gpu: bool = False) -> Any:
        marker = object() if gpu else None
        return SimpleNamespace(
            name=name, fixturenames=fixtures, get_closest_marker=lambda _: marker
        )

    assert conftest.runs_on_a_device(item("test_values[triton]", "backend"))
    assert conftest.runs_on_a_device(item("test_bands_of_triton[1-1-7]"))
    assert conftest.runs_on_a_device(item("test_another_stream", gpu=True))
    assert not conftest.runs_on_a_device(item("test_definition", "request"))


def test_where_hypothesis_is_missing() -> None:
    modules: dict[str, ModuleType] = {}
    without_hypothesis.install(modules)
    given, settings = modules["hypothesis"].given, modules["hypothesis"].settings
    strategies = modules["hypothesis.strategies"]
    drawn = strategies.integers(1, 2) | strategies.tuples(strategies.floats()).map(abs)

    def test_any(x: int) -> None:
        raise AssertionError

    stand_in = settings(max_examples=3)(given(x=drawn)(test_any))
    assert stand_in.__name__ == "test_any"
    assert [mark.name for mark in stand_in.pytestmark] == ["skip"]
    with pytest.raises(AttributeError):
        _ = strategies.__file__
