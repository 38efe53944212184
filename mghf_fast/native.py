"""Loads the compiled kernels, if this installation has them, and reports how they were built.

There are two libraries: the CPU's, which also defines the ops, and CUDA's, which needs a torch with
CUDA. Environment variables replace them by other builds for this torch: MGHF_NATIVE_LIBRARY the
CPU's, for example by the sanitized build of `make asan`, and MGHF_CUDA_LIBRARY CUDA's.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

from .source_tree import BARE_SOURCE_TREE, is_bare_source_tree

LIBRARY_DIRECTORY = Path(__file__).parent / "lib"


def _library(variable: str, name: str) -> Path:
    """The path of the library to load; it need not exist."""
    named = os.environ.get(variable)
    return Path(named) if named else LIBRARY_DIRECTORY / name


def cpu_library() -> Path:
    return _library("MGHF_NATIVE_LIBRARY", "libmghf_fast_cpu.so")


def cuda_library() -> Path:
    return _library("MGHF_CUDA_LIBRARY", "libmghf_fast_cuda.so")


def _load(library: Path, variable: str, what: str, how_to_get: str) -> str | None:
    """Loads a library; ``None`` on success, else the reason why not."""
    if not library.exists():
        if os.environ.get(variable):
            return f"environment variable {variable} is {str(library)!r}; no such file"
        if is_bare_source_tree():
            return BARE_SOURCE_TREE
        return f"this installation has no compiled {what} kernels; {how_to_get}"
    try:
        torch.ops.load_library(str(library.resolve()))
    except (OSError, RuntimeError) as error:
        return (
            f"the compiled {what} kernels ({library.name}) do not load under torch "
            f"{torch.__version__}: {error}"
        )
    return None


@functools.cache
def unavailable_reason() -> str | None:
    """Loads the CPU kernel library on the first call; ``None`` on success, else why not."""
    return _load(
        cpu_library(),
        "MGHF_NATIVE_LIBRARY",
        "CPU",
        "with a C++20 compiler, `pip install --no-build-isolation .` builds them (or the "
        "environment variable MGHF_NATIVE_LIBRARY names a library that is built already)",
    )


def cpu_capability() -> str | None:
    """The instruction set that the CPU kernels use here, ``"default"``, ``"avx2"``, ``"avx512"``,
    ``"avx512_bf16"`` or ``"amx"``; ``None`` without them.

    Raises:
        RuntimeError: MGHF_CPU_CAPABILITY names none of these.
    """
    if unavailable_reason() is not None:
        return None
    found: str = torch.ops.mghf_native.cpu_capability()
    return found


@functools.cache
def cuda_unavailable_reason() -> str | None:
    """Loads the CUDA kernel library on the first call; ``None`` on success, else why not."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if (reason := unavailable_reason()) is not None:
        return reason  # the ops are defined there
    if (reason := _wrong_cuda()) is not None:
        return reason
    return _load(
        cuda_library(),
        "MGHF_CUDA_LIBRARY",
        "CUDA",
        "with nvcc, `MGHF_CUDA=1 pip install --no-build-isolation .` builds them",
    )


def cuda_ops() -> Any:
    """The native ops for CUDA tensors. (Tests replace them by the kernels built for the host, see
    tests/emulated.py.)"""
    return torch.ops.mghf_native


def use_older_cuda_kernels(op: str, device: int, older: bool) -> bool:
    """Lets a GPU, given by its number, use an op's older CUDA kernels, or the newer ones again;
    whether the op has any. Only for a library that is loaded."""
    switch = ctypes.CDLL(str(cuda_library())).mghf_cuda_use_older
    switch.argtypes, switch.restype = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(switch(op.encode(), device, older))


def _wrong_cuda() -> str | None:
    """A reason if the kernels' major version of CUDA is not torch's, whose driver may be too old
    for them."""
    facts = build_facts(cuda_library()).get("cuda")
    if facts is None or torch.version.cuda is None:
        return None
    ours, theirs = (version.split(".")[0] for version in (facts["version"], torch.version.cuda))
    if ours == theirs:
        return None
    return (
        f"its compiled kernels are for CUDA {ours}, and this torch is for CUDA "
        f"{torch.version.cuda}: install the wheel for CUDA {theirs}, or build it with MGHF_CUDA=1 "
        "and that nvcc"
    )


def cuda_lacks(capability: tuple[int, int]) -> str | None:
    """Why the CUDA kernels do not run on a GPU of this compute capability, or ``None``: machine
    code also runs on higher minor versions of the same major version, PTX on all higher ones."""
    facts = build_facts(cuda_library()).get("cuda") or {}
    having: list[str] = facts.get("architectures", [])
    for name in having:
        major, minor = name.removesuffix("+PTX").rstrip("abcdef").split(".")
        made_for, exact = (int(major), int(minor)), name.endswith("a")
        if capability == made_for or (
            not exact
            and capability > made_for
            and (capability[0] == made_for[0] or name.endswith("+PTX"))
        ):
            return None
    wanted = ".".join(map(str, capability))
    if capability < (8, 0):
        return (
            "its kernels need compute capability 8.0 or higher (Ampere and later), and this GPU "
            f"has {wanted}"
        )
    return (
        f"its kernels are compiled for compute capability {', '.join(having) or 'none'}, and this "
        f"GPU has {wanted}: build them with MGHF_CUDA_ARCHS={wanted}"
    )


def build_facts(library: Path | None = None) -> dict[str, Any]:
    """The build's compiler, flags, instruction sets and CUDA; empty if it left no record."""
    file = (library or cpu_library()).with_name("build.json")
    if not file.exists():
        return {}
    facts: dict[str, Any] = json.loads(file.read_text())
    return facts
