"""`patches` in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .binding import Binding


def _dense(parameters: tuple[Tensor, ...]) -> list[Tensor]:
    return [p.float().contiguous() for p in parameters]


class Patches(Binding):
    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self._packed: Tensor | None = None
        self._is_frozen = False

    def frozen(self) -> Patches:
        """The same kernels for one projection whose weights never change; CUDA's pack them once."""
        own = Patches("cpu" if self.on_cpu else "cuda")
        own._is_frozen = not self.on_cpu
        return own

    def _pack(self, weight1: Tensor, weight2: Tensor, *sizes: int) -> Tensor:
        packed = self._packed
        if packed is None:
            packed = self.ops.patches_pack(weight1, weight2, *sizes)
            # What a graph's capture packs is only there once the graph runs.
            if not (weight1.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._packed = packed
        return packed

    def forward(
        self,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        patch_size: int,
        stride: int,
        precision: str = "float32",
    ) -> tuple[Tensor, Tensor]:
        parameters = _dense((weight1, bias1, weight2, bias2))
        options = (patch_size, stride, precision)
        if self._is_frozen:
            packed = self._pack(parameters[0], parameters[2], patch_size, stride)
            return self.ops.patches_packed(x, *parameters, packed, *options)
        return self.ops.patches(self.image(x), *parameters, *options)

    def backward(
        self,
        grad: Tensor,
        embedding: Tensor,
        state: Tensor,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        patch_size: int,
        stride: int,
        need_weights: bool,
        precision: str = "float32",
    ) -> list[Tensor]:
        parameters, options = (weight1, bias1, weight2, bias2), (patch_size, stride, precision)
        saved, image = (grad.float(), embedding, state), self.image(x)
        w1, b1, w2, _ = _dense(parameters)
        grad_x = self.ops.patches_backward(*saved, image, w1, w2, *options).to(x.dtype)
        if not need_weights:
            return [grad_x]
        grads = self.ops.patches_backward_weights(*saved, image, w1, b1, w2, *options)
        return [grad_x, *(g.to(p.dtype) for g, p in zip(grads, parameters, strict=True))]

    def add_backward(
        self,
        grad_x: Tensor,
        grad: Tensor,
        embedding: Tensor,
        state: Tensor,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        patch_size: int,
        stride: int,
        precision: str = "float32",
    ) -> None:
        saved, options = (grad.float(), embedding, state), (patch_size, stride, precision)
        w1, w2 = _dense((weight1, weight2))
        if self.on_cpu and grad_x.dtype == torch.float16:
            # The CPU's kernels return a float32 gradient, which is rounded when it is added.
            grad_x += self.ops.patches_backward(*saved, self.image(x), w1, w2, *options)
        elif self._is_frozen:
            packed = self._pack(w1, w2, *options[:2])
            self.ops.patches_packed_backward_add_(grad_x, *saved, w1, w2, packed, *options)
        else:
            self.ops.patches_backward_add_(grad_x, *saved, w1, w2, *options)
