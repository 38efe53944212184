"""DECLoss as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import _checks as check
from .. import _options, functional
from ..backends import optional_backend


class DECLoss(nn.Module):
    """Detail-enhanced contrastive loss (DECLoss eqs. 37 to 42).

    The paper trains with ``1e-2 * L1 + 1 * perceptual + 1e-2 * dec``. There is no ``reduction``:
    the patches of the whole batch are contrasted with each other, so that no image has a value of
    its own.

    Args:
        weight: factor of the loss.
        options: every keyword of :func:`functional.dec_loss`.

    Raises:
        TypeError, ValueError: an unknown option; an option's type or value that is not allowed.
    """

    def __init__(self, weight: float = 1.0, **options: Any) -> None:
        super().__init__()
        weight = check.check_number("weight", weight)
        known = set(functional.dec_loss.__kwdefaults__ or ())
        if unknown := set(options) - known:
            raise TypeError(
                f"unknown options {sorted(unknown)}; allowed are weight, {', '.join(sorted(known))}"
            )
        optional_backend(options.get("backend"))
        elsewhere = ("backend", "gather")
        _options.dec(**{name: v for name, v in options.items() if name not in elsewhere})
        self.weight, self.options = weight, options

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Images (B, 3, H, W) x 2 -> scalar."""
        return self.weight * functional.dec_loss(sr, gt, **self.options)

    def extra_repr(self) -> str:
        options = {"weight": self.weight, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())
