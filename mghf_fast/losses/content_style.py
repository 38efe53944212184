"""Content-style consistency of two feature stacks."""

from __future__ import annotations

import functools
import operator

from torch import Tensor, nn

from .. import _checks as check
from .. import _options, functional
from ..backends import optional_backend
from ..precision import check_precision


class ContentStyleLoss(nn.Module):
    """L_csc = beta1 mse + beta2 correlation + beta3 gram of entropy-weighted features (MGHF eq. 6).

    Args:
        betas: (beta1, beta2, beta3), three finite numbers.
        top_m, alpha, gamma, bins, gram: as in :func:`functional.content_style_terms`.
        reduction: ``"mean"`` for a scalar, ``"none"`` for (B,).
        backend: ``"auto"`` or a backend's name.
        precision: as in :class:`MGHFLoss`.

    Raises:
        TypeError, ValueError: an option's type or value that is not allowed.
    """

    def __init__(
        self,
        betas: tuple[float, float, float] = (6e-3, 1e-1, 5e-4),
        *,
        top_m: int | None = None,
        alpha: float = 1.1,
        gamma: float = 2**0.5,
        bins: int = 256,
        gram: str = "channel",
        reduction: str = "mean",
        backend: str | None = None,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        check.check_choice("reduction", reduction, ("mean", "none"))
        beta1, beta2, beta3 = map(float, check.check_numbers("betas", betas, 3))
        self.betas = (beta1, beta2, beta3)
        self.top_m, self.alpha, self.gamma, self.bins = _options.style(
            top_m, alpha, gamma, bins, gram
        )
        self.gram, self.reduction, self.backend = gram, reduction, optional_backend(backend)
        self.precision = check_precision(precision)

    def terms(self, sr: Tensor, gt: Tensor) -> functional.ContentStyleTerms:
        """The four unweighted terms, each (B,)."""
        return functional.content_style_terms(
            gt=gt,
            sr=sr,
            top_m=self.top_m,
            alpha=self.alpha,
            gamma=self.gamma,
            bins=self.bins,
            gram=self.gram,
            backend=self.backend,
            precision=self.precision,
        )

    def combine(self, terms: functional.ContentStyleTerms) -> Tensor:
        """(B,): the weighted sum of the terms. A term with beta 0 is ignored, even if infinite."""
        weighted = [b * term for b, term in zip(self.betas, terms[1:], strict=True) if b]
        return functools.reduce(operator.add, weighted) if weighted else 0 * terms.mse

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Features of the super-resolved image and of the ground truth, (B, C, H, W) each."""
        loss = self.combine(self.terms(sr, gt))
        return loss.mean() if self.reduction == "mean" else loss

    def extra_repr(self) -> str:
        return (
            f"betas={self.betas}, top_m={self.top_m}, alpha={self.alpha}, gamma={self.gamma}, "
            f"bins={self.bins}, gram={self.gram!r}, reduction={self.reduction!r}, "
            f"precision={self.precision!r}"
        )
