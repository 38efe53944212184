"""Optimal transport plan between patches (MGHF eqs. 13 to 16, MoNCE), in the log domain.

    K_ij = exp(score_ij / epsilon), K_ii = 0        score: see `transport_score`
    f_i <- -log sum_j exp(log K_ij + g_j)           rows (queries), then
    g_j <- -log sum_i exp(log K_ij + f_i)           columns (keys), `iterations` times
    plan_ij = exp(log K_ij + f_i + g_j)             columns sum to 1, rows nearly so; mass N

Derivative of a scalar L with W = dL/dplan * plan, running the recursion backwards:

    dlogK = W,  df = W 1,  dg = W^T 1, and for each iteration from the last to the first
    B = exp(log K + f + g)      (columns sum to 1)   dlogK -= B dg^T,  df -= B dg
    A = exp(log K + f + g_prev) (rows sum to 1)      dlogK -= df A,    dg = -A^T df,  df = 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import can_run_reference
from ..precision import accumulation_dtype


def transport_score(similarity: Tensor, cost: str) -> Tensor:
    """The score that the plan maximises: ``"hard"`` favours similar pairs, the others dissimilar
    ones."""
    if cost == "hard":
        return similarity
    if cost == "easy":
        return 1 - similarity
    return -similarity.exp()  # "exp": the papers' cost exp(s), minimised


def _log_kernel(similarity: Tensor, cost: str, epsilon: float) -> Tensor:
    score = transport_score(similarity.to(accumulation_dtype(similarity.dtype)), cost)
    diagonal = torch.eye(score.shape[-1], dtype=torch.bool, device=score.device)
    return (score / epsilon).masked_fill(diagonal, -torch.inf)


def _potentials(
    log_kernel: Tensor, iterations: int, tolerance: float | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(f, g, active) after each iteration, first the start (0, 0). A matrix is active until its
    largest marginal error is within the tolerance; from then on its potentials rest."""
    f = g = torch.zeros_like(log_kernel[:, 0])
    active = torch.ones_like(f[:, :1], dtype=torch.bool)
    history = [(f, g, active)]
    for step in range(iterations):
        new_f = -torch.logsumexp(log_kernel + g.unsqueeze(1), 2)
        if tolerance is not None and step > 0:
            # exp(f - new_f) is the row sum of the current plan.
            error = (torch.exp(f - new_f) - 1).abs().amax(1, keepdim=True)
            active = active & ~(error <= tolerance)
            if not active.any():
                break
        new_g = -torch.logsumexp(log_kernel + new_f.unsqueeze(2), 1)
        f, g = torch.where(active, new_f, f), torch.where(active, new_g, g)
        history.append((f, g, active))
    return history


def log_sinkhorn_plan(
    similarity: Tensor, cost: str, epsilon: float, iterations: int, tolerance: float | None = None
) -> Tensor:
    """Logarithm of the plan, -inf on the diagonal. Needs N > 1."""
    log_kernel = _log_kernel(similarity, cost, epsilon)
    f, g, _ = _potentials(log_kernel, iterations, tolerance)[-1]
    return log_kernel + f.unsqueeze(2) + g.unsqueeze(1)


def sinkhorn_plan(
    similarity: Tensor, cost: str, epsilon: float, iterations: int, tolerance: float | None = None
) -> Tensor:
    """(B, N, N) similarities -> (B, N, N) plans, columns summing to one, zero diagonals."""
    if similarity.shape[-1] == 1:
        return similarity * 0  # a single patch has no negatives to move mass to
    log_plan = log_sinkhorn_plan(similarity, cost, epsilon, iterations, tolerance)
    return torch.exp(log_plan).to(similarity.dtype)


def log_sinkhorn_plan_backward(
    grad_log_plan: Tensor,
    similarity: Tensor,
    cost: str,
    epsilon: float,
    iterations: int,
    tolerance: float | None = None,
) -> Tensor:
    """Gradient of the similarities for the gradient of the plan's logarithm (the W above)."""
    log_kernel = _log_kernel(similarity, cost, epsilon)
    history = _potentials(log_kernel, iterations, tolerance)
    grad_log_kernel = grad_log_plan
    grad_f, grad_g = grad_log_kernel.sum(2), grad_log_kernel.sum(1)
    for (_, previous_g, _), (f, g, active) in zip(history[-2::-1], history[:0:-1], strict=True):
        columns = torch.exp(log_kernel + f.unsqueeze(2) + g.unsqueeze(1)) * grad_g.unsqueeze(1)
        rows = torch.exp(log_kernel + f.unsqueeze(2) + previous_g.unsqueeze(1))
        rows = rows * (grad_f - columns.sum(2)).unsqueeze(2)
        # A matrix that had already converged took no part in this iteration.
        resting = ~active
        grad_log_kernel = grad_log_kernel - (columns + rows).masked_fill(resting.unsqueeze(2), 0)
        grad_g = torch.where(active, -rows.sum(1), grad_g)
        grad_f = torch.where(active, 0, grad_f)

    if cost == "exp":
        grad_score = grad_log_kernel * -similarity.to(log_kernel.dtype).exp()
    else:
        grad_score = grad_log_kernel if cost == "hard" else -grad_log_kernel
    return (grad_score / epsilon).to(similarity.dtype)


def sinkhorn_plan_backward(
    grad: Tensor,
    similarity: Tensor,
    cost: str,
    epsilon: float,
    iterations: int,
    tolerance: float | None = None,
) -> Tensor:
    """Gradient of the similarities for that of the plan, through every iteration."""
    if similarity.shape[-1] == 1:
        return grad * 0
    log_plan = log_sinkhorn_plan(similarity, cost, epsilon, iterations, tolerance)
    grad_log_plan = grad.to(log_plan.dtype) * log_plan.exp()
    return log_sinkhorn_plan_backward(
        grad_log_plan, similarity, cost, epsilon, iterations, tolerance
    )


forward, backward, can_run = sinkhorn_plan, sinkhorn_plan_backward, can_run_reference
