"""Ahead-of-time compilation of every Triton kernel as the ops launch it, within its limits."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
from mghf_fast import kernels
from tools import limits, native_resources, resources
from tools.cases import CASES
from tools.limits import Resources

OF_ALL_OPS = """
import json
from tools.cases import CASES
from tools.resources import rows
found = {name: launch.kernel.__name__ for op in CASES for name, launch in rows(op, 90).items()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def launched() -> dict[str, str]:
    """Row -> kernel, found in another process, because such a process can launch nothing later."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", OF_ALL_OPS],
                         capture_output=True, text=True, check=True)  # fmt: skip
    found: dict[str, str] = json.loads(run.stdout)
    return found


MODULES = [m.name for m in pkgutil.iter_modules(kernels.__path__)]


@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_is_compiled_ahead_of_time(module: str, launched: dict[str, str]) -> None:
    names = vars(importlib.import_module(f"mghf_fast.kernels.{module}"))
    assert {name for name in names if name.endswith("_kernel")} <= set(launched.values())


def test_rows_say_op_and_kernel(launched: dict[str, str]) -> None:
    assert {resources.op_of(row) for row in launched} == set(CASES)
    assert all(f": {kernel}, " in row for row, kernel in launched.items())


def of(**changes: int) -> Resources:
    return Resources(40, 0, 1024)._replace(**changes)


def test_problems_are_spills_and_too_much_shared_memory() -> None:
    table = {("gram: k, case", "sm_80"): of(), ("gram: k, case", "sm_90"): of(spilled_bytes=8)}
    assert limits.problems(table) == ["gram: k, case, sm_90: spills 8 bytes"]
    much = of(shared_bytes=120 << 10)
    (found,) = limits.problems({("gram: k, case", "sm_80"): much})
    assert found == "gram: k, case, sm_80: shared memory 122880 > 101376"
    assert limits.problems({("gram: k, case", "sm_90a"): much}) == []


# ---- the check ----

ROWS = ("gram: k, first", "gram: k, second", "gram: other, first")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Resources]:
    """Two kernels in three rows, with their compiled resources."""
    launched = {row: SimpleNamespace(kernel=SimpleNamespace(__name__=row.split(" ")[1].rstrip(",")))
                for row in ROWS}  # fmt: skip
    found = {row: of() for row in ROWS}
    monkeypatch.setattr(resources, "rows", lambda op, architecture: launched)
    monkeypatch.setattr(
        resources,
        "compile_rows",
        lambda jobs: {(row, f"sm_{a}"): found[row] for row, a in jobs},
    )
    return found


def test_every_kernel_is_compiled_once_and_with_all_every_row(
    compiled: dict[str, Resources],
) -> None:
    jobs = resources.to_compile(["gram"], every=False)
    assert sorted(jobs) == [(row, a) for row in (ROWS[0], ROWS[2]) for a in (80, 90, 100)]
    assert len(resources.to_compile(["gram"], every=True)) == 9


def test_the_check_prints_the_numbers_and_fails_at_the_limits(
    compiled: dict[str, Resources], capsys: pytest.CaptureFixture[str]
) -> None:
    assert resources.main(["gram"]) == 0
    assert (
        "gram: k, first, sm_90: 40 registers, 1024 bytes of shared memory"
        in capsys.readouterr().out
    )
    compiled[ROWS[1]] = of(registers=41, spilled_bytes=8)
    assert resources.main(["gram"]) == 0  # the kernel's second row is skipped
    assert resources.main(["gram", "--all"]) == 1
    assert "gram: k, second, sm_80: spills 8 bytes" in capsys.readouterr().err
    compiled[ROWS[1]] = of(registers=41)
    assert resources.main(["gram", "--all"]) == 0  # a number is not an error


def test_a_check_of_nothing_fails() -> None:
    assert limits.tell({}, "a compiler") == 1


# ---- CUDA ----

DUMP = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN4mghf4cuda4copyILb1EEEvNS0_5ImageIfEEPi:
  REG:40 STACK:0 SHARED:64 LOCAL:0 CONSTANT[0]:472 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
arch = sm_90a
 Function _ZN4mghf4cuda4copyILb1EEEvNS0_5ImageIfEEPi:
  REG:38 STACK:8 SHARED:64 LOCAL:4 CONSTANT[0]:472
 Function _ZN4mghf4cuda12_GLOBAL__N_14copyILb1EEEvNS0_5ImageIfEEPi:
  REG:30 STACK:0 SHARED:64 LOCAL:0 CONSTANT[0]:472
"""


def test_the_resources_of_cuda_kernels_are_read_from_their_library() -> None:
    assert native_resources.parse(DUMP) == {
        ("copy<true>", "sm_80"): Resources(40, 0, 64),
        ("copy<true>", "sm_90a"): Resources(38, 12, 64),
        ("copy<true> #2", "sm_90a"): Resources(30, 0, 64),
    }


def test_only_what_no_kernel_may_do_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "lib.so"
    facts = {"cuda": {"version": "99.0.1", "architectures": ["9.0a"]}}
    library.with_name("build.json").write_text(json.dumps(facts))

    def status(stack: int, shared: int) -> int:
        line = f" Function k: REG:41 STACK:{stack} SHARED:{shared} LOCAL:0"
        monkeypatch.setattr(native_resources, "cuobjdump", lambda path: f"arch = sm_90a\n{line}\n")
        return native_resources.main([str(library)])

    assert status(0, 64) == 0
    assert "nvcc 99.0.1 for 9.0a: 1 compiled, 0 beyond the limits" in capsys.readouterr().out
    assert status(4, 64) == 1
    assert "k, sm_90a: spills 4 bytes" in capsys.readouterr().err
    assert status(0, 300 << 10) == 1
