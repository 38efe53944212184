"""Loads the compiled kernels, if this installation has them, and tells how they were built."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

LIBRARY_DIRECTORY = Path(__file__).parent / "lib"
CPU_LIBRARY = LIBRARY_DIRECTORY / "libmghf_fast_cpu.so"
BUILD_FACTS = LIBRARY_DIRECTORY / "build.json"


@functools.cache
def unavailable_reason() -> str | None:
    """Loads the CPU kernel library on the first call; ``None`` when it is there, else why not."""
    if not CPU_LIBRARY.exists():
        return (
            "this installation has no compiled CPU kernels; with a C++20 compiler, "
            "`pip install --no-build-isolation .` builds them"
        )
    try:
        torch.ops.load_library(str(CPU_LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the compiled CPU kernels do not load under torch {torch.__version__}: {error}"
    return None


def build_facts() -> dict[str, Any]:
    """What the wheel was built with (compiler, flags, instruction sets); empty without kernels."""
    if not BUILD_FACTS.exists():
        return {}
    facts: dict[str, Any] = json.loads(BUILD_FACTS.read_text())
    return facts
