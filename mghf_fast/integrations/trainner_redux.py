"""traiNNer-redux (the-database/traiNNer-redux): ``mghfloss`` in its ``LOSS_REGISTRY``.

The registry imports files from the trainer's folder. Add one with a single line:

    # traiNNer/losses/mghf_loss.py
    from mghf_fast.integrations.trainner_redux import MGHFLoss  # noqa: F401

and then, in the options:

    losses:
      - {type: charbonnierloss, loss_weight: 1.0}
      - {type: mghfloss, loss_weight: 0.1, extractor: perceptual-v1}

The trainer multiplies by ``loss_weight`` itself and reads it from the loss's attribute, so the
loss does not apply it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from traiNNer.utils.registry import LOSS_REGISTRY

from .._checks import check_number
from ..losses.mghf import DEFAULT_PRESET
from ._criterion import Criterion, pair

__all__ = ["MGHFLoss"]


@LOSS_REGISTRY.register()
class MGHFLoss(nn.Module):
    """``type: mghfloss``; in the log ``l_g_mghf``.

    Args:
        loss_weight: the factor by which the trainer multiplies. If it is negative, the trainer
            passes the enlarged low resolution instead of the ground truth, as for all its losses.
        variant, preset, extractor, top_m, input_range, patch_size, backend, precision: as in
            :class:`mghf_fast.MGHFLoss`.
        terms: log each weighted term separately, as ``l_g_mghf_naive`` and so on.
    """

    def __init__(
        self,
        loss_weight: float,
        variant: str = "c",
        preset: str | int = DEFAULT_PRESET,
        extractor: str | None = None,
        top_m: int | None = None,
        input_range: str = "0,1",
        patch_size: int | str = "auto",
        backend: str = "auto",
        precision: str = "auto",
        terms: bool = False,
    ) -> None:
        super().__init__()
        check_number("loss_weight", loss_weight)
        self.loss_weight, self.terms = loss_weight, terms
        self.criterion = Criterion(
            variant,
            preset,
            extractor,
            top_m,
            input_range=input_range,
            patch_size=patch_size,
            backend=backend,
            precision=precision,
        )

    def forward(self, output: Tensor, target: Tensor) -> Tensor | dict[str, Tensor]:
        """Images (B, 3, H, W) or video (B, T, 3, H, W), twice -> the loss without its weight; with
        ``terms`` a dictionary that adds up to it."""
        output, target, _ = pair(output, target, ("output", "target"))
        if not self.terms:
            return self.criterion(output, target)
        terms: dict[str, Tensor] = self.criterion.terms(output, target)
        total = torch.stack(list(terms.values())).sum()
        # The trainer skips parts that are not above 0, NaN included; it sees a NaN in the total.
        return terms if total.isfinite() else total
