"""The arithmetic type of sums and statistics."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else, whatever the storage type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocasting(device_type: str) -> bool:
    """Whether autocast is on for a device type; never for "meta", which has none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Turns autocast off for a device type, also for "meta", which `torch.autocast` refuses."""
    if device_type == "meta":
        return nullcontext()
    context: AbstractContextManager[None] = torch.autocast(device_type, enabled=False)
    return context
