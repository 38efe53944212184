"""The network and data of both examples: a small network for x4, trained on pairs of crops.

The data are smooth noise, so that the examples run without files; put your own data in
:func:`batches`. Images are (B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT = 0.1
"""The weight of MGHF-c with its default extractor, ``perceptual-v1``, and preset, relative to L1
with weight 1. ``mghf-fast calibrate`` measures it for your network."""


def network() -> nn.Module:
    """x4: (B, 3, H, W) -> (B, 3, 4H, 4W)."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, padding=1),
        nn.PixelShuffle(4),
    )


def batches(
    steps: int, seed: int, batch: int = 2, side: int = 64
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields ``steps`` batches of low-resolution images and their ground truths."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        coarse = torch.rand(batch, 3, side // 8, side // 8, generator=generator)
        gt = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
        yield F.interpolate(gt, scale_factor=0.25, mode="area"), gt
