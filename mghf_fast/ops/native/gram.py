"""`gram` in C++."""

from __future__ import annotations

from torch import Tensor

from .binding import Binding


class Gram(Binding):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return self.ops.gram(self.image(x), scale)

    def backward(self, grad: Tensor, x: Tensor, scale: float) -> Tensor:
        return self.ops.gram_backward(grad.float(), self.image(x), scale).to(x.dtype)
