"""What is compiled ahead of time: every Triton kernel as the ops launch it, and the table of it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")
from mghf_fast import kernels
from tools import native_resources, resources
from tools.cases import CASES, Launch

OF_ALL_OPS = """
import json
from tools.cases import CASES
from tools.resources import rows
found = {name: launch.kernel.__name__ for op in CASES for name, launch in rows(op, 90).items()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def launched() -> dict[str, str]:
    """Row -> kernel, found in another process: one that has looked can launch nothing."""
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


def entry(**changes: Any) -> resources.Resources:
    return {"of": "1", "registers": 40, "spilled_bytes": 0, "shared_bytes": 1024} | changes


def test_problems_are_spills_and_too_much_shared_memory() -> None:
    table = {"gram: k, case": {"sm_80": entry(), "sm_90": entry(spilled_bytes=8)}}
    assert resources.problems(table) == ["gram: k, case, sm_90: spills 8 bytes"]
    table = {"gram: k, case": {"sm_80": entry(shared_bytes=120 << 10)}}
    assert "shared memory 122880 > 101376" in resources.problems(table)[0]
    table = {"gram: k, case": {"sm_90a": entry(shared_bytes=120 << 10)}}
    assert resources.problems(table) == []


def test_differences_name_the_row_and_the_architecture() -> None:
    committed = {"gram: k, case": {"sm_80": entry(), "sm_90": entry()}}
    assert resources.differences(committed, committed) == []
    found = {"gram: k, case": {"sm_90": entry(registers=41)}, "gram: new": {"sm_80": entry()}}
    first, second = resources.differences(found, committed)
    assert first.startswith("gram: k, case, sm_90: {") and "'registers': 41" in first
    assert second.startswith("gram: new, sm_80: not in the table -> {")


def test_a_merge_keeps_the_other_architectures() -> None:
    old = {"b": {"sm_90": entry()}, "a": {"sm_80": entry()}}
    merged = resources.merged(old, {"b": {"sm_80": entry(registers=1)}})
    assert list(merged) == ["a", "b"]
    assert merged["b"] == {"sm_80": entry(registers=1), "sm_90": entry()}


def launch(**changes: Any) -> Launch:
    from mghf_fast.kernels.gram import _sum_kernel

    known = Launch("case", _sum_kernel, {"partial": "*fp32"}, {(1,): 8}, {}, {"num_warps": 4})
    return dataclasses.replace(known, **changes)


def test_a_fingerprint_is_of_the_source_and_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    of = resources.fingerprint(launch())
    assert resources.fingerprint(launch(case="another")) == of
    for changes in (
        {"signature": {"partial": "*fp16"}},
        {"constants": {(1,): 16}},
        {"attributes": {(0,): [["tt.divisibility", 16]]}},
        {"options": {"num_warps": 8}},
    ):
        assert resources.fingerprint(launch(**changes)) != of
    kernel = launch().kernel
    monkeypatch.setattr(kernel, "_src", kernel.src + "    # changed\n")
    assert resources.fingerprint(launch()) != of


def test_a_fingerprint_is_of_called_functions_and_constants_too() -> None:
    from mghf_fast.kernels.content_style_forward import _merge_kernel

    sources = resources._sources(_merge_kernel)
    assert {"_merge_kernel", "_load_double", "VARIANCE_FLOOR"} <= set(sources)


# ---- the check ----

ROWS = ("gram: k, first", "gram: k, second", "gram: other, first")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> resources.Table:
    """Two kernels in three rows, whose fingerprints are the names; it is committed, and compiling
    finds again what it says."""
    kernels_of = {row: SimpleNamespace(__name__=row.split(" ")[1], row=row) for row in ROWS}
    launched = {row: launch(kernel=kernel, case=row) for row, kernel in kernels_of.items()}
    monkeypatch.setattr(resources, "rows", lambda op, architecture: launched)
    monkeypatch.setattr(resources, "fingerprint", lambda launch: launch.case)
    monkeypatch.setattr(resources, "TABLES", tmp_path)

    def compile_rows(jobs: list[tuple[str, int]]) -> resources.Table:
        found: resources.Table = {}
        for row, architecture in jobs:
            found.setdefault(row, {})[f"sm_{architecture}"] = entry(of=row)
        return found

    monkeypatch.setattr(resources, "compile_rows", compile_rows)
    made = {row: {f"sm_{a}": entry(of=row) for a in resources.ARCHITECTURES} for row in ROWS}
    resources.write(made, resources.path_of_table())
    return made


def test_every_kernel_is_compiled_once_and_with_all_every_row(table: resources.Table) -> None:
    jobs = resources.to_compile(table, ["gram"], every=False)
    assert sorted(jobs) == [(row, a) for row in (ROWS[0], ROWS[2]) for a in (80, 90, 100)]
    assert len(resources.to_compile(table, ["gram"], every=True)) == 9
    table[ROWS[1]]["sm_90"]["of"] = "of another source"
    assert resources.changed(table, ["gram"]) == [(ROWS[1], 90)]
    assert (ROWS[1], 90) in resources.to_compile(table, ["gram"], every=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table[ROWS[1]]["sm_90"].update(of="of another source"),
        lambda table: table[ROWS[0]]["sm_80"].update(registers=41),
        lambda table: table.pop(ROWS[1]),
        lambda table: table.update({"gram: gone, first": {"sm_80": entry()}}),
        lambda table: table[ROWS[1]]["sm_80"].update(spilled_bytes=8),
    ],
)
def test_the_check_fails_where_the_table_is_not_what_is_launched(
    table: resources.Table, change: Callable[[resources.Table], object]
) -> None:
    assert resources.main(["gram"]) == 0
    change(table)
    resources.write(table, resources.path_of_table())
    assert resources.main(["gram"]) == 1


def test_writing_compiles_the_changes_and_drops_what_is_gone(table: resources.Table) -> None:
    del table[ROWS[1]]
    table["gram: gone, first"] = table["dec: k, first"] = {"sm_80": entry()}
    resources.write(table, resources.path_of_table())
    assert resources.main(["--write", "gram"]) == 0
    written = json.loads(resources.path_of_table().read_text())
    assert sorted(written) == ["dec: k, first", *ROWS]


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
"""


def test_the_resources_of_cuda_kernels_are_read_from_their_library() -> None:
    rest = {"shared_bytes": 64}
    assert native_resources.parse(DUMP) == {
        "copy<true>": {
            "sm_80": {"registers": 40, "spilled_bytes": 0, **rest},
            "sm_90a": {"registers": 38, "spilled_bytes": 12, **rest},
        }
    }


def test_the_table_of_cuda_kernels_knows_its_sources(tmp_path: Path) -> None:
    """Whatever part of its architectures is compiled; words in comments make no difference."""
    (tmp_path / "a.cu").write_text("int a;  // one\n")
    (tmp_path / "a.h").write_text("int b;\n")
    (tmp_path / "a.cpp").write_text("int c;\n")
    sources = native_resources.fingerprint(tmp_path)
    (tmp_path / "a.cu").write_text("int  a;  // another\n")
    (tmp_path / "a.cpp").write_text("int d;\n")
    assert native_resources.fingerprint(tmp_path) == sources
    (tmp_path / "a.h").write_text("int d;\n")
    assert native_resources.fingerprint(tmp_path) != sources

    row = {"registers": 40, "spilled_bytes": 0, "shared_bytes": 64}
    committed = {"sources": {"fingerprint": sources}, "copy": {"sm_80": row, "sm_90a": row}}
    news = native_resources.news
    assert news({"copy": {"sm_90a": row}}, committed, sources) == []
    assert news({"copy": {"sm_90a": row}}, committed, "other") == [
        "the table was made from other sources"
    ]
    (found,) = news({"copy": {"sm_90a": row | {"registers": 41}}}, committed, sources)
    assert found.startswith("copy, sm_90a: ")
    assert news({}, committed, sources) == ["copy: is no more"]


def test_only_what_no_kernel_may_do_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A spill does, another count of registers than the table's is told."""
    library = tmp_path / "lib.so"
    facts = {"cuda": {"version": "99.0.1", "architectures": ["9.0a"]}}
    library.with_name("build.json").write_text(json.dumps(facts))
    row = {"registers": 40, "spilled_bytes": 0, "shared_bytes": 64}
    found = {"copy": {"sm_90a": row}}
    monkeypatch.setattr(native_resources, "measure", lambda path: found)
    monkeypatch.setattr(native_resources, "TABLES", tmp_path)
    arguments = [str(library), "--sources", str(tmp_path)]
    assert native_resources.main([*arguments, "--write"]) == 0
    assert native_resources.main(arguments) == 0 and "makes" not in capsys.readouterr().out
    found = {"copy": {"sm_90a": row | {"registers": 41}}}
    assert native_resources.main(arguments) == 0
    assert "copy, sm_90a: " in capsys.readouterr().out
    found = {"copy": {"sm_90a": row | {"spilled_bytes": 4}}}
    assert native_resources.main(arguments) == 1
    assert "spills 4 bytes" in capsys.readouterr().err
    found = {"copy": {"sm_90a": row | {"shared_bytes": 300 << 10}}}
    assert native_resources.main(arguments) == 1
