"""IQA-PyTorch (chaofengc/IQA-PyTorch): MGHF as the metrics ``mghf`` and ``mghf-n``.

import mghf_fast.integrations.pyiqa
loss = pyiqa.create_metric("mghf", as_loss=True)
loss(sr, gt)                                      # images in [0, 1]
"""

from __future__ import annotations

from typing import Any

from pyiqa.default_model_configs import DEFAULT_CONFIGS
from pyiqa.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from ._criterion import OPTIONS, Criterion, check_options, pair

__all__ = ["MGHF"]


@ARCH_REGISTRY.register()
class MGHF(nn.Module):
    """The network of pyiqa's metric.

    Args:
        variant: ``"c"`` or ``"n"``.
        options: ``preset``, ``extractor``, ``top_m``, ``input_range``, ``patch_size``, ``backend``,
            ``precision`` of :class:`mghf_fast.MGHFLoss`, with ``input_range="0,1"`` and
            ``patch_size="auto"`` unless given.
    """

    def __init__(self, variant: str = "c", **options: Any) -> None:
        super().__init__()
        check_options("MGHF", options, [name for name in OPTIONS if name != "reduction"])
        self.criterion = Criterion(variant, reduction="none", **options)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images (B, 3, H, W), or grey ones (B, 1, H, W), twice; ``y`` the ground truth -> (B, 1),
        lower is better."""
        x, y, _ = pair(x, y, ("x", "y"))
        if x.dim() == y.dim() == 4:
            x, y = (i.expand(-1, 3, -1, -1) if i.shape[1] == 1 else i for i in (x, y))
        distance: Tensor = self.criterion(x, y)
        return distance[:, None]


for _name, _variant in (("mghf", "c"), ("mghf-n", "n")):
    DEFAULT_CONFIGS[_name] = {
        "metric_opts": {"type": "MGHF", "variant": _variant},
        "metric_mode": "FR",
        "lower_better": True,
        "score_range": "0, ~1",
    }
