"""Normalised histogram entropy of each feature map (MGHF's AWDFE).

    bin(v) = min(floor((v - min) / (max - min) * bins), bins - 1)     in float32
    p = counts / (H W),   entropy = -sum p ln p / ln(bins)            in [0, 1]

A constant map has entropy 0; a map with a NaN or an infinity has entropy NaN. No gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..precision import accumulation_dtype


def channel_entropy(x: Tensor, bins: int) -> Tensor:
    """(B, C, H, W) -> (B, C), in float32 (float64 for float64)."""
    dtype = accumulation_dtype(x.dtype)
    # Bins are decided in float32 even for float64 input, so that every backend counts alike.
    maps = x.detach().flatten(2).flatten(0, 1).float()
    low, high = maps.aminmax(dim=1, keepdim=True)
    position = (maps - low) / (high - low) * bins
    # 0/0 in a constant map and whatever came of a NaN or an infinity go to the first bin, so that
    # no index is out of range; the last lines give these maps their value.
    index = position.nan_to_num(0, bins - 1, 0).floor().clamp(0, bins - 1).long()
    counts = maps.new_zeros(maps.shape[0], bins, dtype=torch.int64)
    counts.scatter_add_(
        1, index, torch.ones((), dtype=torch.int64, device=x.device).expand_as(index)
    )
    # In float64, so that two maps with the same counts in another order do not differ by rounding
    # and a tie between them stays a tie. (Apple's GPUs have no float64.)
    p = counts.to(dtype if x.device.type == "mps" else torch.float64) / maps.shape[1]
    entropy = -torch.xlogy(p, p).sum(1) / math.log(bins)
    finite = torch.isfinite(high - low).squeeze(1)
    return torch.where(finite, entropy, torch.nan).to(dtype).view(x.shape[:2])
