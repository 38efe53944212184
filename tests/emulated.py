"""Runs the CUDA kernels on the host, plain or under sanitizers.

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

FOLDER = os.environ.get("MGHF_CUDA_HOST")
needs_modules = pytest.mark.skipif(FOLDER is None, reason="MGHF_CUDA_HOST names no folder")
KINDS = ("plain", "thread", "address")
RUNTIMES = {"thread": "libtsan.so", "address": "libasan.so"}
Call = tuple[str, tuple[Any, ...]]


def library_of(name: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    return subprocess.check_output(command, text=True).strip()


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
        # The address sanitizer looks for what throws exceptions as soon as it is loaded.
        environment["LD_PRELOAD"] = f"{library_of(RUNTIMES[kind])} {library_of('libstdc++.so')}"
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
