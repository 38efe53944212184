"""Runs the CUDA kernels on the host: in a separate process, plain or under sanitizers, or as the
backend "cuda" for tensors on the CPU, for the tests of every backend.

`make cuda-host` builds the modules: environment variable MGHF_CUDA_HOST names the folder.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_host import Strided, load
from torch import Tensor

from mghf_fast import backends, native

FOLDER = os.environ.get("MGHF_CUDA_HOST")
needs_modules = pytest.mark.skipif(FOLDER is None, reason="MGHF_CUDA_HOST names no folder")
KINDS = ("plain", "thread", "address")
RUNTIMES = {"thread": "libtsan.so", "address": "libasan.so"}
Call = tuple[str, tuple[Any, ...]]


def module(kind: str) -> Path:
    assert FOLDER is not None
    (found,) = Path(FOLDER, kind).glob("mghf_fast_cuda_host*.so")
    return found


def runtime(name: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    return subprocess.check_output(command, text=True).strip()


@cache
def server(kind: str) -> subprocess.Popen[str]:
    """The process that forks those of the calls, under the sanitizer ``kind``. It ends when its
    standard input does, with this process at the latest."""
    environment = os.environ | {
        "TSAN_OPTIONS": "exitcode=66",
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=67",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    if kind in RUNTIMES:
        # The address sanitizer looks for libstdc++'s exception functions when it is loaded.
        environment["LD_PRELOAD"] = f"{runtime(RUNTIMES[kind])} {runtime('libstdc++.so')}"
    command = [sys.executable, Path(__file__).with_name("cuda_host.py"), module(kind)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


def run(kind: str, calls: Sequence[Call], folder: Path) -> tuple[int, str]:
    """Runs the calls in a separate process, under the sanitizer ``kind``; returns its exit status
    and what it wrote to its standard error."""
    paths = [folder / name for name in ("calls", "results", "errors")]
    paths[0].write_bytes(pickle.dumps(list(calls)))
    paths[1].unlink(missing_ok=True)
    process = server(kind)
    assert process.stdin is not None and process.stdout is not None
    print(*paths, sep="\t", file=process.stdin, flush=True)
    status = process.stdout.readline()
    assert status, f"the process of the kind {kind!r} has ended"
    return int(status), paths[2].read_text()


def results(kind: str, calls: Sequence[Call], folder: Path) -> list[np.ndarray[Any, Any]]:
    status, errors = run(kind, calls, folder)
    assert status == 0, errors[-4000:]
    found: list[np.ndarray[Any, Any]] = pickle.loads((folder / "results").read_bytes())
    return found


def strided(x: Tensor) -> Strided:
    """``x`` with its strides, in no more memory than it has; bfloat16 as bits."""
    bits = x.view(torch.uint16) if x.dtype == torch.bfloat16 else x
    memory = torch.empty(0, dtype=bits.dtype).set_(bits.untyped_storage())
    return Strided(memory.numpy(), x.storage_offset(), tuple(x.shape), x.stride())


# ---- as a backend ----


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Lets the backend "cuda" run tensors on the CPU, if the host library is built: the ops of
    csrc/cuda/ops, with their checks, and the kernels."""
    if FOLDER is None:
        yield
        return
    load(str(module("plain")))
    refuse = backends._cannot_take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "cuda_ops", lambda: torch.ops.mghf_cuda_host)
        patch.setattr(native, "cuda_library", lambda: module("plain"))
        patch.setattr(backends, "_cuda_unavailable_reason", lambda: None)
        patch.setattr(backends, "_cuda_lacks", lambda device: None)
        patch.setattr(backends, "_cannot_take", lambda tensors, device: refuse(tensors, "cpu"))
        yield


def is_for(item: pytest.Item) -> bool:
    """Whether a test is for the emulated kernels: in others "auto" would pick them."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return item.path.name.startswith("test_cuda_") or any(
        isinstance(x, str) and x == "cuda" for x in parameters
    )
