"""`monce` in C++."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..vocabulary import MOST_PATCHES, kept_iterations
from .binding import Binding


class Monce(Binding):
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        temperature: float,
        epsilon: float,
        iterations: int,
        negative_weight: float,
        cost: str,
        plan_gradient: str,
        precision: str = "float32",
    ) -> tuple[Tensor, Tensor]:
        options = (temperature, epsilon, iterations, negative_weight, cost, plan_gradient)
        return self.ops.monce(
            self.values(query), self.values(key), *options, kept_iterations(iterations), precision
        )

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        state: Tensor,
        temperature: float,
        epsilon: float,
        iterations: int,
        negative_weight: float,
        cost: str,
        plan_gradient: str,
        precision: str = "float32",
    ) -> Tensor:
        options = (temperature, epsilon, iterations, negative_weight, cost, plan_gradient)
        given = (*map(self.values, (grad, query, key)), state, *options, precision)
        return self.ops.monce_backward(*given).to(query.dtype)

    def can_run(self, *tensors: Tensor, **options: Any) -> str | None:
        if (reason := super().can_run(*tensors)) is not None or self.on_cpu:
            return reason
        if tensors and max(tensors[-1].shape[1:], default=0) > MOST_PATCHES:
            return f"it takes up to {MOST_PATCHES} patches of as many numbers"
        return None
