"""Where each term of MGHF-c arises: for every term a map of shares whose mean over the pixels is
the term (MGHF eqs. 2 to 8; notation as in reference/content_style.py).

    naive        mean over maps of (S - G)^2
    mse          mean over kept maps of w^2 (S - G)^2
    correlation  1/2 mean over kept maps of (z_S - z_G)^2, z a map less its mean, over its floored
                 deviation: E z_S^2 = E z_G^2 = 1, so 1 - E z_S z_G = 1/2 E (z_S - z_G)^2. (Of a
                 map whose variance is below the floor, the rest is spread evenly.)
    gram         (s^T D s - g^T D g) / M^2 at each pixel, s and g the weighted maps' values there,
                 D the difference of their Gram matrices: sum D_ij^2 = sum D_ij (mean s_i s_j -
                 mean g_i g_j) / M. It has a sign: a pixel may take back what others give.
    lip          a patch's loss, mean over maps, averaged over the patches that cover a pixel, and
                 scaled as a whole so that the mean is the term; 0 where no patch reaches.

All are at the resolution of the features; :func:`enlarged` brings them to the image's. A share
shows which pixels contribute to a term; the gradient shows where a change would matter most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.vocabulary import VARIANCE_FLOOR


def naive(gt: Tensor, sr: Tensor) -> Tensor:
    """(C, H, W) x 2 -> (H, W)."""
    return (sr - gt).square().mean(0)


def mse(gt: Tensor, sr: Tensor, weights: Tensor) -> Tensor:
    """Kept maps, (M, H, W) x 2, and their weights, (M,) -> (H, W)."""
    return (weights.view(-1, 1, 1) * (sr - gt)).square().mean(0)


def _standardised(x: Tensor) -> Tensor:
    centred = x - x.mean((1, 2), keepdim=True)
    variance = centred.square().mean((1, 2), keepdim=True)
    return centred / variance.clamp_min(VARIANCE_FLOOR).sqrt()


def correlation(gt: Tensor, sr: Tensor) -> Tensor:
    """Kept maps, (M, H, W) x 2 -> (H, W)."""
    g, s = _standardised(gt), _standardised(sr)
    rest = 1 - (g.square().mean() + s.square().mean()) / 2
    return (s - g).square().mean(0) / 2 + rest


def gram(gt: Tensor, sr: Tensor, weights: Tensor) -> Tensor:
    """Kept maps, (M, H, W) x 2, and their weights, (M,) -> (H, W), of both signs."""
    m = len(weights)
    g, s = ((weights.view(-1, 1, 1) * x).flatten(1) for x in (gt, sr))
    difference = (s @ s.mT - g @ g.mT) / (m * g.shape[1])
    share = ((difference @ s) * s).sum(0) - ((difference @ g) * g).sum(0)
    return (share / m**2).view(gt.shape[1:])


def patch_corners(height: int, width: int, patch_size: int, stride: int) -> list[tuple[int, int]]:
    """Top and left of every patch, row-major."""
    rows, columns = (range(0, side - patch_size + 1, stride) for side in (height, width))
    return [(top, left) for top in rows for left in columns]


def lip(losses: Tensor, height: int, width: int, patch_size: int, stride: int) -> Tensor:
    """Losses of the N patches, (N,) -> (H, W)."""
    total, count = losses.new_zeros((2, height, width))
    corners = patch_corners(height, width, patch_size, stride)
    for (top, left), loss in zip(corners, losses, strict=True):
        patch = (slice(top, top + patch_size), slice(left, left + patch_size))
        total[patch] += loss
        count[patch] += 1
    share = total / count.clamp_min(1)
    mean = share.mean()
    return share * (losses.mean() / mean) if mean > 0 else share


def enlarged(share: Tensor, factor: int, height: int, width: int) -> Tensor:
    """A share at 1 / ``factor`` of the resolution, (ceil(H / factor), ceil(W / factor)) -> (H, W)
    with the same mean: each value is spread evenly over the image's pixels that its feature
    covers."""
    if factor == 1:
        return share
    for dim, side in enumerate((height, width)):
        # The last row or column may lie only partly in the image.
        inside = share.new_full((share.shape[dim],), factor)
        inside[-1] = side - factor * (share.shape[dim] - 1)
        each = side / share.shape[dim] / inside
        share = share * (each[:, None] if dim == 0 else each)
        share = share.repeat_interleave(factor, dim).narrow(dim, 0, side)
    return share


def gradient_magnitude(gradient: Tensor) -> Tensor:
    """The loss's gradient in the pixels, (3, H, W) -> its length over the colours, (H, W)."""
    return torch.linalg.vector_norm(gradient, dim=0)
