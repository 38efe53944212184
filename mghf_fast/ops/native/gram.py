"""`gram` in C++."""

from __future__ import annotations

from torch import Tensor

from .binding import Binding


class Gram(Binding):
    def forward(self, x: Tensor, scale: float, precision: str = "float32") -> Tensor:
        return self.ops.gram(self.image(x), scale, precision)

    def backward(self, grad: Tensor, x: Tensor, scale: float, precision: str = "float32") -> Tensor:
        given = (grad.float(), self.image(x), scale, precision)
        return self.ops.gram_backward(*given).to(x.dtype)
