"""neosr (neosr-project/neosr): ``mghf_loss`` in its ``LOSS_REGISTRY``.

The registry imports files from the trainer's folder. Add one with a single line:

    # neosr/losses/mghf_loss.py
    from mghf_fast.integrations.neosr import mghf_loss  # noqa: F401

and then, in the options:

    [train.perceptual_opt]
    type = "mghf_loss"
    loss_weight = 0.1
    extractor = "perceptual-v1"

neosr applies no weight itself.
"""

from __future__ import annotations

from typing import Any

from neosr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from .._checks import check_number
from ._criterion import DEFAULT_WEIGHT, OPTIONS, Criterion, check_options, pair

__all__ = ["mghf_loss"]


@LOSS_REGISTRY.register()
class mghf_loss(nn.Module):
    """``type = "mghf_loss"``, for neosr's perceptual slot.

    Args:
        loss_weight: factor of the loss.
        options: ``variant``, ``preset``, ``extractor``, ``top_m``, ``input_range``,
            ``patch_size``, ``backend``, ``precision`` of :class:`mghf_fast.MGHFLoss`, with
            ``input_range="0,1"`` and ``patch_size="auto"`` unless given.
    """

    def __init__(self, loss_weight: float = DEFAULT_WEIGHT, **options: Any) -> None:
        super().__init__()
        known = [name for name in OPTIONS if name != "reduction"]
        check_options("mghf_loss", options, ("loss_weight", *known))
        check_number("loss_weight", loss_weight)
        self.loss_weight = loss_weight
        self.criterion = Criterion(**options)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images (B, 3, H, W) twice, ``x`` from the network -> the weighted loss, a scalar."""
        x, y, _ = pair(x, y, ("x", "y"))
        return self.loss_weight * self.criterion(x, y)
