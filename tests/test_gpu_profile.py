"""Profiles, iterations and counters of `make gpu` without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from gpu_runs import CASES, a_run

from benchmarks import cases, gpu_parts, gpu_profile, gpu_tables
from benchmarks.cases import Shape
from mghf_fast import backends

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_mix_forward", "_mix_forward"),
        ("void mghf::cuda::(anonymous namespace)::transport<4, true>(mghf::Problem, void*)",
         "transport<4, true>"),
        ("void at::native::vectorized_elementwise_kernel<4, at::Fill<float>, (int)2>(int)",
         "vectorized_elementwise_kernel<4, Fill<float>, (int)2>"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD "),
        ("a" * 200, "a" * 87 + "..."),
    ],
)  # fmt: skip
def test_names_of_kernels(name: str, short: str) -> None:
    assert gpu_profile.kernel_name(name) == short


def test_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with PyTorch's functions as kernels, and without Triton for the iterations."""
    written: list[dict[str, Any]] = []

    def missing(seen: object) -> Any:
        raise ImportError("triton")

    monkeypatch.setattr(gpu_profile, "watched", missing)
    with backends.use_backend("reference"):
        gpu_profile.profiles([Shape(1, 64)], written.append)
    assert [row["op"] for row in written] == ["mghf_n", "mghf_c", "sinkhorn iterations"]
    for row in written[:2]:
        times = [kernel["us"] for kernel in row["kernels"]]
        assert times == sorted(times, reverse=True) and 0 < sum(times) <= row["us"] + 1
        assert all(kernel["launches"] > 0 for kernel in row["kernels"])
    assert "convolution" in str(written[0]["kernels"]) and "failure" in written[2]
    text = gpu_tables.kernels({"profile": written})
    assert "| mghf_n, 1 x 3 x 64 x 64 | us, " in text and "ImportError" in text


@needs_triton
def test_iterations_by_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterations of Triton's `solve`, here replaced by a counter; afterwards it is restored."""
    import torch

    from mghf_fast.kernels import monce, sinkhorn

    def solve(maps: int) -> tuple[Any, ...]:
        return torch.zeros(maps, 3), torch.tensor([[4, 50]] * (maps - 1) + [[50, 50]]).int()

    monkeypatch.setattr(sinkhorn, "solve", solve)
    monkeypatch.setattr(monce, "solve", solve)
    monkeypatch.setattr(gpu_profile, "whole_step", lambda *_: lambda: monce.solve(5))
    monkeypatch.setattr(backends, "unavailable_reasons", dict)
    found = gpu_profile.iterations(Shape(1, 64))
    assert found == {"maps_by_iterations": {"4": 4, "50": 1}}
    assert monce.solve is solve and sinkhorn.solve is solve
    row = {"op": "sinkhorn iterations", "shape": "1x3x64x64"} | found
    assert "4 maps 4, 1 maps 50." in gpu_tables.kernels({"profile": [row]})


# ---- counters ----

CSV = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"
"","","","us","register/thread"
"0","7","mix_forward","12.5","128"
"1","7","mix_forward","13.5","128"
"2","7","transport","99","255"
==PROF== Disconnected
"""


def test_counters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = gpu_profile.read_counters(CSV)
    assert [row["kernel"] for row in rows] == ["mix_forward", "transport"]
    assert rows[0] == {"kernel": "mix_forward", "duration": "12.5", "registers": "128"}
    assert gpu_profile.read_counters("nothing") == []
    text = gpu_tables.counters({"counters": [row | {"commit": "a", "taken": "b"} for row in rows]})
    assert "|  | duration | registers |" in text and "| `transport` | 99 | 255 |" in text

    tables = [{"op": "mghf_n", "kernels": [{"name": "other"}]},
              {"op": "mghf_c", "kernels": [{"name": f"k{i}<1>"} for i in range(9)]}]  # fmt: skip
    command = gpu_profile.counter_command("ncu", gpu_profile.longest(tables), ["python"])
    assert "regex:^(k0|k1|k2|k3|k4|k5)$" in command and command[-1] == "python"

    def run(says: str) -> list[Any]:
        def together(commands: Any, folder: Path, limit: float) -> dict[str, str]:
            (folder / "counters.log").write_text(says)
            return {"counters": "ok"}

        monkeypatch.setattr(gpu_profile, "run_together", together)
        return gpu_profile.run_counters(tables, ["python"], tmp_path, 9)[1]

    monkeypatch.setattr(gpu_profile.shutil, "which", lambda name: None)
    assert run(CSV) == [{"kernel": "ncu", "failure": "is not installed"}]
    monkeypatch.setattr(gpu_profile.shutil, "which", lambda name: name)
    assert run(CSV) == rows
    assert run("ERR_NVGPUCTRPERM")[0]["failure"] == "may not read this machine's counters"
    assert run("")[0]["failure"] == "no counters were read"
    tables.clear()
    assert "no profile" in run(CSV)[0]["failure"]
    assert gpu_tables.counters({"counters": run("")}).startswith("ncu no profile")


def test_the_process_whose_counters_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for op, case in CASES.items():  # they get a GPU's forms, until the end of the test
        monkeypatch.setitem(cases.CASES, op, case)
    gpu_parts.run("counters", lambda row: None, quick=True, backend="reference", size=64)


def test_the_tables_of_a_profile() -> None:
    kernel = {"name": "mix", "us": 3.25, "launches": 2.0}
    table = {"op": "mghf_n", "shape": "1x3x512x512", "us": 3.25, "launches": 2.0,
             "kernels": [kernel]}  # fmt: skip
    text = gpu_tables.markdown(a_run() | {"profile": [table]})
    assert "| `mix` | 3 | 2 |" in text and "us, 3 in all | launches, 2 |" in text
