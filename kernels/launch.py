"""What the launches of Triton kernels share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mghf_fast.backends import triton_is_interpreted

GRADIENT_PRECISION = tl.constexpr("ieee" if triton_is_interpreted() else "bf16x3")
"""Of products of a gradient's float32 factors; the interpreter does not know the latter."""

MOST_REGISTERS = 255
"""Of a thread. Without a limit ptxas sometimes spills a few words to get by with half of them."""


def architecture_of(tensor: Tensor) -> int:
    """Of the device that works on the tensor, such as 80 or 90: what block sizes are pinned for."""
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 10 * major + minor
    if triton_is_interpreted():
        return 90
    return int(triton.runtime.driver.active.get_current_target().arch)  # the one that is named


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream; this makes it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def blocks(count: int, size: int) -> int:
    """How many blocks of ``size`` cover ``count``."""
    return int(triton.cdiv(count, size))
