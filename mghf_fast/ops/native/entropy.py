"""`entropy` in C++."""

from __future__ import annotations

from torch import Tensor

from .binding import Binding


class Entropy(Binding):
    def forward(self, x: Tensor, bins: int) -> Tensor:
        return self.ops.entropy(self.image(x), bins)
