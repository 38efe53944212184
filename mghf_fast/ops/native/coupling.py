"""`coupling` in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..limits import block_channels, only_bottleneck
from ..vocabulary import PackedWeights, flat, inverted_mix, nothing_kept
from .binding import Binding

MOST_CHANNELS = 256
"""Maximum number of channels of which CUDA's kernels can keep a tile on chip."""


def state_shape(x: Tensor, weights: list[Tensor], activation: str, keep: bool) -> tuple[int, ...]:
    """The shape of what CUDA's kernels keep for the backward, uint8: (B, H, W, bytes of a pixel),
    or (0,). A pixel has exp(r), for a 1x1 mix z1, both in the type of x, and a bit for each of the
    six hidden layers' channels; half of the channels are padded to 32, 64 or 128."""
    if not keep or activation == "softplus":
        return (0,)
    channels, _, kernel, _ = weights[0].shape
    half = next(size for size in (32, 64, 128) if 2 * size >= min(channels, MOST_CHANNELS))
    features = (2 if kernel == 1 else 1) * half * x.element_size()
    return (x.shape[0], *x.shape[2:], features + 3 * 4 * half // 8)


class Coupling(Binding):
    def forward(
        self,
        x: Tensor,
        weights: list[Tensor],
        activation: str,
        subnet: str,
        clamp: float | None,
        keep: bool,
        precision: str = "float32",
    ) -> tuple[Tensor, Tensor]:
        channels, _, kernel, _ = weights[0].shape
        options = (channels, kernel, activation, clamp or 0.0)
        if self.on_cpu or not (keep or isinstance(weights, PackedWeights)):
            y = self.ops.coupling(self.image(x), flat(weights), *options, precision)
            return y.to(x.dtype), nothing_kept(x)
        packed = self._packed(x, weights)
        return self.ops.coupling_packed(x, flat(weights), packed, *options, keep, precision)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weights: list[Tensor],
        state: Tensor,
        activation: str,
        subnet: str,
        clamp: float | None,
        need_weights: bool,
        precision: str = "float32",
    ) -> list[Tensor]:
        channels, _, kernel, _ = weights[0].shape
        options = (channels, kernel, activation, clamp or 0.0)
        images = self.image(grad.to(x.dtype)), self.image(x)
        kept = state.numel() > 0 or isinstance(weights, PackedWeights)
        if not self.on_cpu and not need_weights and kept:
            given = (*images, flat(weights), self._packed(x, weights), state)
            return [self.ops.coupling_packed_backward(*given, *options, precision)]
        grad_x, of_weights = self.ops.coupling_backward(
            *images, flat(weights), *options, need_weights, precision
        )
        if not need_weights:
            return [grad_x.to(x.dtype)]
        pieces = zip(of_weights.split([w.numel() for w in weights]), weights, strict=True)
        # Copies, because the results of an operator must not share memory.
        return [grad_x.to(x.dtype), *(p.view(w.shape).to(w.dtype, copy=True) for p, w in pieces)]

    def _packed(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """The weights as CUDA's kernels read them; frozen ones are packed once."""
        channels, _, kernel, _ = weights[0].shape
        known = weights.packed if isinstance(weights, PackedWeights) else {}
        packed = known.get(("cuda", x.dtype))
        if packed is None:
            packed = self.ops.coupling_pack(x, flat(weights), channels, kernel)
            # What a graph's capture packs is only there once the graph runs.
            if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
                known["cuda", x.dtype] = packed
        return packed

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
        **options: Any,
    ) -> str | None:
        if (reason := only_bottleneck(subnet)) is not None or self.on_cpu:
            return reason or super().can_run(*tensors)
        if (channels := block_channels(tensors)) > MOST_CHANNELS:
            return (
                f"its kernels keep half of a tile's channels on chip, which goes up to "
                f"{MOST_CHANNELS} channels, and this block has {channels}"
            )
        return super().can_run(*tensors)
