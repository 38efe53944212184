"""Patch contrastive loss with transported negatives (MGHF eq. 8, MoNCE), and PatchNCE.

    s_ij = <q_i, k_j>,   a = plan of s (see sinkhorn.py), not on the diagonal
    loss_i = -log( e^{s_ii/t} / ( e^{s_ii/t} + Q (N-1) sum_{j != i} a_ij e^{s_ij/t} ) )
           = softplus(z_i - s_ii/t),   z_i = log sum_{j != i} exp(log a_ij + s_ij/t + log Q (N-1))

evaluated as the softplus, so that small losses keep their digits (in PyTorch as -logsigmoid of the
opposite: its softplus is cut at 20). Derivative, with the weight
r_i = dL/dloss_i * sigmoid(z_i - s_ii/t) and p_ij the softmax over j whose normaliser is z_i:

    ds_ii = -r_i / t,   ds_ij = r_i p_ij / t + (what log a_ij, with gradient r_i p_ij, passes on)
    dq = ds k           the keys are constants

PatchNCE (CUT) is the same with a_ij = 1 / (N - 1).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import can_run_reference
from ..ops.vocabulary import monce_state_shape
from ..precision import accumulation_dtype
from .sinkhorn import log_sinkhorn_plan, log_sinkhorn_plan_backward


def _similarity(query: Tensor, key: Tensor) -> Tensor:
    dtype = accumulation_dtype(query.dtype)
    return query.to(dtype) @ key.detach().to(dtype).mT


def _negative_logits(similarity: Tensor, log_weight: Tensor, temperature: float) -> Tensor:
    n = similarity.shape[-1]
    diagonal = torch.eye(n, dtype=torch.bool, device=similarity.device)
    return (log_weight + similarity / temperature).masked_fill(diagonal, -torch.inf)


def monce(
    query: Tensor,
    key: Tensor,
    temperature: float,
    epsilon: float,
    iterations: int,
    negative_weight: float,
    cost: str,
    plan_gradient: str,
) -> Tensor:
    """(B, N, D) x 2 -> (B, N), in float32 (float64 for float64)."""
    s = _similarity(query, key)
    n = s.shape[-1]
    if n == 1:
        return s.squeeze(2) * 0  # no negatives, no loss
    log_plan = log_sinkhorn_plan(s, cost, epsilon, iterations)
    if plan_gradient == "detach":
        log_plan = log_plan.detach()
    log_weight = log_plan + math.log(negative_weight * (n - 1))
    negatives = _negative_logits(s, log_weight, temperature).logsumexp(2)
    return -F.logsigmoid(s.diagonal(dim1=1, dim2=2) / temperature - negatives)


def monce_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    temperature: float,
    epsilon: float,
    iterations: int,
    negative_weight: float,
    cost: str,
    plan_gradient: str,
) -> Tensor:
    """Gradient of ``query`` for the gradient ``grad`` (B, N) of the losses."""
    s = _similarity(query, key)
    n = s.shape[-1]
    if n == 1:
        return query * 0 * grad.unsqueeze(2).to(query.dtype)
    log_weight = log_sinkhorn_plan(s, cost, epsilon, iterations)
    if plan_gradient == "detach":
        log_weight = log_weight.detach()  # a constant in the second derivative, too
    log_weight = log_weight + math.log(negative_weight * (n - 1))
    logits = _negative_logits(s, log_weight, temperature)
    negatives = logits.logsumexp(2, keepdim=True)
    positive = s.diagonal(dim1=1, dim2=2).unsqueeze(2) / temperature

    row = grad.to(s.dtype).unsqueeze(2) * torch.sigmoid(negatives - positive)
    grad_negatives = row * torch.exp(logits - negatives)
    identity = torch.eye(n, dtype=s.dtype, device=s.device)
    grad_s = (grad_negatives - row * identity) / temperature
    if plan_gradient == "exact":
        grad_s = grad_s + log_sinkhorn_plan_backward(grad_negatives, s, cost, epsilon, iterations)
    return (grad_s @ key.to(s.dtype)).to(query.dtype)


def patch_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """(B, N, D) x 2 -> (B, N): every negative weighs one."""
    s = _similarity(query, key)
    if s.shape[-1] == 1:
        return s.squeeze(2) * 0
    negatives = _negative_logits(s, torch.zeros_like(s), temperature).logsumexp(2)
    return -F.logsigmoid(s.diagonal(dim1=1, dim2=2) / temperature - negatives)


# ---- as a backend: the state for the backward is left at 0, and unused ----


def forward(
    query: Tensor,
    key: Tensor,
    temperature: float,
    epsilon: float,
    iterations: int,
    negative_weight: float,
    cost: str,
    plan_gradient: str,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    options = (temperature, epsilon, iterations, negative_weight, cost, plan_gradient)
    shape = monce_state_shape(query, iterations)
    return monce(query, key, *options), query.new_zeros(shape, dtype=torch.int32)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    state: Tensor,
    temperature: float,
    epsilon: float,
    iterations: int,
    negative_weight: float,
    cost: str,
    plan_gradient: str,
    precision: str = "float32",
) -> Tensor:
    options = (temperature, epsilon, iterations, negative_weight, cost, plan_gradient)
    return monce_backward(grad, query, key, *options)


can_run = can_run_reference
