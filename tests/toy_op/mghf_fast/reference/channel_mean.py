"""The mean of every feature map.

m_c = 1 / (H W) sum_p F_cp        F: (C, H W), one row per feature map
dF_cp = dm_c / (H W)
"""

from __future__ import annotations

from torch import Tensor

from ..backends import can_run_reference
from ..precision import accumulation_dtype


def channel_mean(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C), in float32 (float64 for float64)."""
    return x.to(accumulation_dtype(x.dtype)).mean((2, 3))


def channel_mean_backward(grad: Tensor, x: Tensor) -> Tensor:
    pixels = x.shape[2] * x.shape[3]
    return (grad / pixels)[..., None, None].expand_as(x).to(x.dtype)


forward, backward, can_run = channel_mean, channel_mean_backward, can_run_reference
