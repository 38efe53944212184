"""BasicSR (XPixelGroup/BasicSR 1.4.2): ``MGHFLoss`` and ``DECLoss`` in its ``LOSS_REGISTRY``.

    python -m mghf_fast.integrations.basicsr -opt options/train/mine.yml

runs BasicSR's own ``basicsr/train.py`` with both losses registered, and takes the same arguments.
In your own launcher ``import mghf_fast.integrations.basicsr`` is enough. In the options:

    train:
      pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}
      perceptual_opt: {type: MGHFLoss, perceptual_weight: 0.1, extractor: perceptual-v1}

BasicSR expects a pair from its perceptual slot, which it logs as ``l_percep`` and ``l_style``, and
a single value from its pixel slot; it applies no weight itself.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from typing import Any

from torch import Tensor, nn

from .. import losses
from .._checks import check_choice, check_number
from ..functional import dec_loss
from ._criterion import DEFAULT_WEIGHT, OPTIONS, Criterion, check_options, pair

__all__ = ["DECLoss", "MGHFLoss", "train"]

RETURNS = ("pair", "scalar")
_DEC_OPTIONS = tuple(dec_loss.__kwdefaults__ or ())


class MGHFLoss(nn.Module):
    """``type: MGHFLoss``.

    Args:
        perceptual_weight: factor of MGHF.
        returns: ``"pair"`` for BasicSR's perceptual slot, ``"scalar"`` for its pixel slot.
        dec_weight: factor of :class:`mghf_fast.DECLoss`, the second of the pair; 0 omits it.
        options: as :class:`mghf_fast.MGHFLoss` takes them (``variant``, ``preset``, ``extractor``,
            ``top_m``, ``input_range``, ``patch_size``, ``backend``, ``precision``), with
            ``input_range="0,1"`` and ``patch_size="auto"`` unless given.
    """

    def __init__(
        self,
        perceptual_weight: float = DEFAULT_WEIGHT,
        returns: str = "pair",
        dec_weight: float = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        own = ("perceptual_weight", "returns", "dec_weight")
        known = [name for name in OPTIONS if name != "reduction"]
        check_options("MGHFLoss", options, (*own, *known))
        check_number("perceptual_weight", perceptual_weight)
        check_number("dec_weight", dec_weight)
        check_choice("returns", returns, RETURNS)
        self.perceptual_weight, self.returns = perceptual_weight, returns
        self.criterion = Criterion(**options)
        self.dec = losses.DECLoss(dec_weight) if dec_weight else None

    def forward(self, x: Tensor, gt: Tensor) -> tuple[Tensor, Tensor | None] | Tensor:
        """Images (B, 3, H, W) or video (B, T, 3, H, W), twice -> the weighted losses: (MGHF, DEC
        or None), or their sum with ``returns="scalar"``."""
        x, gt, _ = pair(x, gt, ("x", "gt"))
        mghf = self.perceptual_weight * self.criterion(x, gt)
        dec = None if self.dec is None else self.dec(x, gt)
        if self.returns == "pair":
            return mghf, dec
        return mghf if dec is None else mghf + dec


class DECLoss(nn.Module):
    """``type: DECLoss``.

    Args:
        loss_weight: factor of the loss.
        returns: ``"pair"`` for BasicSR's perceptual slot (the loss and ``None``), ``"scalar"`` for
            its pixel slot.
        options: every keyword of :func:`mghf_fast.functional.dec_loss`.
    """

    def __init__(self, loss_weight: float = 1.0, returns: str = "pair", **options: Any) -> None:
        super().__init__()
        check_options("DECLoss", options, ("loss_weight", "returns", *_DEC_OPTIONS))
        check_number("loss_weight", loss_weight)
        check_choice("returns", returns, RETURNS)
        self.returns = returns
        self.loss = losses.DECLoss(loss_weight, **options)

    def forward(self, x: Tensor, gt: Tensor) -> tuple[Tensor, None] | Tensor:
        """Images (B, 3, H, W) or video (B, T, 3, H, W), twice -> the weighted loss."""
        x, gt, _ = pair(x, gt, ("x", "gt"))
        loss: Tensor = self.loss(x, gt)
        return (loss, None) if self.returns == "pair" else loss


def supply_functional_tensor() -> None:
    """Restores ``torchvision.transforms.functional_tensor``, from which BasicSR 1.4.2 imports one
    function and which torchvision removed in 0.17."""
    name = "torchvision.transforms.functional_tensor"
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    from torchvision.transforms.functional import rgb_to_grayscale

    module = types.ModuleType(name)
    module.rgb_to_grayscale = rgb_to_grayscale  # type: ignore[attr-defined]
    sys.modules[name] = module


def train() -> None:
    """BasicSR's training, with the process's own arguments (``-opt FILE`` and so on). Results go to
    ``experiments/`` in the current folder."""
    from basicsr.train import train_pipeline

    train_pipeline(os.getcwd())


if __name__ == "__main__":
    # By its real name, so that these classes are not registered twice.
    from mghf_fast.integrations import basicsr

    basicsr.train()
else:
    supply_functional_tensor()
    from basicsr.utils.registry import LOSS_REGISTRY

    LOSS_REGISTRY.register(MGHFLoss)
    LOSS_REGISTRY.register(DECLoss)
