"""What the Triton kernels share: the device they are launched on, what they are compiled for."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
"""Triton's names of the types of pointers."""


@dataclass(frozen=True)
class Configuration:
    """A kernel with pinned block sizes, as it is launched for one kind of input: what is compiled
    ahead of time and listed with its registers and shared memory.

    ``types`` gives Triton's type of every argument that is not in ``constants``, such as "*fp32",
    "i32", "fp32".
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    label: str = ""
    divisible: frozenset[str] = field(default_factory=frozenset)
    """Arguments that a launch finds to be multiples of 16: pointers, and most sizes and strides."""


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream; this makes it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def blocks(count: int, size: int) -> int:
    """How many blocks of ``size`` cover ``count``."""
    return int(triton.cdiv(count, size))
