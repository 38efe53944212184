"""`content_style` in C++."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..limits import only_channel_gram
from ..vocabulary import ContentStyleOutputs
from .binding import Binding


class ContentStyle(Binding):
    def forward(
        self,
        gt: Tensor,
        sr: Tensor,
        top_m: int,
        alpha: float,
        gamma: float,
        bins: int,
        gram: str,
        precision: str = "float32",
    ) -> ContentStyleOutputs:
        images = self.image(gt), self.image(sr)
        return self.ops.content_style(*images, top_m, alpha, gamma, bins, precision)

    def backward(
        self,
        grad_naive: Tensor,
        grad_mse: Tensor,
        grad_correlation: Tensor,
        grad_gram: Tensor,
        gt: Tensor,
        sr: Tensor,
        kept: Tensor,
        weights: Tensor,
        moments: Tensor,
        difference: Tensor,
        gram: str,
        precision: str = "float32",
        into: Tensor | None = None,
    ) -> Tensor:
        grads = (g.float() for g in (grad_naive, grad_mse, grad_correlation, grad_gram))
        images = self.image(gt), self.image(sr)
        statistics = (kept, weights, moments, difference)
        if into is not None and images[1] is sr:
            self.ops.content_style_backward_into_(into, *grads, *images, *statistics, precision)
            return into
        given = (*grads, *images, *statistics, precision)
        return self.ops.content_style_backward(*given).to(sr.dtype)

    def can_run(self, *tensors: Tensor, gram: str = "channel", **options: Any) -> str | None:
        return only_channel_gram(gram) or super().can_run(*tensors)
