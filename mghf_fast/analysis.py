"""Why pixel losses blur: the centre-oriented optimisation of DECLoss, section 3, as numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as check


class CenterOrientedOptimization(NamedTuple):
    """What a set of HR images of one LR image predicts for an L2-trained model's output.

    Attributes:
        entropy: entropy of the candidates in nats: ln N for at most as many candidates as pixels
            (eq. 22), the Gaussian's n/2 (ln 2 pi + 1) + 1/2 ln |covariance| for more (eq. 23; the
            paper omits the logarithm). Minus infinity for a degenerate Gaussian.
        midpoint: (C, H, W), the mean of the candidates: the output with minimal squared error.
        distance: L, the distance of the midpoint from the blurriest consistent image D+ x (eq. 17):
            the length of the mean null-space component. It falls as entropy grows (Theorem 1).
        spread: mean distance of the candidates from the midpoint. It grows with the entropy
            (Theorem 2).
    """

    entropy: float
    midpoint: Tensor
    distance: float
    spread: float


def center_oriented_optimization(candidates: Tensor, scale: int = 4) -> CenterOrientedOptimization:
    """Entropy and distances of a set of HR images of the same LR image (DECLoss eqs. 7 to 36).

    The downsampling D is the mean over ``scale`` x ``scale`` pixels and its pseudo-inverse D+
    repeats a pixel; v = (I - D+ D) y is a candidate's null-space component.

    Args:
        candidates: (N, C, H, W), H and W multiples of ``scale``. Use small patches: the Gaussian's
            covariance has (C H W)^2 entries.
        scale: the super-resolution factor.
    """
    check.check_tensor("candidates", candidates, "(N, C, H, W)")
    check.check_integer("scale", scale, 1)
    if candidates.shape[2] % scale or candidates.shape[3] % scale:
        raise ValueError(
            f"candidates must be a multiple of scale = {scale} pixels high and wide, got "
            f"{candidates.shape[2]} x {candidates.shape[3]}"
        )
    y = candidates.detach().double()
    n, pixels = y.shape[0], y[0].numel()
    midpoint = y.mean(0)
    null_space = y - F.interpolate(F.avg_pool2d(y, scale), scale_factor=scale)
    deviation = (y - midpoint).flatten(1)
    entropy = math.log(n)
    if n > pixels:
        covariance = deviation.mT @ deviation / n
        log_determinant = float(torch.linalg.slogdet(covariance).logabsdet)
        entropy = pixels / 2 * (math.log(2 * math.pi) + 1) + log_determinant / 2
    return CenterOrientedOptimization(
        entropy,
        midpoint.to(candidates.dtype),
        float(torch.linalg.vector_norm(null_space.mean(0))),
        float(torch.linalg.vector_norm(deviation, dim=1).mean()),
    )
