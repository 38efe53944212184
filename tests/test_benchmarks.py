"""The benchmarks: every form computes its op, and results are written, read and compared."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest
import torch
from contract import relative_error

from benchmarks import cases, report, results, short, text
from benchmarks import session as sessions
from benchmarks.cases import Shape
from mghf_fast.commands.table5.measure import Measurement

CASES = cases.load_all()
TINY = cases.WARM_UP
MACHINE = {"name": "toy-2c", "cpu": "Toy", "cores": 2, "threads": 2, "isa": "AVX2", "torch": "2.x"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the forms ----


def outcome(op: str, form: str, part: str) -> torch.Tensor:
    step = CASES[op].step(CASES[op].forms[form].make(), TINY, form, part)
    result = step()
    (tensor,) = result if isinstance(result, tuple) else [result]
    return tensor.detach()


@pytest.mark.parametrize("op", CASES)
def test_every_form_computes_the_same(op: str) -> None:
    for name, form in CASES[op].forms.items():
        if form.compiled or (form.package and cases.package_version(form.package) is None):
            continue
        for part in CASES[op].parts_of(name):
            torch.manual_seed(0)  # for the upstream gradient
            found = outcome(op, name, part)
            assert torch.isfinite(found).all(), name
            if "VGG" not in name and form.dtype == "float32":
                torch.manual_seed(0)
                assert relative_error(found, outcome(op, "eager", part)) < 1e-3, (name, part)


def test_what_is_measured() -> None:
    assert tuple(Shape(1, size) for size in (128, 256, 512, 1024, 2048)) == cases.SIZES
    for op, case in CASES.items():
        shapes = {shape for shape, form, _ in case.rows() if form == "mghf_fast"}
        assert shapes >= {*cases.SIZES, Shape(8, 128)}, op
        assert {shape for shape, *_ in case.rows(quick=True)} == {cases.QUICK}
        assert not any(case.forms[form].compiled for _, form, _ in case.rows(quick=True))
        kinds = {form.kind for form in case.forms.values()}
        assert kinds >= {"ours", "eager", "compile"}, op


def test_the_memory_of_a_row_is_found_in_a_process_of_its_own() -> None:
    found = cases.probe_row(CASES["gram"], TINY, "mghf_fast", 1, [])
    assert list(found) == ["forward", "step"]
    for probed in found.values():
        assert probed.failure is None and len(probed.seconds) == 1
    assert found["step"].peak_bytes and found["step"].peak_bytes > 0
    row = results.new_row("gram", TINY, "mghf_fast", 1, found)
    assert row["shape"] == "1x3x64x64" and row["threads"] == 1 and row["dtype"] == "float32"
    assert row["kind"] == "ours" and set(row["backends"]) == {"gram"}
    assert {"forward", "step"} <= set(row["parts"]) <= {"forward", "step", "backward"}
    assert row["versions"]["torch"] == torch.__version__


def test_failures_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.LIMITS, "eager", 0.1)
    found = cases.probe_row(CASES["entropy"], TINY, "eager", 1, [])
    assert found["forward"].failure == "over 0 s"
    monkeypatch.setattr(cases, "package_version", lambda package: None)
    found = cases.probe_row(CASES["sinkhorn"], TINY, "POT", 1, [])
    assert found["forward"].failure == "POT is not installed"
    assert cases.said("killed, out of memory", 9) == "out of memory"
    assert cases.said("KeyError: 'a bug'", 9) == "KeyError: 'a bug'"


def test_what_need_not_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "available_memory", lambda: 100)

    def after(*earlier: tuple[float, int] | str) -> str | None:
        measured = [
            Measurement(failure=e) if isinstance(e, str) else Measurement((e[0],), e[1])
            for e in earlier
        ]
        return cases.hopeless(measured, 120)

    assert after() is None
    assert after((1, 1), "out of memory") == "out of memory"
    assert after((29, 1)) is None
    assert after((31, 1)) == "over 120 s"
    assert after((1, 1), (10, 1)) is None
    assert after((1, 1), (16, 1)) == "over 120 s"  # grows 16 times per size
    assert after((31, 26)) is None  # it may run out of memory, which must be seen


# ---- results ----


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("AMD EPYC", 2, 2, 26, 2), "epyc-zen5-2c"),
        (("AMD EPYC", 2, 1, 26, 2), "epyc-zen5-2c-1t"),
        (("AMD Ryzen 9 5950X 16-Core Processor", 16, 16, 25, 0x21), "ryzen-9-5950x-zen3-16c"),
        (("AMD EPYC 9654 96-Core Processor", 96, 96, 25, 0x11), "epyc-9654-zen4-96c"),
        (("Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", 28, 28, 6, 79), "xeon-e5-2680-v4-28c"),
        (("", 4, 4), "cpu-4c"),
    ],
)
def test_machine_names(arguments: tuple[Any, ...], name: str) -> None:
    assert results.machine_name(*arguments) == name


def row(form: str, seconds: float | str, kind: str = "ours", op: str = "gram", **more: Any) -> Any:
    part: dict[str, Any] = {"failure": seconds}
    if not isinstance(seconds, str):
        part = {"median_s": seconds, "min_s": seconds, "peak_mib": 10.0, "rounds": 3, "spread": 0.0}
    shape = more.get("shape", "1x3x512x512")
    return {"op": op, "shape": shape, "form": form, "kind": kind, "parts": {"step": part}}


def run_of(*rows: Any, **machine: Any) -> results.Run:
    return {"machine": MACHINE | machine, "rows": list(rows)}


COMMITTED = run_of(
    row("mghf_fast", 1.0), row("eager", 10.0, "eager"), row("compile", 4.0, "compile")
)


def test_a_row_is_measured_against_its_baseline() -> None:
    def compared(ours: float, eager: float, compiled: float) -> results.Comparison:
        rows = (row("eager", eager, "eager"), row("compile", compiled, "compile"))
        return results.compare(run_of(row("mghf_fast", ours), *rows), COMMITTED)

    assert not compared(1.14, 10, 4).failures
    assert not compared(2.2, 20, 8).failures  # a machine half as fast
    assert not compared(1.1, 1, 4).failures  # the baseline is the fastest of the committed ones
    found = compared(1.16, 10, 4)
    assert found.slower == [("gram", "1x3x512x512", "mghf_fast", "compile")]
    (text,) = found.failures
    assert text.startswith("gram, 1x3x512x512, mghf_fast, step: 1.16 times as slow against compile")
    assert not compared(0.6, 10, 2.5).slower and compared(0.8, 10, 2.5).slower


def test_only_a_baseline_that_ran_in_both_counts() -> None:
    eager, failed = row("eager", 10.0, "eager"), row("compile", "out of memory", "compile")
    assert not results.compare(run_of(row("mghf_fast", 1.1), eager, failed), COMMITTED).failures
    assert results.compare(run_of(row("mghf_fast", 1.2), eager, failed), COMMITTED).slower
    found = results.compare(run_of(row("mghf_fast", 9.0)), COMMITTED)
    assert not found.failures and "no baseline ran in both" in found.notes[0]


def test_what_cannot_be_compared_is_said() -> None:
    rows = COMMITTED["rows"]
    (text,) = results.compare(run_of(*rows), None).failures
    assert text == "there is no committed result of toy-2c"
    (text,) = results.compare(run_of(*rows, cpu="Other"), COMMITTED).failures
    assert text == "another machine: cpu is 'Other', in the committed result 'Toy'"
    (text,) = results.compare(run_of(*rows[1:]), COMMITTED).failures
    assert text == "gram, 1x3x512x512, mghf_fast, step: not in this run"
    found = results.compare(run_of(*rows[1:]), COMMITTED, partial=True)
    assert not found.failures and "not in this run" in found.notes[0]
    broken = run_of(row("mghf_fast", "out of memory"), *rows[1:])
    assert results.compare(broken, COMMITTED).failures[0].endswith("step: out of memory")
    more = run_of(row("mghf_fast", 1.0, op="dec"), *rows)
    assert results.compare(more, COMMITTED).notes == ["dec, 1x3x512x512, mghf_fast: new"]


def test_files() -> None:
    rows = [row("b", 1.0), row("a", 1.0, shape="1x3x1024x1024"), row("a", 1.0)]
    text = results.to_json(run_of(*rows))
    assert text == results.to_json(run_of(*reversed(rows)))
    read = json.loads(text)
    assert [(r["form"], r["shape"]) for r in read["rows"]] == [
        ("a", "1x3x512x512"), ("b", "1x3x512x512"), ("a", "1x3x1024x1024"),
    ]  # fmt: skip
    newer = run_of(row("c", 2.0), torch="3")
    merged = results.merge(read, newer)
    assert [(r["form"], r["shape"]) for r in merged["rows"]] == [
        ("a", "1x3x1024x1024"), ("c", "1x3x512x512"),
    ]  # fmt: skip
    assert merged["machine"]["torch"] == "3"


def test_exponents() -> None:
    assert results.exponent([(x, 3 * x**1.5) for x in (1, 4, 16)]) == pytest.approx(1.5)
    assert results.exponent([(1, 1), (4, 4)]) is None


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_a_result_names_no_host_and_no_path(path: Path) -> None:
    text = path.read_text()
    assert f'"{os.uname().nodename}"' not in text
    assert not re.search(r'"/\w+|/(home|root|tmp|work|usr)/', text)


# ---- README and plots ----


def a_whole_run() -> results.Run:
    """Synthetic figures for every row: MGHF-c's eager form runs out of memory from 1024 on."""
    rows = []
    for op, case in CASES.items():
        for shape, form in dict.fromkeys(r[:2] for r in case.rows()):
            pixels, kind = shape.batch * shape.size**2, case.forms[form].kind
            seconds = pixels * (1e-7 if kind == "ours" else 1e-6)
            failed = op == "mghf_c" and kind == "eager" and shape.size >= 1024
            measured = Measurement((seconds,) * 3, pixels * 100)
            if failed:
                measured = Measurement(failure="out of memory")
            parts = dict.fromkeys(case.parts_of(form), measured)
            rows.append(results.new_row(op, shape, form, 2, parts))
    return run_of(*rows)


@pytest.fixture
def whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> results.Run:
    run = a_whole_run()
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (tmp_path / "toy-2c.json").write_text(results.to_json(run))
    return run


MARKERS = "".join(
    f"<!-- benchmarks: {kind} of toy-2c -->\nold\n<!-- benchmarks: end -->\n"
    for kind in report.BLOCKS
)


def test_blocks(whole_run: results.Run) -> None:
    text, files = report.generate(f"before\n{MARKERS}after\n")
    assert text.startswith("before\n") and text.endswith("after\n") and "old\n" not in text
    assert text == report.generate(text)[0]
    assert "| MGHF-c | 26 ms, 25 MiB | 0.1 x |" in text
    assert "| **whole MGHF-c step** | 262 ms, 25 MiB | 262 ms, 25 MiB | **26 ms, 25 MiB** |" in text
    assert "10x, 10x" in text and "POT 262 ms, 25 MiB (10x)" in text
    line = next(x for x in text.splitlines() if "MGHF-c step**, mghf_fast" in x)
    assert line.endswith("| 1.00, 1.00 |")
    assert text.count("| out of memory | out of memory |") == 1
    assert set(files) == {"toy-2c-step.svg", "toy-2c-ops.svg"}
    assert "eager, exponent 1.00, out of memory at 1024" in files["toy-2c-step.svg"]
    for name, svg in files.items():
        assert f'src="docs/assets/{name}"' in text
        ElementTree.fromstring(svg)


def test_a_run_with_holes_still_gives_tables(whole_run: results.Run) -> None:
    holes = copy.deepcopy(whole_run)
    holes["rows"] = [r for r in holes["rows"] if r["op"] == "gram"][::2]
    (results.RESULTS / "toy-2c.json").write_text(results.to_json(holes))
    assert "Gram matrices" in report.generate(MARKERS)[0]


def test_without_a_result_a_block_stays() -> None:
    text = MARKERS.replace("toy-2c", "nowhere-1c")
    assert report.generate(text) == (text, {})


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4.2e-6, "4.2 us"), (4.24e-5, "42 us"), (0.00042, "0.42 ms"), (0.0042, "4.2 ms"),
     (0.0281, "28 ms"), (0.99, "990 ms"), (1.0, "1.00 s"), (51.73, "51.7 s"),
     (123.4, "123 s")],
)  # fmt: skip
def test_durations(seconds: float, said: str) -> None:
    assert text.duration(seconds) == said


@pytest.mark.parametrize("page", report.PAGES)
def test_a_page_says_what_the_committed_results_say(page: str) -> None:
    before = (report.ROOT / page).read_text()
    machines = {match[2] for match in report.MARKED.findall(before)}
    assert machines
    text, files = report.generate(before, page)
    assert text == before, f"{page} differs from its results: python -m benchmarks.report"
    for name, svg in files.items():
        assert (report.ROOT / "docs" / "assets" / name).read_text() == svg, name
    for link in re.findall(r"\]\(([^)#:]+)[)#]|src=\"([^\"]+)\"", text):
        assert ((report.ROOT / page).parent / "".join(link)).exists(), link
    if missing := {machine for machine in machines if results.load(machine) is None}:
        pytest.skip(f"no committed result yet of {', '.join(missing)}")


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ((0.2, 0.4), "both are cheaper"),
        ((2.4, 4.6), "neither saves time there"),
        ((0.5, 1.5), "only MGHF-n saves time"),
        ((1.02, 1.5), "neither saves much time"),
    ],
)
def test_a_judgement_follows_from_the_figures(ratios: tuple[float, float], verdict: str) -> None:
    text = short.judgement("a card", list(zip(("MGHF-n", "MGHF-c"), ratios, strict=True)))
    assert (text.startswith("On a card, MGHF-n takes") and text.endswith(f"{verdict}.")) or (
        verdict in text
    )
    assert "was not" in short.judgement("a card", []) or "were not" in short.judgement("a card", [])
    one = short.judgement("a card", [("MGHF-n", 0.5)])
    assert "MGHF-n takes 0.5 times as long" in one and one.endswith("than what it replaces.")


# ---- a session ----


class Benchmark:
    """As much of pytest-benchmark's fixture as a row needs; it times nothing."""

    def __init__(self) -> None:
        self.disabled, self.extra_info = False, dict[str, Any]()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[2.0, 1.0, 3.0]))
        self.rounds: int | None = None

    def __call__(self, step: Callable[[], object]) -> None:
        step()

    def pedantic(self, step: Callable[[], object], *, rounds: int, setup: Any = None) -> None:
        self.rounds = rounds
        for _ in range(rounds):
            if setup is not None:
                setup()
            step()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> sessions.Recorder:
    """Its rows are probed without a process: a tenth of a second and a mebibyte each."""

    def probe_row(case: cases.Case, *_: Any, **__: Any) -> dict[str, Measurement]:
        return dict.fromkeys(case.parts, Measurement((0.1,), 1 << 20))

    monkeypatch.setattr(cases, "probe_row", probe_row)
    return sessions.Recorder(1, "toy-1c", "cpu")


ROW = (CASES["gram"], TINY, "eager")


def test_what_pytest_benchmark_times_is_the_row(recorder: sessions.Recorder) -> None:
    benchmark = Benchmark()
    for part in ("forward", "step"):
        recorder.time(benchmark, *ROW, part)
    assert benchmark.rounds is None
    assert benchmark.extra_info["peak_mib"] == 1.0 and benchmark.extra_info["device"] == "cpu"
    assert benchmark.extra_info["threads"] == 1 and "torch" in benchmark.extra_info["versions"]
    (row,) = recorder.run()["rows"]
    assert row["parts"]["step"] == {
        "median_s": 2.0, "min_s": 1.0, "spread": 0.5, "rounds": 3, "peak_mib": 1.0
    }  # fmt: skip
    assert row["parts"]["backward"] == {"median_s": 0.0}


def test_a_backward_is_never_negative() -> None:
    found = {"forward": Measurement((2.0,)), "step": Measurement((1.0,))}
    assert "backward" not in results.new_row("gram", TINY, "mghf_fast", 1, found)["parts"]


@pytest.mark.parametrize(("budget", "rounds"), [(0.6, None), (0.25, 3), (0.01, 1)])
def test_what_is_slow_is_timed_as_often_as_its_budget_allows(
    recorder: sessions.Recorder, monkeypatch: pytest.MonkeyPatch, budget: float, rounds: int | None
) -> None:
    monkeypatch.setitem(cases.BUDGETS, "eager", budget)
    benchmark = Benchmark()
    recorder.time(benchmark, *ROW, "forward")
    assert benchmark.rounds == rounds


def test_what_cannot_be_timed_is_skipped_with_its_reason(
    recorder: sessions.Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_with(error: Exception) -> None:
        def prepare(*_: Any) -> Callable[[], object]:
            raise error

        monkeypatch.setattr(recorder, "prepare", prepare)
        recorder.time(Benchmark(), *ROW, "step")

    for error in (MemoryError(), RuntimeError("can't allocate memory: 1 byte")):
        with pytest.raises(pytest.skip.Exception, match="out of memory"):
            fails_with(error)
    with pytest.raises(pytest.fail.Exception, match="KeyError: 'a bug'"):
        fails_with(KeyError("a bug"))
    with pytest.raises(pytest.skip.Exception, match="over 9 s"):
        fails_with(TimeoutError("over 9 s"))
    assert recorder.run()["rows"][0]["parts"] == {"step": {"failure": "over 9 s"}}

    monkeypatch.setattr(sessions, "available_memory", lambda: 1 << 19)
    with pytest.raises(pytest.skip.Exception, match="out of memory"):
        recorder.time(Benchmark(), *ROW, "forward")


def test_a_disabled_benchmark_runs_and_leaves_no_row(recorder: sessions.Recorder) -> None:
    benchmark = Benchmark()
    benchmark.disabled = True
    recorder.time(benchmark, *ROW, "forward")
    assert not recorder.rows and not recorder.probed


def test_a_time_limit() -> None:
    with pytest.raises(TimeoutError, match="over 0 s"), sessions.within(0.05):
        time.sleep(5)
    with sessions.within(0.05):
        pass
    time.sleep(0.1)  # no alarm is left


def test_a_row_is_timed_once_more(recorder: sessions.Recorder) -> None:
    recorder.time(Benchmark(), *ROW, "forward")
    recorder.again("gram", TINY, "eager")
    (row,) = recorder.run()["rows"]
    assert 0 < row["parts"]["forward"]["median_s"] < 1.0
    assert row["parts"]["forward"]["peak_mib"] == 1.0


class Event:
    """Events of a device on which a second passes between any two."""

    made: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.number = len(self.made)
        self.made.append("made")

    def record(self) -> None:
        self.made.append("recorded")

    def synchronize(self) -> None:
        self.made.append("waited for")

    def elapsed_time(self, other: Event) -> float:
        return 1e3


def test_the_timer_of_a_device() -> None:
    timer = sessions.DeviceTimer(Event)
    assert [timer() for _ in range(3)] == [0.0, 1.0, 2.0]
    assert Event.made[:3] == ["made", "recorded", "waited for"]


def test_a_row_on_a_gpu(recorder: sessions.Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is PyTorch's own count, and the cache is flushed before each call."""

    class Gpu:
        flushed = 0

        def peak(self, step: Callable[[], object]) -> int:
            step()
            return 2 << 20

        def flush(self) -> None:
            self.flushed += 1

        def clear(self) -> None: ...

    gpu, benchmark = Gpu(), Benchmark()
    monkeypatch.setattr(recorder, "gpu", gpu)
    recorder.time(benchmark, *ROW, "forward")
    least, most = sessions.ROUNDS_ON_GPU
    assert benchmark.rounds is not None and least <= benchmark.rounds <= most
    assert gpu.flushed == benchmark.rounds
    assert benchmark.extra_info["peak_mib"] == 2.0


def session(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    one = ["benchmarks", "-k", "bench_entropy and 1x3x128x128-eager-", "--threads", "1"]
    return subprocess.run(
        [*command, *one, *options], cwd=report.ROOT, capture_output=True, text=True
    )


def test_a_session_writes_and_compares(tmp_path: Path) -> None:
    """Both ways: with the results of this project, and with pytest-benchmark's own."""
    trial = report.ROOT / "build" / "bench" / "a-test-1c.json"
    trial.unlink(missing_ok=True)
    own = [f"--benchmark-storage={tmp_path}", "--benchmark-save=first"]
    done = session("--machine", "a-test-1c", "--compare", *own)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WORSE: there is no committed result of a-test-1c" in done.stdout
    run = json.loads(trial.read_text())
    trial.unlink()
    assert run["machine"]["name"] == "a-test-1c" and run["machine"]["threads"] == 1
    (only,) = run["rows"]
    assert only["op"] == "entropy" and only["parts"]["forward"]["median_s"] > 0
    (saved,) = tmp_path.rglob("*first.json")
    (timed,) = json.loads(saved.read_text())["benchmarks"]
    assert timed["extra_info"]["peak_mib"] == only["parts"]["forward"]["peak_mib"]
    assert timed["stats"]["median"] == pytest.approx(only["parts"]["forward"]["median_s"], rel=1e-3)

    again = ["--benchmark-compare", "--benchmark-compare-fail=min:100000%", "--benchmark-cprofile"]
    done = session("--machine", "a-test-1c", own[0], *again, "tottime")
    assert done.returncode == 0 and "0001_first" in done.stdout, done.stdout + done.stderr
    assert "entropy" in done.stdout and "ncalls" in done.stdout
    trial.unlink()


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = session("--device", "cuda")
    assert done.returncode and "--device is cuda, but PyTorch finds no CUDA device" in done.stderr


def test_another_library_can_be_named(tmp_path: Path) -> None:
    """`make asan` relies on it, and must not pass on plain PyTorch if the library is missing."""
    code = "from mghf_fast import native; print(native.unavailable_reason())"
    environment = os.environ | {"MGHF_NATIVE_LIBRARY": str(tmp_path / "none.so")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "MGHF_NATIVE_LIBRARY is" in done.stdout and "no such file" in done.stdout
