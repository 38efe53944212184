"""Measures the rows that the bench files declare, and keeps them: results, README, comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import cases, report, results
from benchmarks.cases import Case, Shape
from mghf_fast.commands.table5.measure import Measurement

EXPECTED = ("out of memory", "over ", "is not installed")
TRIALS = report.ROOT / "build" / "bench"
HELP = {
    "--quick": "256 x 256 alone, without torch.compile",
    "--compare": "fail if one of our rows is over 15 % slower, against its baseline in the same "
    "run, than in the committed result, which stays as it is",
    "--merge": "put the rows of a partial run into the committed result",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("mghf_fast").addoption
    for option, text in HELP.items():
        add(option, action="store_true", help=text)
    add("--threads", type=int, default=torch.get_num_threads(), help="PyTorch's CPU threads")
    add("--machine", help="the result's name; default: derived from the processor")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if (case := getattr(metafunc.function, "case", None)) is not None:
        rows = case.rows(metafunc.config.getoption("--quick"))
        ids = ["-".join(map(str, row)) for row in rows]
        metafunc.parametrize(("shape", "form", "part"), rows, ids=ids)


class Recorder:
    """The rows of this session, each measured when the first of its parts is asked for."""

    def __init__(self, config: pytest.Config) -> None:
        self.threads: int = config.getoption("--threads")
        self.machine = config.getoption("--machine") or results.this_machine(self.threads)
        self.found: dict[tuple[str, Shape, str], dict[str, Measurement]] = {}
        self.rows: dict[tuple[str, Shape, str], results.Row] = {}
        self.told: list[str] = []

    def measure(self, op: str, shape: Shape, form: str) -> None:
        smaller = [s for s in cases.SIZES if shape in cases.SIZES and s < shape]
        earlier = [self.found[op, s, form] for s in smaller if (op, s, form) in self.found]
        found = cases.measure_row(cases.CASES[op], shape, form, self.threads, earlier)
        self.found[op, shape, form] = found
        self.rows[op, shape, form] = results.new_row(op, shape, form, self.threads, found)

    def run(self) -> results.Run:
        return results.new_run(self.machine, self.threads, list(self.rows.values()))

    def partial(self) -> bool:
        """Whether there are rows that this session did not ask for."""
        rows = [{row[:2] for row in case.rows()} for case in cases.load_all().values()]
        return len(self.rows) < sum(map(len, rows))

    def compare(self) -> results.Comparison:
        """What is slower must be so a second time, measured again together with its baseline."""
        committed, partial = results.load(self.machine), self.partial()
        found = results.compare(self.run(), committed, partial)
        again = {(op, shape, form) for op, shape, *forms in found.slower for form in forms}
        for op, shape, form in list(self.found):
            if (op, str(shape), form) in again:
                self.measure(op, shape, form)
        return results.compare(self.run(), committed, partial) if again else found


RECORDER = pytest.StashKey[Recorder]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDER] = Recorder(config)


class Clock:
    """pytest-benchmark's timer: it advances by what the other process measured."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Callable[..., None]:
    recorder, clock = request.config.stash[RECORDER], Clock()
    request.node.add_marker(pytest.mark.benchmark(timer=clock))

    def run(case: Case, shape: Shape, form: str, part: str) -> None:
        if (case.op, shape, form) not in recorder.found:
            recorder.measure(case.op, shape, form)
        found = recorder.found[case.op, shape, form][part]
        if found.failure is not None:
            expected = any(text in found.failure for text in EXPECTED)
            (pytest.skip if expected else pytest.fail)(found.failure)
        benchmark, durations = request.getfixturevalue("benchmark"), iter(found.seconds)
        benchmark.group = f"{case.op}, {shape}, {part}"
        benchmark.pedantic(lambda: clock.advance(next(durations)), rounds=len(found.seconds))

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    recorder, option = session.config.stash[RECORDER], session.config.getoption
    if not recorder.rows:
        return
    if option("--compare"):
        compared = recorder.compare()
        recorder.told += [f"note: {text}" for text in compared.notes]
        recorder.told += [f"WORSE: {text}" for text in compared.failures]
        recorder.told += [] if compared.failures else ["nothing is slower against its baseline"]
        if compared.failures:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    run, committed = recorder.run(), results.load(recorder.machine)
    if option("--merge") and committed is not None:
        run = results.merge(committed, run)
    commit = not option("--compare") and (option("--merge") or not recorder.partial())
    path = (results.RESULTS if commit else TRIALS) / f"{recorder.machine}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(results.to_json(run))
    recorder.told.append(f"written: {path.relative_to(report.ROOT)}")
    if commit:
        report.update()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for text in config.stash[RECORDER].told:
        terminalreporter.write_line(text, red=text.startswith("WORSE"))
