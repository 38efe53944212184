"""Detail-enhanced contrastive loss over patches (DECLoss eqs. 37 to 42).

    M_ij = -20 log10(rmse(G_i, G_j) / max_value)      of GT patches; "l2": the norm for the RMSE
    j is positive for i  iff  M_ij >= threshold_db or i = j
    R_ij = cos(S_i, S_j),  X_ij = cos(G_i, S_j)       raw patches, norms floored at norm_floor
    Qpos_i = sum_pos (e^{R_ij/tp} + 2 e^{X_ij/tp}),   Qneg_i likewise over negatives with tn
    loss = -mean_i log(Qpos_i / Qneg_i)               over the rows that have a negative

temperature="outside" is the printed form, Q = (1/t) sum (e^R + 2 e^X), where t moves no gradient.
The logarithms are taken of sums whose largest term is 1, so that no temperature overflows.
Derivative, with c = -1 / (number of rows): dR_ij = c e^{R_ij/tp} / (tp Qpos_i) for a positive and
-c e^{R_ij/tn} / (tn Qneg_i) for a negative, dX_ij twice the same of X_ij; then with the unit
patches s = S / |S| and g = G / |G|:  ds = (dR + dR^T) s + dX^T g,  dS = (ds - s <s, ds>) / |S|.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import can_run_reference
from ..precision import accumulation_dtype


def positive_pairs(gt: Tensor, threshold_db: float, similarity: str, max_value: float) -> Tensor:
    """(P, D) GT patches -> (P, P), true where j is positive for i."""
    # Distances from differences, in full precision: the matrix-product form flips thresholds.
    distance = torch.cdist(gt, gt, compute_mode="donot_use_mm_for_euclid_dist")
    if similarity == "rmse":
        distance = distance / gt.shape[1] ** 0.5
    positive = -20 * torch.log10(distance / max_value) >= threshold_db
    return positive | torch.eye(gt.shape[0], dtype=torch.bool, device=gt.device)


def _unit(patches: Tensor, norm_floor: float) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(patches, dim=1, keepdim=True)
    return patches / norm.clamp_min(norm_floor), norm


def _log_sum(own: Tensor, cross: Tensor, chosen: Tensor) -> Tensor:
    """(P,): log of the sum of e^own + 2 e^cross over a row's chosen pairs; 0 for a row without."""
    some = chosen.any(1)
    logits = torch.logaddexp(own, cross + math.log(2)).masked_fill(~chosen, -math.inf)
    # A row of -inf alone would have a gradient of NaN.
    return logits.masked_fill(~some[:, None], 0).logsumexp(1).where(some, 0)


def _log_ratios(own: Tensor, cross: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log(Qpos / Qneg) of every row, log Qpos and log Qneg; a row without negatives has ratio 0 (or
    NaN, where a patch is NaN)."""
    log_positive, log_negative = (_log_sum(own, cross, p) for p in (positive, ~positive))
    ratio = log_positive - log_negative
    return torch.where((~positive).any(1), ratio, 0 * ratio), log_positive, log_negative


def _all_pairs(
    sr: Tensor,
    gt: Tensor,
    threshold_db: float,
    positive_temperature: float,
    negative_temperature: float,
    temperature: str,
    similarity: str,
    max_value: float,
    norm_floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unit SR patches, their norms, unit GT patches; positives, temperatures, and the logarithms of
    both exponentials of every pair."""
    dtype = accumulation_dtype(sr.dtype)
    gt = gt.detach().to(dtype)
    positive = positive_pairs(gt, threshold_db, similarity, max_value)
    (s, norm), (g, _) = _unit(sr.to(dtype), norm_floor), _unit(gt, norm_floor)
    t = torch.full_like(positive, negative_temperature, dtype=dtype)
    t = t.masked_fill(positive, positive_temperature)
    own, cross = s @ s.mT, g @ s.mT
    if temperature == "inside":
        return s, norm, g, positive, t, own / t, cross / t
    return s, norm, g, positive, t, own - t.log(), cross - t.log()


def dec(
    sr: Tensor,
    gt: Tensor,
    threshold_db: float,
    positive_temperature: float,
    negative_temperature: float,
    temperature: str,
    similarity: str,
    max_value: float,
    norm_floor: float,
) -> Tensor:
    """(P, D) patches x 2 -> scalar, in float32 (float64 for float64)."""
    temperatures = (positive_temperature, negative_temperature, temperature)
    pairs = _all_pairs(sr, gt, threshold_db, *temperatures, similarity, max_value, norm_floor)
    _, _, _, positive, _, own, cross = pairs
    ratio, _, _ = _log_ratios(own, cross, positive)
    return -ratio.sum() / (~positive).any(1).sum().clamp_min(1)


def dec_backward(
    grad: Tensor,
    sr: Tensor,
    gt: Tensor,
    threshold_db: float,
    positive_temperature: float,
    negative_temperature: float,
    temperature: str,
    similarity: str,
    max_value: float,
    norm_floor: float,
) -> Tensor:
    """Gradient of ``sr``."""
    temperatures = (positive_temperature, negative_temperature, temperature)
    pairs = _all_pairs(sr, gt, threshold_db, *temperatures, similarity, max_value, norm_floor)
    s, norm, g, positive, t, own, cross = pairs
    _, log_positive, log_negative = _log_ratios(own, cross, positive)

    has_negative = (~positive).any(1)
    scale = torch.where(has_negative, -grad.to(s.dtype) / has_negative.sum().clamp_min(1), 0)
    weight = torch.where(positive, scale[:, None], -scale[:, None])
    if temperature == "inside":
        weight = weight / t
    log_sum = torch.where(positive, log_positive[:, None], log_negative[:, None])
    grad_own = weight * (own - log_sum).exp()
    grad_cross = 2 * weight * (cross - log_sum).exp()

    grad_unit = (grad_own + grad_own.mT) @ s + grad_cross.mT @ g
    along = (s * grad_unit).sum(1, keepdim=True)
    # Below the floor a patch is divided by a constant and nothing is projected out.
    projected = grad_unit - torch.where(norm > norm_floor, s * along, 0)
    return (projected / norm.clamp_min(norm_floor)).to(sr.dtype)


# ---- as a backend: it keeps no statistics for the backward ----


def forward(
    sr: Tensor,
    gt: Tensor,
    threshold_db: float,
    positive_temperature: float,
    negative_temperature: float,
    temperature: str,
    similarity: str,
    max_value: float,
    norm_floor: float,
) -> tuple[Tensor, Tensor]:
    temperatures = (positive_temperature, negative_temperature, temperature)
    loss = dec(sr, gt, threshold_db, *temperatures, similarity, max_value, norm_floor)
    return loss, loss.new_zeros((2, sr.shape[0]))


def backward(
    grad: Tensor,
    sr: Tensor,
    gt: Tensor,
    statistics: Tensor,
    threshold_db: float,
    positive_temperature: float,
    negative_temperature: float,
    temperature: str,
    similarity: str,
    max_value: float,
    norm_floor: float,
) -> Tensor:
    temperatures = (positive_temperature, negative_temperature, temperature)
    options = (threshold_db, *temperatures, similarity, max_value, norm_floor)
    return dec_backward(grad, sr, gt, *options)


can_run = can_run_reference
