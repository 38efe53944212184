"""The base class of this package's classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...backends import can_run_cpu, can_run_cuda


class Binding:
    """The compiled kernels of one op for one backend, ``"cpu"`` or ``"cuda"``."""

    def __init__(self, backend: str) -> None:
        self.on_cpu = backend == "cpu"

    @property
    def ops(self) -> Any:
        return torch.ops.mghf_native if self.on_cpu else native.cuda_ops()

    def image(self, x: Tensor) -> Tensor:
        """An image in a type that the kernels read: the CPU's only float32 and bfloat16."""
        return x.float() if self.on_cpu and x.dtype == torch.float16 else x

    def values(self, x: Tensor) -> Tensor:
        """Another tensor in a type that the kernels read: the CPU's only float32."""
        return x.float() if self.on_cpu else x

    def can_run(self, *tensors: Tensor, **options: Any) -> str | None:
        return (can_run_cpu if self.on_cpu else can_run_cuda)(*tensors)
