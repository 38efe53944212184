"""The training objective of HF-Diff."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import functional
from .distillation import DistillationTerms, Student, distillation_terms
from .mghf import MGHFLoss

__all__ = ["DistillationTerms", "HFDiffLoss", "distillation_terms"]


class HFDiffLoss(nn.Module):
    """L = distill + eta1 HF + eta2 JS + inverse + consistency (HF-Diff eq. 9).

    HF is MGHF-n, JS the Jensen-Shannon divergence between the images' embeddings, the other three
    are SinSR's distillation terms.

    Args:
        extractor, input_range, backend, precision: as in :class:`MGHFLoss`.
        embedder: any callable from images (B, 3, H, W) to embeddings (B, D) or (B, T, D), such as a
            frozen DINO-v2 with its own preprocessing; ``None`` omits the JS term. It must be
            differentiable in the image. A module is used without a copy and kept in evaluation
            mode; freezing its weights is up to the caller.
        eta1: weight of HF.
        eta2: weight of JS.
        reduction: ``"mean"`` for a scalar, ``"none"`` for one value per image, (B,).
    """

    def __init__(
        self,
        extractor: nn.Module | str | Path | None = None,
        embedder: Callable[[Tensor], Tensor] | None = None,
        *,
        eta1: float = 0.2,
        eta2: float = 0.15,
        input_range: str | Sequence[float] | None = None,
        backend: str | None = "auto",
        reduction: str = "mean",
        precision: str = "auto",
    ) -> None:
        super().__init__()
        eta1, eta2 = check.check_number("eta1", eta1), check.check_number("eta2", eta2)
        check.check_choice("reduction", reduction, ("mean", "none"))
        if embedder is not None and not callable(embedder):
            raise TypeError(f"embedder must be callable or None, got {type(embedder).__name__}")
        self.eta1, self.eta2, self.reduction = eta1, eta2, reduction
        self.embedder = embedder.eval() if isinstance(embedder, nn.Module) else embedder
        self.perceptual = MGHFLoss(
            "n",
            extractor=extractor,
            input_range=input_range,
            backend=backend,
            reduction=reduction,
            precision=precision,
        )

    def train(self, mode: bool = True) -> HFDiffLoss:
        super().train(mode)
        if isinstance(self.embedder, nn.Module):
            self.embedder.eval()  # with dropout every call would give another embedding
        return self

    def terms(
        self, sr: Tensor, gt: Tensor, distillation: DistillationTerms | None = None
    ) -> dict[str, Tensor]:
        """Every term by name, unweighted and reduced like the loss, and ``total``, the loss.

        Keys: ``total``, ``hf``; ``js`` with an embedder; ``distill``, ``inverse`` and
        ``consistency`` with distillation terms.
        """
        terms = {"hf": self.perceptual(sr, gt)}
        total = self.eta1 * terms["hf"]
        if self.embedder is not None:
            # Copies, because an embedder may begin with an in-place layer.
            with torch.no_grad():
                target = self.embedder(gt.detach().clone())
            embedding = self.embedder(sr.clone())
            if self.eta2 and isinstance(embedding, Tensor):
                check.check_differentiable("embedder", embedding, sr)
            terms["js"] = functional.js_divergence_loss(embedding, target, reduction=self.reduction)
            total = total + self.eta2 * terms["js"]
        if distillation is not None:
            for name in ("distill", "inverse", "consistency"):
                terms[name] = self._reduced(name, getattr(distillation, name), len(sr))
                total = total + terms[name]
        return {"total": total, **terms}

    def _reduced(self, name: str, term: Tensor, batch: int) -> Tensor:
        if self.reduction == "mean":
            return term.mean()
        if term.shape != (batch,):
            raise ValueError(
                f"distillation.{name} must have shape ({batch},) for reduction 'none', got "
                f"{tuple(term.shape)}: distillation_terms(..., reduction='none') gives that"
            )
        return term

    def forward(
        self, sr: Tensor, gt: Tensor, distillation: DistillationTerms | None = None
    ) -> Tensor:
        """The loss, a scalar or (B,).

        Args:
            sr: super-resolved image, (B, 3, H, W); in distillation ``distillation.sr``, the image
                from the consistency cycle.
            gt: ground truth, same shape. Gets no gradient.
            distillation: from :func:`distillation_terms`; ``None`` for plain fine-tuning with the
                perceptual and distribution terms alone.

        Raises:
            TypeError, ValueError: as :class:`MGHFLoss`; the embedder returns something else than
                embeddings, or cuts their gradient; or, for ``reduction="none"``, distillation terms
                of another shape than (B,).
        """
        return self.terms(sr, gt, distillation)["total"]

    def distil(
        self,
        student: Student,
        noisy: Tensor,
        condition: Tensor,
        teacher_output: Tensor,
        gt: Tensor,
        final_timestep: int,
    ) -> Tensor:
        """The objective of one distillation step, a scalar or (B,); see
        :func:`distillation_terms`."""
        terms = distillation_terms(
            student,
            noisy,
            condition,
            teacher_output,
            gt,
            final_timestep,
            reduction=self.reduction,
        )
        return self(terms.sr, gt, terms)

    def extra_repr(self) -> str:
        return f"eta1={self.eta1}, eta2={self.eta2}, reduction={self.reduction!r}"
