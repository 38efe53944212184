"""Table 5 end to end on small images, and its measurements."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mghf_fast.commands.cli import main
from mghf_fast.commands.memory import peak_memory
from mghf_fast.commands.table5 import cost, measure, workloads
from mghf_fast.commands.table5 import table as table5

MIB = measure.MIB


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, because tiny steps gain nothing from more and suffer when the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_json_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["table5", "--size", "64", "--rows", "gram", "dfe_mse", "--rounds", "2"]
    assert main([*words, "--skip-compile", "--threads", "1", "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["machine"]["threads"] == 1
    assert facts["setting"]["height"] == 64
    assert [row["key"] for row in facts["rows"]] == ["gram", "dfe_mse"]
    gram, dfe_mse = facts["rows"]
    assert gram["paper"] == {"gflops": 8.59, "mib": 512.13, "parameters_m": 0.0}
    assert gram["published"]["gmacs"] == pytest.approx(2 * 128**2 * 64**2 / 1e9)
    assert set(gram["measured"]) == {"reference", "mghf_fast"}
    assert set(dfe_mse["measured"]) == {"reference"}
    for row in facts["rows"]:
        for result in row["measured"].values():
            assert result["failure"] is None
            assert len(result["seconds"]) == 2 and result["median_s"] > 0
            assert result["peak_bytes"] is None or result["peak_bytes"] >= 0
    assert any("2485.40" in note for note in facts["notes"])


def test_text_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "table5.json"
    words = ["table5", "--size", "64", "--rows", "correlation", "--rounds", "1", "--skip-memory"]
    assert main([*words, "--skip-compile", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "0.369" in shown and "Correlation" in shown and "64x64" in shown
    assert max(map(len, shown.splitlines())) <= table5.WIDTH
    result = json.loads(file.read_text())["rows"][0]["measured"]["reference"]
    assert result["peak_bytes"] is None and len(result["seconds"]) == 1


def test_a_row_that_runs_out_of_time_is_an_entry() -> None:
    result = table5.measure_row(
        "gram", "reference", 64, rounds=1, threads=1, limit=0.05, memory=False
    )
    assert result.failure == "timed out after 0.05 s"
    assert math.isnan(result.median)
    assert "timed out" in table5.cell(table5._measured(result))


FAILING = """
import torch

def memory(): return lambda: torch.empty(2**48)
def error(): raise KeyError("a bug")
def leave(): raise SystemExit("gone")
"""


@pytest.mark.parametrize(
    ("name", "told"),
    [("memory", "out of memory"), ("error", "KeyError: 'a bug'"), ("leave", "gone")],
)
def test_failures_of_a_process_are_told(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    result = measure.measure_apart(f"failing:{name}", {}, timeout=60)
    assert result.failure is not None and told in result.failure


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")
def test_peak_memory_sees_a_buffer_that_is_gone_again() -> None:
    def function() -> None:
        torch.ones(64 * MIB // 4)

    function()
    peak = peak_memory(function)
    assert peak is not None and 60 * MIB <= peak <= 80 * MIB
    again = peak_memory(lambda: None)
    assert again is not None and again < 8 * MIB


def test_a_slow_function_runs_once_and_a_fast_one_as_often_as_asked() -> None:
    calls = []

    def slow() -> None:
        calls.append(0)
        time.sleep(0.02)

    assert len(measure.measure(slow, rounds=5, budget=0.01).seconds) == 1
    assert len(calls) == 1
    assert len(measure.measure(lambda: None, rounds=4, budget=5, memory=False).seconds) == 4
    with pytest.raises(ValueError, match="rounds is 0"):
        measure.measure(slow, rounds=0)


def test_median_and_spread() -> None:
    found = measure.Measurement((1.0, 4.0, 2.0))
    assert (found.median, found.spread) == (2.0, 1.5)


@pytest.mark.parametrize("row", workloads.BUILDERS)
def test_every_row_runs(row: str) -> None:
    for variant in table5.variants(row):
        if variant == "compile":
            continue
        (gradient,) = workloads.workload(row, variant, 64)()  # type: ignore[misc]
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("row", ["lip", "dfe", "total"])
def test_variants_of_a_row_compute_the_same(row: str) -> None:
    (expected,) = workloads.workload(row, "reference", 64)()  # type: ignore[misc]
    (found,) = workloads.workload(row, "mghf_fast", 64)()  # type: ignore[misc]
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_rows_agree() -> None:
    keys = [row.key for row in cost.table5()]
    assert keys == list(workloads.BUILDERS) == list(workloads.ROW_OPS) == list(cost.ROWS)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("lop", "reference"), "row is 'lop'"), (("lip", "fast"), "variant is 'fast'")],
)
def test_unknown_rows_and_variants_are_named(arguments: tuple[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        workloads.workload(*arguments, 64)


def test_vgg16_has_the_parameters_it_is_counted_with() -> None:
    features = workloads.VGG16Features()
    assert sum(p.numel() for p in features.parameters()) == 14_714_688
    assert list(features.state_dict())[-1] == "28.bias"
