"""What is compared: the trained extractor, random ones of its shape, VGG-16's layout, pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mghf_fast import DetailFeatureExtractor
from mghf_fast.cost import VGG16_STAGES

TRAINED, RANDOM, VGG, PIXELS = "trained", "random", "VGG-16 layout, random", "raw pixels"

# Names in Simonyan and Zisserman's counting -> how many of the layers are run.
VGG_LAYERS = {"relu1_2": 4, "relu2_2": 9, "relu3_3": 16}


@dataclass(frozen=True)
class Subject:
    """A kind of features: (B, 3, H, W) in [0, 1] -> (B, C, h, w). ``seed`` tells random ones of one
    name apart."""

    name: str
    features: Callable[[Tensor], Tensor]
    seed: int = 0


def of_extractor(name: str, extractor: nn.Module, seed: int = 0) -> Subject:
    """An extractor as the losses use it: frozen, on images brought to [-1, 1]."""
    frozen = extractor.eval().requires_grad_(False)
    return Subject(name, lambda image: frozen(image * 2 - 1), seed)


def random_extractor(like: DetailFeatureExtractor, seed: int) -> DetailFeatureExtractor:
    """A random one with the trained one's configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DetailFeatureExtractor(**like.config).eval().requires_grad_(False)


def vgg16(layer: str, seed: int) -> nn.Sequential:
    """The layers of VGG-16's layout up to ``layer``, random (He initialisation). Trained ones are
    the user's: they do not come with this library."""
    layers: list[nn.Module] = []
    channels = 3
    generator = torch.Generator().manual_seed(seed)
    for stage in VGG16_STAGES:
        for width in stage:
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu", generator=generator)
            layers += [convolution, nn.ReLU()]
            channels = width
            if len(layers) == VGG_LAYERS[layer]:
                return nn.Sequential(*layers).eval().requires_grad_(False)
        layers.append(nn.MaxPool2d(2))
    raise AssertionError(layer)


def digest(extractor: DetailFeatureExtractor) -> str:
    """SHA-256 of the configuration and the weights, the same however they lie in a file."""
    found = hashlib.sha256(json.dumps(extractor.config, sort_keys=True).encode())
    for name, tensor in sorted(extractor.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def describe(extractor: DetailFeatureExtractor, weights: str) -> dict[str, Any]:
    """What the result says of the weights: no path, as that is the machine's."""
    return {
        "name": Path(weights).name,
        "sha256": digest(extractor),
        "config": extractor.config,
        "parameters": sum(p.numel() for p in extractor.parameters()),
    }
