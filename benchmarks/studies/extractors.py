"""Features by name, for every study: ``load("curved-squeeze")`` and the like.

pixels             the image itself
linear             the extractor with PyTorch's own initialisation, the old "random"
curved             the untrained extractor as it starts now
curved-squeeze     the same behind a squeeze by 4, three blocks
vgg1 ... vgg5      a layer of the VGG-16 of shift-tolerant LPIPS (vgg3 is relu3_3)
a shipped name     such as procedural-v1
a .safetensors     that DetailFeatureExtractor.save_pretrained wrote
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mghf_fast import DetailFeatureExtractor, weights
from mghf_fast.commands.evaluate.stlpips import ShiftTolerantLPIPS

UNTRAINED: dict[str, dict[str, Any]] = {
    "linear": {"init": "linear", "clamp": None},
    "curved": {},
    "curved-squeeze": {"stem": "squeeze", "blocks": 3},
}
VGG_LAYERS = tuple(f"vgg{layer}" for layer in range(1, 6))
SEED = 0


class VGGLayer(nn.Module):
    """A layer of shift-tolerant LPIPS's VGG-16 of an image (B, 3, H, W) of -1 to 1."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.network, self.layer = ShiftTolerantLPIPS("vgg"), layer

    def forward(self, image: Tensor) -> Tensor:
        return self.network.features((image + 1) / 2, self.layer)[-1]


def untrained(name: str, seed: int = SEED) -> DetailFeatureExtractor:
    """One of ``UNTRAINED``, initialised from ``seed``; torch's random state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return DetailFeatureExtractor(**UNTRAINED[name])


def load(name: str) -> nn.Module:
    """The frozen module of a name, image (B, 3, H, W) of -1 to 1 -> features (B, C, h, w).

    Raises:
        ValueError: no such name.
        FileNotFoundError: no such file.
    """
    module: nn.Module
    if name == "pixels":
        module = nn.Identity()
    elif name in UNTRAINED:
        module = untrained(name)
    elif name in VGG_LAYERS:
        module = VGGLayer(int(name[3:]))
    elif name in weights.SHA256 or name.endswith(".safetensors"):
        module = DetailFeatureExtractor.from_pretrained(name)
    else:
        known = ", ".join(("pixels", *UNTRAINED, *VGG_LAYERS, *weights.SHA256))
        raise ValueError(f"features must be one of {known} or a .safetensors file, got {name!r}")
    return module.requires_grad_(False).eval()


def label(name: str) -> str:
    """The name; for a file its name without the folder."""
    return Path(name).name if name.endswith(".safetensors") else name


def identity(name: str) -> str:
    """A name that differs if the weights differ: a file's digest, else the name."""
    if name.endswith(".safetensors"):
        return f"{label(name)} {hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16]}"
    return name


Features = Callable[[Tensor], "Tensor | list[Tensor]"]
