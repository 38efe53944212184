"""The classifier that is trained: the detail feature extractor, CNN stages, global pooling, one
linear layer (Algorithm 1 of MGHF). Afterwards only the extractor is kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ...nn import DetailFeatureExtractor
from .run import TrainedNetwork


def _stage(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


class Classifier(TrainedNetwork):
    """extractor -> stages -> global average pooling -> linear.

    Args:
        extractor: the extractor to be trained.
        stages: widths of the stages: a 3x3 convolution of stride 2, batch norm, ReLU each.
        classes: number of labels.
    """

    def __init__(
        self, extractor: DetailFeatureExtractor, stages: Sequence[int], classes: int
    ) -> None:
        super().__init__()
        widths = [extractor.channels, *stages]
        layers = [m for pair in pairwise(widths) for m in _stage(*pair)]
        self.extractor = extractor
        self.stages = nn.Sequential(*layers)
        self.stages.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> logits (B, classes)."""
        features: Tensor = self.stages(self.extractor(image))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


def multiply_adds(network: TrainedNetwork, size: int) -> tuple[int, int]:
    """Multiply-adds of the forward for one image of ``size`` x ``size`` pixels, by the rule of
    :mod:`mghf_fast.commands.table5.cost`: those of the extractor, and of the layers behind it.

    Each of the extractor's weights is used once per pixel of its features; but a convolutional stem
    is folded into the first mix, whose own weights are then not used.
    """
    extractor = network.extractor
    weights = sum(p.numel() for p in extractor.parameters() if p.dim() > 1)
    if isinstance(extractor.stem, nn.Conv2d):
        weights -= extractor.channels**2
    side = -(-size // extractor.downscale)
    return weights * side**2, _behind(network, side)


def _behind(network: TrainedNetwork, side: int) -> int:
    """Multiply-adds of the layers behind the extractor, whose features are ``side`` x ``side``."""
    if not isinstance(network, Classifier):
        return 0
    head = network.classifier.weight.numel()
    for layer in network.stages:
        if isinstance(layer, nn.Conv2d):
            side = (side + 1) // 2
            head += layer.weight.numel() * side * side
    return head
