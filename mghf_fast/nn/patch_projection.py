"""The patch projection of local information preservation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import functional
from .initial import reproducibly


class PatchProjection(nn.Module):
    """Linear(patch_size ** 2, hidden), ReLU, Linear(hidden, dimension), unit rows.

    One projection is shared by all feature maps.

    Args:
        patch_size: side of a patch in pixels.
        stride: distance between patches in pixels.
        hidden: width of the hidden layer.
        dimension: width D of an embedding.
        trainable: whether the weights get gradients; frozen by default.
        seed: seed of the Xavier initialisation, so that all processes have the same projection.

    With the defaults 139,456 parameters, as in the paper.
    """

    def __init__(
        self,
        patch_size: int = 32,
        stride: int = 24,
        *,
        hidden: int = 128,
        dimension: int = 64,
        trainable: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.patch_size = check.check_integer("patch_size", patch_size, 1)
        self.stride = check.check_integer("stride", stride, 1)
        hidden = check.check_integer("hidden", hidden, 1)
        dimension = check.check_integer("dimension", dimension, 1)
        with reproducibly(seed):
            self.hidden = nn.Linear(self.patch_size**2, hidden)
            self.output = nn.Linear(hidden, dimension)
            for layer in (self.hidden, self.output):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.to(torch.get_default_device(), torch.get_default_dtype())
        self.requires_grad_(trainable)

    def forward(self, x: Tensor, *, backend: str | None = None, precision: str = "auto") -> Tensor:
        """(B, C, H, W) feature maps -> (B * C, N, D); see :func:`functional.patch_projection`."""
        return functional.patch_projection(
            x,
            self.hidden.weight,
            self.hidden.bias,
            self.output.weight,
            self.output.bias,
            patch_size=self.patch_size,
            stride=self.stride,
            backend=backend,
            precision=precision,
        )

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, stride={self.stride}"
