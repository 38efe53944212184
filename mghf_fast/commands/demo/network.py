"""The network of the demo: EDSR (Lim et al., 2017), made compact."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from ... import weights
from .settings import SCALE

START_NAME = "demo-start"
"""Name of the shipped weights (:mod:`mghf_fast.weights`) that the demo fine-tunes."""


class ResidualBlock(nn.Module):
    """Convolution, ReLU, convolution, scaled and added to the input; no normalisation."""

    def __init__(self, channels: int, scaling: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.scaling * self.second(F.relu(self.first(x)))
        return y


class CompactEDSR(nn.Module):
    """Super-resolution by 4: ``(B, 3, H, W)`` -> ``(B, 3, 4H, 4W)``, values around [0, 1].

    Head convolution, residual blocks under a global skip, two pixel shuffles, tail convolution,
    and the bicubic enlargement added at the end. The tail starts at zero: an untrained network
    *is* bicubic interpolation. With the defaults it has 232,963 parameters.

    Args:
        generator: source of the initial weights; the global one is not used.
    """

    def __init__(
        self,
        generator: torch.Generator,
        channels: int = 32,
        blocks: int = 8,
        residual_scaling: float = 0.2,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # Conv2d draws weights that are replaced below
            self.head = nn.Conv2d(3, channels, 3, padding=1)
            self.body = nn.Sequential(
                *(ResidualBlock(channels, residual_scaling) for _ in range(blocks)),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            self.upsample = nn.Sequential(
                nn.Conv2d(channels, 4 * channels, 3, padding=1),
                nn.PixelShuffle(2),
                nn.ReLU(),
                nn.Conv2d(channels, 4 * channels, 3, padding=1),
                nn.PixelShuffle(2),
                nn.ReLU(),
            )
            self.tail = nn.Conv2d(channels, 3, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=generator)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.tail.weight)

    def forward(self, x: Tensor) -> Tensor:
        features = self.head(x - 0.5)
        features = features + self.body(features)
        detail: Tensor = self.tail(self.upsample(features))
        return detail + upsample_bicubic(x)


def shipped_start() -> CompactEDSR:
    """The shipped network, trained on L1; its card is ``weights.card(START_NAME)``.

    Raises:
        ValueError: the file is not the one that shipped.
        FileNotFoundError: the file is missing.
    """
    network = CompactEDSR(torch.Generator())
    network.load_state_dict(load(weights.read(START_NAME)))
    return network


def upsample_bicubic(x: Tensor) -> Tensor:
    """Bicubic enlargement by 4."""
    return F.interpolate(x, scale_factor=SCALE, mode="bicubic", align_corners=False)
