"""MGHF-n and the content-style consistency of a pair of feature stacks (MGHF eqs. 3 to 7).

    naive = mean (S - G)^2                                                     over all C maps
    I = ((1 - H(G)) + (1 - H(S))) / 2,   w = (1 + alpha I)^gamma               H: channel entropy
    each image's M maps with the largest I are kept (ties: the lower index)
    mse  = mean over kept maps and pixels of w^2 (S - G)^2
    correlation = 1 - mean over kept maps of cov(G, S) / sqrt(max(var G, f) max(var S, f)), f = 1e-8
    gram = (1 / M) sum (D_ij)^2,   D = Gram(w S) - Gram(w G),  Gram(F) = F F^T / (M H W)
    or, gram="map":  (1 / M) sum over maps of sum (D_ij)^2, with Gram(F) = F F^T / W of an H x W map

The Gram difference is computed as written, from two products: maps whose mean is far above their
deviation lose digits in float32 (0.1 % of the term at 100 to 1). The compiled kernels avoid this.
The weights are constants. Gradient of S, n = H W, m the mean, rho a map's correlation:

    naive: 2 (S - G) / (C n)          mse: 2 w^2 (S - G) / (M n)
    correlation: -(1 / M) [(G - m_G) / (n sqrt(..)) - rho (S - m_S) / (n var S)]   (second term 0
                 where the floor of var S is active)
    gram: 4 w D (w S) / (M^2 n)       gram="map": 4 w D (w S) / (M W)

The forward also returns what a backward needs of the maps to be one sweep over S and G: `moments`,
for each kept map m_S, m_G, m_(S-G), 1 / sqrt(..), rho / var S and the difference of these two, and
the matrix D (empty for gram="map"). The backward here recomputes them, so that it can itself be
differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import can_run_reference
from ..ops.vocabulary import VARIANCE_FLOOR, ContentStyleOutputs
from ..precision import accumulation_dtype
from .entropy import precise_entropy


def importance_weights(
    gt: Tensor, sr: Tensor, top_m: int, alpha: float, gamma: float, bins: int
) -> tuple[Tensor, Tensor]:
    """Indices and weights of the kept maps, both (B, M), most important first."""
    importance = 1 - (precise_entropy(gt, bins) + precise_entropy(sr, bins)) / 2
    # A stable sort, because topk does not define the order of ties. NaN counts as the largest, so a
    # map with a NaN is always kept and the loss becomes NaN. Compared in float32, so that rounding
    # errors of float64 break no ties.
    kept = importance.float().sort(dim=1, descending=True, stable=True)[1][:, :top_m].contiguous()
    weights = (1 + alpha * importance.gather(1, kept)) ** gamma
    return kept, weights.to(accumulation_dtype(sr.dtype))


def _kept_maps(x: Tensor, kept: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, M, H W)."""
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return x[rows, kept].flatten(2).to(accumulation_dtype(x.dtype))


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x - x.mean(2, keepdim=True)
    return x, (x * x).mean(2)


def _gram_difference(gt: Tensor, sr: Tensor, height: int, gram: str) -> Tensor:
    """D for weighted (B, M, H W) stacks: (B, M, M), or (B, M, H, H) for ``gram="map"``."""
    m, n = gt.shape[1:]
    if gram == "map":
        gt, sr = gt.unflatten(2, (height, -1)), sr.unflatten(2, (height, -1))
        return (sr @ sr.mT - gt @ gt.mT) / (n // height)
    return (sr @ sr.mT - gt @ gt.mT) / (m * n)


def content_style(
    gt: Tensor, sr: Tensor, top_m: int, alpha: float, gamma: float, bins: int, gram: str
) -> ContentStyleOutputs:
    """(B, C, H, W) x 2 -> naive, mse, correlation, gram, each (B,); kept and weights, (B, M);
    moments, (B, 6, M); difference, (B, M, M) or (B, 0, 0). M = 0 is MGHF-n alone, the rest 0."""
    dtype = accumulation_dtype(sr.dtype)
    naive = (sr.to(dtype) - gt.to(dtype)).square().mean((1, 2, 3))
    if top_m == 0:
        zero, b = torch.zeros_like(naive), sr.shape[0]
        kept, weights = zero.new_empty((b, 0), dtype=torch.int64), zero.new_empty((b, 0))
        nothing = weights.new_empty((b, 6, 0)), weights.new_empty((b, 0, 0))
        return naive, zero, zero.clone(), zero.clone(), kept, weights, *nothing
    kept, weights = importance_weights(gt, sr, top_m, alpha, gamma, bins)
    g, s, w = _kept_maps(gt, kept), _kept_maps(sr, kept), weights.unsqueeze(2)

    mse = (w * (s - g)).square().mean((1, 2))
    (g0, var_g), (s0, var_s) = _centred(g), _centred(s)
    root = (var_g.clamp_min(VARIANCE_FLOOR) * var_s.clamp_min(VARIANCE_FLOOR)).sqrt()
    rho = (g0 * s0).mean(2) / root
    correlation = 1 - rho.mean(1)
    difference = _gram_difference(w * g, w * s, gt.shape[2], gram)
    style = difference.square().flatten(1).sum(1) / top_m

    slope = torch.where(var_s > VARIANCE_FLOOR, rho / var_s.clamp_min(VARIANCE_FLOOR), 0)
    means = s.mean(2), g.mean(2), (s - g).mean(2)
    moments = torch.stack((*means, 1 / root, slope, 1 / root - slope), 1)
    if gram == "map":
        difference = difference.new_empty((gt.shape[0], 0, 0))
    return naive, mse, correlation, style, kept, weights, moments.detach(), difference.detach()


def content_style_backward(
    grad_naive: Tensor,
    grad_mse: Tensor,
    grad_correlation: Tensor,
    grad_gram: Tensor,
    gt: Tensor,
    sr: Tensor,
    kept: Tensor,
    weights: Tensor,
    gram: str,
) -> Tensor:
    """Gradient of ``sr`` for the (B,) gradients of the four terms."""
    dtype = accumulation_dtype(sr.dtype)
    (c, h, width), m = sr.shape[1:], kept.shape[1]
    n = h * width
    grad_sr = (2 / (c * n)) * grad_naive.view(-1, 1, 1, 1) * (sr.to(dtype) - gt.to(dtype))
    if m == 0:
        return grad_sr.to(sr.dtype)
    g, s, w = _kept_maps(gt, kept), _kept_maps(sr, kept), weights.unsqueeze(2)

    grad = (2 / (m * n)) * grad_mse.view(-1, 1, 1) * w * w * (s - g)

    (g0, var_g), (s0, var_s) = _centred(g), _centred(s)
    root = (var_g.clamp_min(VARIANCE_FLOOR) * var_s.clamp_min(VARIANCE_FLOOR)).sqrt()
    rho = (g0 * s0).mean(2) / root
    slope = torch.where(var_s > VARIANCE_FLOOR, rho / var_s.clamp_min(VARIANCE_FLOOR), 0)
    per_map = g0 / root.unsqueeze(2) - slope.unsqueeze(2) * s0
    grad = grad - grad_correlation.view(-1, 1, 1) * per_map / (m * n)

    difference = _gram_difference(w * g, w * s, h, gram)
    if gram == "map":
        product = (difference @ (w * s).unflatten(2, (h, width))).flatten(2) * (4 / (m * width))
    else:
        product = difference @ (w * s) * (4 / (m * m * n))
    grad = grad + grad_gram.view(-1, 1, 1) * w * product
    index = kept.unsqueeze(2).expand(-1, -1, n)
    return grad_sr.flatten(2).scatter_add(1, index, grad).view(sr.shape).to(sr.dtype)


# ---- as a backend ----


def forward(
    gt: Tensor,
    sr: Tensor,
    top_m: int,
    alpha: float,
    gamma: float,
    bins: int,
    gram: str,
    precision: str = "float32",
) -> ContentStyleOutputs:
    return content_style(gt, sr, top_m, alpha, gamma, bins, gram)


def backward(
    grad_naive: Tensor,
    grad_mse: Tensor,
    grad_correlation: Tensor,
    grad_gram: Tensor,
    gt: Tensor,
    sr: Tensor,
    kept: Tensor,
    weights: Tensor,
    moments: Tensor,
    difference: Tensor,
    gram: str,
    precision: str = "float32",
    into: Tensor | None = None,
) -> Tensor:
    """Recomputes the statistics: they depend on ``sr``, and this may be differentiated. Writes into
    new memory."""
    grads = (grad_naive, grad_mse, grad_correlation, grad_gram)
    return content_style_backward(*grads, gt, sr, kept, weights, gram)


can_run = can_run_reference
