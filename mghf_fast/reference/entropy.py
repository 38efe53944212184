"""Normalised histogram entropy of each feature map (MGHF's AWDFE).

    bin(v) = min(floor((v - min) / (max - min) * bins), bins - 1)     in float32
    p = counts / (H W),   entropy = -sum p ln p / ln(bins)            in [0, 1]

A constant map has entropy 0; a map with a NaN or an infinity has entropy NaN. No gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import can_run_reference
from ..precision import accumulation_dtype


def precise_entropy(x: Tensor, bins: int) -> Tensor:
    """(B, C, H, W) -> (B, C) in float64, so that rounding does not break ties between maps with
    equal counts in another order, or pairs of maps with equal sums. (In float32 on Apple's GPUs,
    which have no float64.)"""
    # Bins are decided in float32 even for float64 input, so that every backend counts alike.
    maps = x.detach().flatten(2).flatten(0, 1).float()
    low, high = maps.aminmax(dim=1, keepdim=True)
    position = (maps - low) / (high - low) * bins
    # 0/0 in a constant map and the results of NaN or infinity go to the first bin, so that no index
    # is out of range; the last lines give these maps their value.
    index = position.nan_to_num(0, bins - 1, 0).floor().clamp(0, bins - 1).long()
    one = torch.ones((), dtype=torch.int64, device=x.device)
    counts = torch.zeros(maps.shape[0], bins, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, index, one.expand_as(index))
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    p = counts.to(dtype) / maps.shape[1]
    entropy = -torch.xlogy(p, p).sum(1) / math.log(bins)
    finite = torch.isfinite(high - low).squeeze(1)
    return torch.where(finite, entropy, torch.nan).view(x.shape[:2])


def channel_entropy(x: Tensor, bins: int) -> Tensor:
    """(B, C, H, W) -> (B, C), in float32 (float64 for float64)."""
    return precise_entropy(x, bins).to(accumulation_dtype(x.dtype))


forward, can_run = channel_entropy, can_run_reference
