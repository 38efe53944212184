"""The user's choice of backend, and why a backend cannot run on this machine."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from . import native, source_tree

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""Every backend; ``"auto"`` prefers them in this order, but see preferences.py for GPUs."""


OLDEST_TRITON = (3, 5)


class BackendError(RuntimeError):
    """A forced backend cannot run an op; the message says why."""


def check_backend(name: object, argument: str = "backend") -> str:
    """Returns ``name`` if it is ``"auto"`` or a backend's name; raises ``ValueError`` otherwise."""
    if name != "auto" and name not in BACKENDS:
        allowed = ", ".join(repr(b) for b in ("auto", *BACKENDS))
        raise ValueError(f"{argument} is {name!r}; allowed are {allowed}")
    return str(name)


def optional_backend(name: object) -> str:
    """A backend's name as a module keeps it: ``"auto"`` for None, which means the same."""
    return "auto" if name is None else check_backend(name)


# A plain module global, not a context variable: torch.compile can guard on it, so a compiled
# function is recompiled when the backend changes instead of keeping the one it was traced with.
#
# The environment's value is checked at its first use, so that importing the library never fails.
_current = os.environ.get("MGHF_BACKEND", "auto")


def current_backend(backend: str | None = None) -> str:
    """The requested backend: ``backend`` if it names one, else (for ``None`` and ``"auto"`` alike)
    the innermost :class:`use_backend`'s, else
    the environment variable ``MGHF_BACKEND``'s, else ``"auto"``."""
    if backend is None or backend == "auto":
        return check_backend(_current, "environment variable MGHF_BACKEND")
    return check_backend(backend)


class use_backend:
    """Context manager that makes one backend the default of every op within it.

    >>> with mghf_fast.use_backend("reference"):
    ...     loss = mghf_fast.MGHFLoss()(sr, gt)

    The choice applies to the whole process, other threads included. A backend named here is forced:
    an op that it cannot run raises ``RuntimeError`` and says why. ``"auto"`` picks the best backend
    that can run each op.

    Raises:
        ValueError: ``name`` is neither ``"auto"`` nor a backend.
    """

    def __init__(self, name: str) -> None:
        self._name = check_backend(name, "name")
        self._previous: list[str] = []

    def __enter__(self) -> use_backend:
        global _current
        self._previous.append(_current)
        _current = self._name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _current
        _current = self._previous.pop()


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU: TRITON_INTERPRET=1, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_version() -> str | None:
    """Triton's version, found without importing it. PyTorch's nightly builds rename the package."""
    for package in ("triton", "pytorch-triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


def _triton_version() -> tuple[int, ...]:
    if (version := triton_version()) is None:
        return OLDEST_TRITON
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@functools.cache
def _cuda_unavailable_reason() -> str | None:
    if (reason := native.cuda_unavailable_reason()) is not None:
        return reason
    return None if torch.cuda.is_available() else "there is no CUDA device"


@functools.cache
def _triton_unavailable_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if source_tree.is_bare_source_tree():
        return source_tree.BARE_SOURCE_TREE
    if (version := _triton_version()) < OLDEST_TRITON:
        needed, found = (".".join(map(str, v)) for v in (OLDEST_TRITON, version))
        return f"its kernels need Triton {needed} or newer, and {found} is installed"
    if not triton_is_interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device (and TRITON_INTERPRET is not 1)"
    return None


def unavailable_reasons() -> dict[str, str]:
    """Why each backend that cannot run here cannot: backend name -> one sentence."""
    reasons = {}
    if (reason := _cuda_unavailable_reason()) is not None:
        reasons["cuda"] = reason
    if (reason := _triton_unavailable_reason()) is not None:
        reasons["triton"] = reason
    if (reason := native.unavailable_reason()) is not None:
        reasons["cpu"] = reason
    return reasons


def available_backends() -> tuple[str, ...]:
    """The backends with at least one op that can run on this machine, best first.

    ``"reference"`` (plain PyTorch) is always among them and covers every op.
    """
    missing = unavailable_reasons()
    return tuple(b for b in BACKENDS if b not in missing)


# ---- what a backend's kernels support, whatever the op: the backends' `can_run` ----


def can_run_reference(*tensors: Tensor, **options: Any) -> str | None:
    """None: plain PyTorch supports everything."""
    return None


def _cannot_take(tensors: tuple[Tensor, ...], device: str) -> str | None:
    """Why kernels for this type of device cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor.device.type != device:
            return f"it runs on {device} tensors here, and one is on {tensor.device}"
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it takes float32, float16 or bfloat16, and one tensor is {tensor.dtype}"
    return None


def can_run_cpu(*tensors: Tensor, **options: Any) -> str | None:
    """Why the compiled CPU kernels cannot take these tensors, or None."""
    return _cannot_take(tensors, "cpu")


@functools.cache
def _triton_lacks(device: torch.device) -> str | None:
    """What the Triton kernels need and a GPU lacks, or None."""
    if torch.version.hip is not None:
        return "its kernels are made for NVIDIA GPUs"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return (
            "its kernels need compute capability 8.0 or higher (Ampere and later), and "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        )
    return None


def can_run_triton(*tensors: Tensor, **options: Any) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
    if triton_is_interpreted():
        return _cannot_take(tensors, "cpu")
    if (reason := _cannot_take(tensors, "cuda")) is not None or not tensors:
        return reason
    return _triton_lacks(tensors[0].device)


@functools.cache
def _cuda_lacks(device: torch.device) -> str | None:
    return native.cuda_lacks(torch.cuda.get_device_capability(device))


def can_run_cuda(*tensors: Tensor, **options: Any) -> str | None:
    """Why the compiled CUDA kernels cannot take these tensors, or None."""
    if (reason := _cannot_take(tensors, "cuda")) is not None or not tensors:
        return reason
    return _cuda_lacks(tensors[0].device)
