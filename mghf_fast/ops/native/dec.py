"""`dec` in C++."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..limits import temperature_too_low
from .binding import Binding


class Dec(Binding):
    def forward(
        self,
        sr: Tensor,
        gt: Tensor,
        threshold_db: float,
        positive_temperature: float,
        negative_temperature: float,
        temperature: str,
        similarity: str,
        max_value: float,
        norm_floor: float,
    ) -> tuple[Tensor, Tensor]:
        temperatures = (positive_temperature, negative_temperature, temperature)
        options = (threshold_db, *temperatures, similarity, max_value, norm_floor)
        return self.ops.dec(self.values(sr), self.values(gt), *options)

    def backward(
        self,
        grad: Tensor,
        sr: Tensor,
        gt: Tensor,
        statistics: Tensor,
        threshold_db: float,
        positive_temperature: float,
        negative_temperature: float,
        temperature: str,
        similarity: str,
        max_value: float,
        norm_floor: float,
    ) -> Tensor:
        temperatures = (positive_temperature, negative_temperature, temperature)
        options = (threshold_db, *temperatures, similarity, max_value, norm_floor)
        patches = self.values(sr), self.values(gt)
        return self.ops.dec_backward(grad.float(), *patches, statistics, *options).to(sr.dtype)

    def can_run(
        self,
        *tensors: Tensor,
        temperatures: tuple[float, float, str] = (1, 1, ""),
        **options: Any,
    ) -> str | None:
        return temperature_too_low(temperatures) or super().can_run(*tensors)
