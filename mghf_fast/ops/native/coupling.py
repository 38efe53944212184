"""`coupling` in C++."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..limits import block_channels, only_bottleneck
from ..vocabulary import flat, inverted_mix
from .binding import Binding

MOST_CHANNELS = 256
"""Maximum number of channels of which CUDA's kernels can keep a tile on chip."""


class Coupling(Binding):
    def forward(
        self, x: Tensor, weights: list[Tensor], activation: str, subnet: str, clamp: float | None
    ) -> Tensor:
        channels, _, kernel, _ = weights[0].shape
        options = (channels, kernel, activation, clamp or 0.0)
        return self.ops.coupling(self.image(x), flat(weights), *options).to(x.dtype)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weights: list[Tensor],
        activation: str,
        subnet: str,
        clamp: float | None,
        need_weights: bool,
    ) -> list[Tensor]:
        channels, _, kernel, _ = weights[0].shape
        options = (channels, kernel, activation, clamp or 0.0, need_weights)
        images = self.image(grad.to(x.dtype)), self.image(x)
        grad_x, of_weights = self.ops.coupling_backward(*images, flat(weights), *options)
        if not need_weights:
            return [grad_x.to(x.dtype)]
        pieces = zip(of_weights.split([w.numel() for w in weights]), weights, strict=True)
        # Copies, because the results of an operator must not share memory.
        return [grad_x.to(x.dtype), *(p.view(w.shape).to(w.dtype, copy=True) for p, w in pieces)]

    def inverse(
        self, y: Tensor, weights: list[Tensor], activation: str, subnet: str, clamp: float | None
    ) -> Tensor:
        # On a GPU without the check for a singular mix, which would make the host wait.
        undone = flat(inverted_mix(weights, check=self.on_cpu))
        options = (weights[0].shape[0], activation, clamp or 0.0)
        return self.ops.coupling_inverse(self.image(y), undone, *options).to(y.dtype)

    def can_run(
        self,
        *tensors: Tensor,
        subnet: str = "bottleneck",
        need_weights: bool = False,
        **options: Any,
    ) -> str | None:
        if (reason := only_bottleneck(subnet)) is not None or self.on_cpu:
            return reason or super().can_run(*tensors)
        if need_weights:
            return (
                "its kernels give the gradient of the image only, and one of the weights' is "
                "required"
            )
        if (channels := block_channels(tensors)) > MOST_CHANNELS:
            return (
                f"its kernels keep half of a tile's channels on chip, which goes up to "
                f"{MOST_CHANNELS} channels, and this block has {channels}"
            )
        return super().can_run(*tensors)
