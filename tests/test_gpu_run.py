"""The GPU command's own logic, which needs no GPU: parts that fail, rows cut short, the table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, gpu
from benchmarks.cases import Shape

CASES = cases.load_all()


def row(form: str, kind: str, seconds: float | None, op: str = "gram") -> dict[str, Any]:
    part = {"failure": "out of memory"}
    if seconds is not None:
        part = {"median_s": seconds, "min_s": seconds, "peak_mib": 10.0}  # type: ignore[dict-item]
    return {"op": op, "shape": "1x3x512x512", "form": form, "kind": kind, "parts": {"step": part}}


def test_a_part_that_fails_says_how(tmp_path: Path) -> None:
    def run(code: str, limit: float = 60.0) -> str:
        return gpu.run_part([sys.executable, "-c", code], tmp_path / "log", limit)

    assert run("print(1)") == "ok"
    assert run("raise SystemExit('no device')") == "exit code 1: no device"
    assert run("import time; time.sleep(60)", 0.5) == "over 0 s"


def test_a_row_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    assert gpu.read_rows(path) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert gpu.read_rows(path) == [{"a": 1}, {"a": 2}]


def test_the_table_tells_what_failed() -> None:
    rows = [row("mghf_fast", "ours", 1e-3), row("eager", "eager", 2e-2), row("c", "compile", None)]
    text = gpu.markdown(
        {
            "machine": {"gpu": "Card", "torch": "2.x"},
            "ceilings": {"copy_tb_per_s": 4.3},
            "parts": {"gram": "ok", "dec": "over 120 s"},
            "rows": rows,
        }
    )
    assert "| Gram matrices | 1 x 3 x 512 x 512 | 20 ms" in text and "20x" in text
    assert "copy tb per s 4.3" in text and "Not complete: dec: over 120 s." in text


@pytest.mark.parametrize("op", gpu.OPS)
def test_every_op_has_rows(op: str) -> None:
    case = CASES[op]
    assert gpu.shapes_of(case, True) == [gpu.PAPER]
    assert Shape(1, 2048) in gpu.shapes_of(case, False)
    forms = gpu.forms_of(case, gpu.PAPER, False)
    assert "mghf_fast" in forms and "eager" in forms
    assert not any(case.forms[form].compiled for form in gpu.forms_of(case, gpu.PAPER, True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err
