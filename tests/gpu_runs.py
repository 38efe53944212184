"""Helpers shared by the tests of `make gpu`: the cases, and synthetic results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks import cases, floors, gpu_parts, gpu_ways
from benchmarks.cases import Shape
from benchmarks.gpu_parts import PAPER

CASES = cases.load_all()
OPS = sorted(CASES)
CEILINGS = {
    "copy_tb_per_s": 4.3,
    "bfloat16_tflop_per_s": 790.0,
    "tf32_tflop_per_s": 400.0,
    "float32_tflop_per_s": 50.0,
    "launch_us": 3.0,
    "graph_kernel_us": 1.5,
}
SECONDS = {"ours": 1e-3, "forced": 1e-3, "compile": 5e-3, "peer": 4e-3, "eager": 2e-2}


def measured(
    pairs: Sequence[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[dict[str, Any]]:
    """The rows of these pairs, of one call each, on the CPU."""
    monkeypatch.setattr(gpu_parts, "CALLS", 1)
    rows: list[dict[str, Any]] = []
    gpu_ways.measure_ways(gpu_parts.Host(), pairs, {}, rows.append, **options)
    return rows


def row(
    form: str, kind: str, seconds: float | None, op: str = "gram", shape: Shape = PAPER, **more: Any
) -> dict[str, Any]:
    part: dict[str, Any] = {"failure": "out of memory"}
    if seconds is not None:
        part = {"median_s": seconds, "min_s": seconds, "peak_mib": 10.0}
    facts = {"op": op, "shape": str(shape), "form": form, "kind": kind, "dtype": "float32"} | more
    return facts | {"parts": {"forward": dict(part), "step": dict(part)}}


def a_run(machine: str = "card") -> dict[str, Any]:
    """Synthetic figures for every row."""
    rows = []
    for op in OPS:
        case = gpu_parts.on_gpu(CASES[op])
        for which in (gpu_parts.OWN, gpu_parts.OTHERS, gpu_parts.COMPILE):
            for shape, form in gpu_parts.rows_of(case, False, which):
                kind = case.forms[form].kind
                seconds = {
                    "ours": 1e-3,
                    "eager": 2e-2,
                    "compile": 5e-3,
                    "peer": 4e-3,
                    "forced": 1e-3,
                }[kind]
                failed = kind == "eager" and shape == Shape(1, 2048)
                rows.append(
                    row(
                        form,
                        kind,
                        None if failed else seconds,
                        op,
                        shape,
                        dtype=case.forms[form].dtype,
                        **({"backend": "auto", "backends": {op: "cuda"}} if kind == "ours" else {}),
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
