"""The facts about a machine that a reader needs to judge a measurement on it."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import __version__


def cpu_model() -> str:
    """The processor's name as reported by the system."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine_facts(threads: int | None = None) -> dict[str, Any]:
    """The facts about this machine that a reader needs to judge a measurement.

    Args:
        threads: PyTorch's CPU threads; ``None`` for those of this process.

    Returns:
        ``cpu`` (name), ``cores``, ``threads``, ``isa`` (PyTorch's CPU capability), ``memory_gib``,
        ``load`` (load average of the last minute), ``gpu`` (name or ``None``),
        ``os``, ``python``, ``torch``, ``mghf_fast``.
    """
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):
        memory = math.nan
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(memory, 1),
        "load": None if load is None else round(load, 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mghf_fast": __version__,
    }
