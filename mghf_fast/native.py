"""Loads the compiled kernels, if this installation has them, and tells how they were built.

The environment variable MGHF_NATIVE_LIBRARY names another build of the CPU kernels to load instead
of the installed one, such as the sanitized one of `make asan`; it must fit this torch.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

LIBRARY_DIRECTORY = Path(__file__).parent / "lib"


def cpu_library() -> Path:
    """The library of CPU kernels that :func:`unavailable_reason` loads; it need not exist."""
    named = os.environ.get("MGHF_NATIVE_LIBRARY")
    return Path(named) if named else LIBRARY_DIRECTORY / "libmghf_fast_cpu.so"


@functools.cache
def unavailable_reason() -> str | None:
    """Loads the CPU kernel library on the first call; ``None`` when it is there, else why not."""
    library = cpu_library()
    if not library.exists():
        if os.environ.get("MGHF_NATIVE_LIBRARY"):
            return f"environment variable MGHF_NATIVE_LIBRARY is {str(library)!r}; no such file"
        return (
            "this installation has no compiled CPU kernels; with a C++20 compiler, "
            "`pip install --no-build-isolation .` builds them (or the environment variable "
            "MGHF_NATIVE_LIBRARY names a library that is built already)"
        )
    try:
        torch.ops.load_library(str(library.resolve()))
    except (OSError, RuntimeError) as error:
        return (
            f"the compiled CPU kernels ({library.name}) do not load under torch "
            f"{torch.__version__}: {error}"
        )
    return None


def build_facts() -> dict[str, Any]:
    """What the kernels were built with (compiler, flags, instruction sets); empty without any."""
    file = cpu_library().with_name("build.json")
    if not file.exists():
        return {}
    facts: dict[str, Any] = json.loads(file.read_text())
    return facts
