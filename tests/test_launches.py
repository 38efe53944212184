"""Launches and memory of a whole step stay within the committed limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import launches

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a separate process, because it can launch nothing afterwards."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.launches", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_triton_asks_for_no_more_than_before() -> None:
    pytest.importorskip("triton")
    done = run("--backend", "triton")
    assert done.returncode == 0, done.stderr[-2000:]


def test_cuda_asks_for_no_more_than_before() -> None:
    folder = os.environ.get("MGHF_CUDA_HOST")
    if folder is None:
        pytest.skip("MGHF_CUDA_HOST names no folder")
    done = run("--backend", "cuda", "--host-modules", folder)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_a_host_build(tmp_path: Path) -> None:
    done = run("--backend", "cuda", "--host-modules", str(tmp_path))
    assert done.returncode == 2 and "make cuda-host" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_is_complained_about() -> None:
    name = "cuda mghf_c paper 1x3x512x512"
    counts = launches.Counts({"coupling": 30}, pytorch=10, peak_bytes=400 * launches.MIB)
    assert counts.launches == 40
    assert launches.complaints(name, counts, {name: [40, 400]}) == []
    assert len(launches.complaints(name, counts, {name: [39, 399]})) == 2
    assert len(launches.complaints(name, counts, {})) == 1
    counts.peak_bytes = 451 * launches.MIB
    (text,) = launches.complaints(name, counts, {name: [40, 500]})
    assert "at most 450" in text
    counts = launches.Counts({"coupling": 41})
    (text,) = launches.complaints(name, counts, {name: [41, 1]})
    assert "at most 40" in text
    triton = name.replace("cuda", "triton")
    assert len(launches.complaints(triton, counts, {triton: [41, 1]})) == 1
