"""`sinkhorn` in C++."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..vocabulary import MOST_PATCHES
from .binding import Binding


class Sinkhorn(Binding):
    def forward(
        self,
        similarity: Tensor,
        cost: str,
        epsilon: float,
        iterations: int,
        tolerance: float | None,
    ) -> Tensor:
        options = (cost, epsilon, iterations, tolerance)
        return self.ops.sinkhorn(self.values(similarity), *options).to(similarity.dtype)

    def backward(
        self,
        grad: Tensor,
        similarity: Tensor,
        cost: str,
        epsilon: float,
        iterations: int,
        tolerance: float | None,
    ) -> Tensor:
        tensors, options = (grad, similarity), (cost, epsilon, iterations, tolerance)
        return self.ops.sinkhorn_backward(*map(self.values, tensors), *options).to(similarity.dtype)

    def can_run(self, *tensors: Tensor, **options: Any) -> str | None:
        if (reason := super().can_run(*tensors)) is not None or self.on_cpu:
            return reason
        if tensors and (n := tensors[-1].shape[-1]) > MOST_PATCHES:
            return f"it takes matrices of up to {MOST_PATCHES} rows, and these have {n}"
        return None
