"""Detail-enhanced contrastive loss over patches (DECLoss eqs. 37 to 42).

    M_ij = -20 log10(rmse(G_i, G_j) / max_value)      of GT patches; "l2": the norm for the RMSE
    j is positive for i  iff  M_ij >= threshold_db or i = j
    R_ij = cos(S_i, S_j),  X_ij = cos(G_i, S_j)       raw patches, norms floored at 1e-8
    Qpos_i = sum_pos (e^{R_ij/tp} + 2 e^{X_ij/tp}),   Qneg_i likewise over negatives with tn
    loss = -mean_i log(Qpos_i / Qneg_i)               over the rows that have a negative

temperature="outside" is the printed form, Q = (1/t) sum (e^R + 2 e^X), where t moves no gradient.
Derivative, with c = -1 / (number of rows): dR_ij = c e^{R_ij/tp} / (tp Qpos_i) for a positive and
-c e^{R_ij/tn} / (tn Qneg_i) for a negative, dX_ij twice the same of X_ij; then with the unit
patches s = S / |S| and g = G / |G|:  ds = (dR + dR^T) s + dX^T g,  dS = (ds - s <s, ds>) / |S|.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import accumulation_dtype

NORM_FLOOR = 1e-8
SIMILARITIES = ("rmse", "l2")
TEMPERATURES = ("inside", "outside")


def positive_pairs(gt: Tensor, threshold_db: float, similarity: str, max_value: float) -> Tensor:
    """(P, D) GT patches -> (P, P), true where j is positive for i."""
    # Distances from differences, in full precision: the matrix-product form flips thresholds.
    distance = torch.cdist(gt, gt, compute_mode="donot_use_mm_for_euclid_dist")
    if similarity == "rmse":
        distance = distance / gt.shape[1] ** 0.5
    positive = -20 * torch.log10(distance / max_value) >= threshold_db
    return positive | torch.eye(gt.shape[0], dtype=torch.bool, device=gt.device)


def _unit(patches: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(patches, dim=1, keepdim=True)
    return patches / norm.clamp_min(NORM_FLOOR), norm


def _weighted_exponentials(similarities: Tensor, t: Tensor, temperature: str) -> Tensor:
    """exp(s / t), or exp(s) / t for the temperature outside."""
    return torch.exp(similarities / t) if temperature == "inside" else torch.exp(similarities) / t


def _log_ratios(own: Tensor, cross: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log(Qpos / Qneg) of every row, with Qpos and Qneg; a row without negatives has Qneg = 1 and
    ratio 0 (or NaN, where a patch is NaN)."""
    q = own + 2 * cross
    has_negative = (~positive).any(1)
    q_positive = q.masked_fill(~positive, 0).sum(1)
    q_negative = torch.where(has_negative, q.masked_fill(positive, 0).sum(1), 1)
    ratio = q_positive.log() - q_negative.log()
    return torch.where(has_negative, ratio, 0 * ratio), q_positive, q_negative


def _all_pairs(
    sr: Tensor,
    gt: Tensor,
    threshold_db: float,
    positive_temperature: float,
    negative_temperature: float,
    temperature: str,
    similarity: str,
    max_value: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unit SR patches, their norms, unit GT patches; positives, temperatures and both exponentials
    of every pair."""
    dtype = accumulation_dtype(sr.dtype)
    gt = gt.detach().to(dtype)
    positive = positive_pairs(gt, threshold_db, similarity, max_value)
    (s, norm), (g, _) = _unit(sr.to(dtype)), _unit(gt)
    t = torch.full_like(positive, negative_temperature, dtype=dtype)
    t = t.masked_fill(positive, positive_temperature)
    own = _weighted_exponentials(s @ s.mT, t, temperature)
    cross = _weighted_exponentials(g @ s.mT, t, temperature)
    return s, norm, g, positive, t, own, cross


def dec(
    sr: Tensor,
    gt: Tensor,
    threshold_db: float,
    positive_temperature: float,
    negative_temperature: float,
    temperature: str,
    similarity: str,
    max_value: float,
) -> Tensor:
    """(P, D) patches x 2 -> scalar, in float32 (float64 for float64)."""
    temperatures = (positive_temperature, negative_temperature, temperature)
    pairs = _all_pairs(sr, gt, threshold_db, *temperatures, similarity, max_value)
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
) -> Tensor:
    """Gradient of ``sr``."""
    temperatures = (positive_temperature, negative_temperature, temperature)
    pairs = _all_pairs(sr, gt, threshold_db, *temperatures, similarity, max_value)
    s, norm, g, positive, t, own, cross = pairs
    _, q_positive, q_negative = _log_ratios(own, cross, positive)

    has_negative = (~positive).any(1)
    scale = torch.where(has_negative, -grad.to(s.dtype) / has_negative.sum().clamp_min(1), 0)
    weight = torch.where(positive, (scale / q_positive)[:, None], (-scale / q_negative)[:, None])
    if temperature == "inside":
        weight = weight / t
    grad_own, grad_cross = weight * own, 2 * weight * cross

    grad_unit = (grad_own + grad_own.mT) @ s + grad_cross.mT @ g
    along = (s * grad_unit).sum(1, keepdim=True)
    # Below the floor a patch is divided by a constant and nothing is projected out.
    projected = grad_unit - torch.where(norm > NORM_FLOOR, s * along, 0)
    return (projected / norm.clamp_min(NORM_FLOOR)).to(sr.dtype)
