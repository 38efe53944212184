"""`channel_mean` in C++."""

from __future__ import annotations

from torch import Tensor

from .binding import Binding


class ChannelMean(Binding):
    def forward(self, x: Tensor) -> Tensor:
        return self.ops.channel_mean(self.image(x))

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return self.ops.channel_mean_backward(grad.float(), self.image(x)).to(x.dtype)
