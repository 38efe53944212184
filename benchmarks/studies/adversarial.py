"""An adversarial loss as a baseline: a small patch discriminator that learns beside the network.

Non-saturating: the discriminator D minimises softplus(-D(gt)) + softplus(D(sr)), the network
softplus(-D(sr)), means over D's patches. Layers are spectrally normalised (Miyato et al. 2018).
Before the first use it learns for ``WARM_UP`` steps on pictures of the start network, so that the
gradient whose length sets the weight is meaningful.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

WARM_UP = 200
LEARNING_RATE = 1e-3


def discriminator(width: int = 32) -> nn.Sequential:
    """(B, 3, H, W) -> (B, 1, H / 4, W / 4), each value from 23 x 23 pixels; its initial weights are
    always the same."""

    def layer(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Module:
        return spectral_norm(nn.Conv2d(inputs, outputs, size, stride, 1))

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(
            layer(3, width, 3),
            nn.LeakyReLU(0.2),
            layer(width, 2 * width, 4, 2),
            nn.LeakyReLU(0.2),
            layer(2 * width, 2 * width, 4, 2),
            nn.LeakyReLU(0.2),
            layer(2 * width, 1, 3),
        )


class AdversarialTerm:
    """(sr, gt of 0 to 1) -> the network's loss, a scalar. A call that needs a gradient first takes
    a step of the discriminator."""

    def __init__(self) -> None:
        self.discriminator = discriminator()
        self.optimiser = torch.optim.Adam(
            self.discriminator.parameters(), LEARNING_RATE, betas=(0.5, 0.99)
        )

    def prepare(self, start: nn.Module, data: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Warms the discriminator up on (lr, gt) of ``data``."""
        for _ in range(WARM_UP):
            lr, gt = next(data)
            with torch.no_grad():
                sr = start(lr)
            self._learn(sr, gt)

    def _learn(self, sr: Tensor, gt: Tensor) -> None:
        self.discriminator.requires_grad_(True).train()
        real, fake = self.discriminator(2 * gt - 1), self.discriminator(2 * sr - 1)
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()

    def __call__(self, sr: Tensor, gt: Tensor) -> Tensor:
        if sr.requires_grad:
            self._learn(sr.detach(), gt)
        # In training mode every forward re-estimates the spectral norms.
        self.discriminator.requires_grad_(False).eval()
        return F.softplus(-self.discriminator(2 * sr - 1)).mean()
