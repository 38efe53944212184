"""Gram matrices of feature maps.

G_ij = scale * sum_p F_ip F_jp        F: (C, H W), one row per feature map
dF = scale * (dG + dG^T) F
"""

from __future__ import annotations

from torch import Tensor

from ..backends import can_run_reference
from ..precision import accumulation_dtype


def gram_matrix(x: Tensor, scale: float) -> Tensor:
    """(B, C, H, W) -> (B, C, C), in float32 (float64 for float64)."""
    features = x.flatten(2).to(accumulation_dtype(x.dtype))
    return features @ features.mT * scale


def gram_matrix_backward(grad: Tensor, x: Tensor, scale: float) -> Tensor:
    features = x.flatten(2).to(grad.dtype)
    return ((grad + grad.mT) @ features * scale).view(x.shape).to(x.dtype)


# ---- as a backend ----


def forward(x: Tensor, scale: float, precision: str = "float32") -> Tensor:
    return gram_matrix(x, scale)


def backward(grad: Tensor, x: Tensor, scale: float, precision: str = "float32") -> Tensor:
    return gram_matrix_backward(grad, x, scale)


can_run = can_run_reference
