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
"""Precision of products in a gradient whose factors are float32. The interpreter lacks bf16x3."""

MOST_REGISTERS = 255
"""Limit of registers per thread. Without one ptxas sometimes spills a few words to need half."""


def architecture_of(tensor: Tensor) -> int:
    """The compute capability of the tensor's device, such as 80 or 90, by which block sizes are
    chosen."""
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 10 * major + minor
    if triton_is_interpreted():
        return 90
    return int(triton.runtime.driver.active.get_current_target().arch)  # compiling without a GPU


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream; this makes it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def blocks(count: int, size: int) -> int:
    """How many blocks of ``size`` cover ``count``."""
    return int(triton.cdiv(count, size))
