"""What every benchmark shares: the machine's facts, the number of threads, and peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mghf_fast.measure import MIB, machine_facts, peak_memory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=None, help="PyTorch's CPU threads")


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: object, output_json: dict[str, Any]
) -> None:
    """Keeps what a result needs to be read: the machine, the shapes and the spread are in each row;
    single timings, the host's name and its processor flags are not."""
    for key in ("machine_info", "commit_info"):
        output_json.pop(key, None)
    for row in output_json["benchmarks"]:
        for key in ("options", "params", "param", "fullname"):
            row.pop(key, None)
        kept = ("median", "min", "max", "iqr", "rounds")
        row["stats"] = {key: row["stats"][key] for key in kept}


@pytest.fixture(scope="session", autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of PyTorch's CPU threads, as ``--threads`` sets it."""
    before = torch.get_num_threads()
    if (wanted := request.config.getoption("--threads")) is not None:
        torch.set_num_threads(wanted)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture
def bench(benchmark: Any, threads: int) -> Callable[..., Any]:
    """``bench(step, shape=..., **facts)`` warms ``step`` up, takes the peak memory of one call and
    times it; the machine, dtype, shape, peak and ``facts`` go to the row's ``extra_info``.

    pytest-benchmark decides how often a step is timed, but one of over a second runs only as often
    as fits into twenty seconds, three times at most and once at least.
    """

    def run(
        step: Callable[[], object],
        *,
        shape: str,
        dtype: str = "float32",
        **facts: Any,
    ) -> Any:
        step()
        start = time.perf_counter()
        peak = peak_memory(step)
        seconds = time.perf_counter() - start
        benchmark.extra_info.update(machine_facts(threads))
        benchmark.extra_info.update(
            device="cpu",
            dtype=dtype,
            shape=shape,
            peak_mib=None if peak is None else round(peak / MIB, 1),
            **facts,
        )
        if seconds > 1:
            rounds = max(1, min(3, int(20 / seconds)))
            return benchmark.pedantic(step, rounds=rounds, iterations=1)
        return benchmark(step)

    return run
