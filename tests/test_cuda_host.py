"""The CUDA kernels on the host against the float64 reference, under sanitizers too.

`make cuda-host` builds the modules: environment variable MGHF_CUDA_HOST names the folder.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_host import Strided
from torch import Tensor

from mghf_fast.reference.entropy import channel_entropy

FOLDER = os.environ.get("MGHF_CUDA_HOST")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="MGHF_CUDA_HOST names no folder")
KINDS = ("plain", "thread", "address")
RUNTIMES = {"thread": "libtsan.so", "address": "libasan.so"}
Call = tuple[str, tuple[Any, ...]]


def run(kind: str, calls: Sequence[Call], folder: Path) -> subprocess.CompletedProcess[str]:
    """The calls in a process of their own, under the sanitizer of that name."""
    assert FOLDER is not None
    (library,) = Path(FOLDER, kind).glob("mghf_fast_cuda_host*.so")
    environment = os.environ | {
        "TSAN_OPTIONS": "exitcode=66",
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=67",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    if kind in RUNTIMES:
        name = [os.environ.get("CXX", "c++"), f"-print-file-name={RUNTIMES[kind]}"]
        environment["LD_PRELOAD"] = subprocess.check_output(name, text=True).strip()
    (folder / "calls").write_bytes(pickle.dumps(list(calls)))
    script = Path(__file__).with_name("cuda_host.py")
    command = [sys.executable, script, library, folder / "calls", folder / "results"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def results(kind: str, calls: Sequence[Call], folder: Path) -> list[np.ndarray[Any, Any]]:
    done = run(kind, calls, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[np.ndarray[Any, Any]] = pickle.loads((folder / "results").read_bytes())
    return found


def strided(x: Tensor) -> Strided:
    """With the strides of x, in no more memory than it has; the bits of bfloat16."""
    bits = x.view(torch.uint16) if x.dtype == torch.bfloat16 else x
    memory = torch.empty(0, dtype=bits.dtype).set_(bits.untyped_storage())
    return Strided(memory.numpy(), x.storage_offset(), tuple(x.shape), x.stride())


# ---- the net holds ----


@pytest.mark.parametrize(
    ("kind", "good", "bad", "found", "code"),
    [
        ("thread", ("planted_race", True), ("planted_race", False), "data race", 66),
        ("address", ("planted_index", 0), ("planted_index", 1), "heap-buffer-overflow", 67),
        ("address", ("planted_index", 0), ("planted_index", -1), "heap-buffer-overflow", 67),
    ],
)
def test_the_sanitizers_find_planted_faults(
    kind: str, good: tuple[str, int], bad: tuple[str, int], found: str, code: int, tmp_path: Path
) -> None:
    x = np.arange(64, dtype=np.int32)
    (result,) = results(kind, [(good[0], (x, good[1]))], tmp_path)
    assert (result == (x[::-1] if good[0] == "planted_race" else x)).all()
    done = run(kind, [(bad[0], (x, bad[1]))], tmp_path)
    assert done.returncode == code and found in done.stderr


# ---- entropy ----


def images() -> list[tuple[Tensor, int]]:
    """Of every type and layout, odd sizes, more channels than a warp has lanes, more bins than a
    block counts in its shared memory, constant maps, NaN and infinities."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, 9)
    x[0, 1] = 3.0
    broken = torch.randn(1, 4, 5, 5)
    broken[0, 0, 2, 2], broken[0, 1, 0, 0], broken[0, 2, 4, 4] = torch.nan, torch.inf, -torch.inf
    many = torch.randn(1, 37, 4, 5).to(memory_format=torch.channels_last)
    return [
        *[(x.to(dtype), 16) for dtype in (torch.float32, torch.float16, torch.bfloat16)],
        (x.to(memory_format=torch.channels_last), 16),
        (x[:, ::2, 1:, ::2], 256),
        (x.transpose(2, 3), 3),
        (torch.randn(1, 2, 200, 100), 32),  # two runs
        (many, 8),
        (many.half(), 300),
        (torch.randn(1, 1, 6, 6), 10000),
        (broken, 16),
        (broken.to(memory_format=torch.channels_last), 16),
        (torch.full((1, 1, 1, 1), 2.0), 2),
        (torch.tensor([6e-8, -6e-8, 65504.0, 1e-5]).half().view(1, 1, 2, 2), 4),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_entropy(kind: str, tmp_path: Path) -> None:
    problems = images() if kind == "plain" else images()[3:8] + images()[9:11]
    calls = [("entropy", (strided(x), bins)) for x, bins in problems]
    for (x, bins), found in zip(problems, results(kind, calls, tmp_path), strict=True):
        expected = channel_entropy(x.double(), bins).float()
        got = torch.from_numpy(found)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-7, equal_nan=True)
        assert (got[expected == 0] == 0).all()
