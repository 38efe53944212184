"""`pytest benchmarks`: pytest-benchmark times the rows that the bench files declare; what it found
becomes results, README, comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import report, results
from benchmarks.cases import Case, Shape
from benchmarks.session import DeviceTimer, Recorder

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
    add(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="on cuda results go to build/bench; the committed ones of GPUs are `make gpu`'s",
    )


RECORDER = pytest.StashKey[Recorder]()


def pytest_configure(config: pytest.Config) -> None:
    option = config.getoption
    if (device := option("--device")) == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device is cuda, but PyTorch finds no CUDA device")
        if option("--compare") or option("--merge"):
            raise pytest.UsageError("--compare and --merge are for results of CPUs")
        # Before the bench files make their weights. It is a mode that costs time in every call, so
        # not for the CPU.
        torch.set_default_device(device)
    torch.set_num_threads(option("--threads"))
    config.stash[RECORDER] = Recorder(option("--threads"), option("--machine"), device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if (case := getattr(metafunc.function, "case", None)) is not None:
        rows = case.rows(metafunc.config.getoption("--quick"))
        ids = ["-".join(map(str, row)) for row in rows]
        metafunc.parametrize(("shape", "form", "part"), rows, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    timer = {"timer": DeviceTimer()} if config.stash[RECORDER].on_gpu else {}
    for item in items:
        if (case := getattr(getattr(item, "function", None), "case", None)) is not None:
            shape, _, part = (item.callspec.params[name] for name in ("shape", "form", "part"))  # type: ignore[attr-defined]
            group = f"{case.op}, {shape}, {part}"
            item.add_marker(pytest.mark.benchmark(group=group, **timer))


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    recorder = request.config.stash[RECORDER]

    def run(case: Case, shape: Shape, form: str, part: str) -> None:
        recorder.time(benchmark, case, shape, form, part)

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
    whole = option("--merge") or not recorder.partial()
    commit = whole and not option("--compare") and not recorder.on_gpu
    path = (results.RESULTS if commit else TRIALS) / f"{recorder.machine}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(results.to_json(run))
    recorder.told.append(f"written: {path.relative_to(report.ROOT)}")
    if commit:
        report.update()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for text in config.stash[RECORDER].told:
        terminalreporter.write_line(text, red=text.startswith("WORSE"))
