"""traiNNer-redux (the-database/traiNNer-redux): ``mghfloss`` in its ``LOSS_REGISTRY``.

The registry fills itself from files of the trainer's folder. Put one there, of one line:

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
        loss_weight: what the trainer multiplies by. Below 0 it compares with the enlarged low
            resolution instead of the ground truth, as for every loss of that trainer.
        variant, preset, extractor, top_m, input_range, patch_size, backend: as in
            :class:`mghf_fast.MGHFLoss`.
        terms: log each weighted term by itself, as ``l_g_mghf_naive`` and so on.
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
        )

    def forward(self, output: Tensor, target: Tensor) -> Tensor | dict[str, Tensor]:
        """Images (B, 3, H, W) or video (B, T, 3, H, W), twice -> the loss without its weight; with
        ``terms`` a dictionary that adds up to it."""
        output, target, _ = pair(output, target, ("output", "target"))
        if not self.terms:
            return self.criterion(output, target)
        terms: dict[str, Tensor] = self.criterion.terms(output, target)
        total = torch.stack(list(terms.values())).sum()
        # The trainer leaves out parts that are not above 0, a NaN too; as a whole it is seen.
        return terms if total.isfinite() else total
