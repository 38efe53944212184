"""The contract of `monce`: the patch contrastive loss with transported negatives."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import accumulation_dtype
from ..reference.monce import monce as reference_forward
from ..reference.monce import monce_backward as reference_backward
from ._dispatch import Op, can_run_cpu, double_backward_requested, register_float32_autocast


def _cpu_logits(
    query: Tensor,
    key: Tensor,
    temperature: float,
    epsilon: float,
    iterations: int,
    negative_weight: float,
    cost: str,
) -> tuple[Tensor, Tensor]:
    """The similarities, and log a_ij + s_ij/t + log Q (N-1), -inf on the diagonal."""
    s = query.float() @ key.float().mT
    plan: Tensor = torch.ops.mghf_native.sinkhorn(s, cost, epsilon, iterations, None)
    logits = plan.log_().add_(s, alpha=1 / temperature)
    return s, logits.add_(math.log(negative_weight * (s.shape[-1] - 1)))


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    temperature: float,
    epsilon: float,
    iterations: int,
    negative_weight: float,
    cost: str,
    plan_gradient: str,
) -> Tensor:
    if query.shape[1] == 1:
        return (query * key).sum(2).float() * 0  # no negatives, no loss
    s, logits = _cpu_logits(query, key, temperature, epsilon, iterations, negative_weight, cost)
    return -F.logsigmoid(s.diagonal(dim1=1, dim2=2) / temperature - logits.logsumexp(2))


def _cpu_backward(
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
    if query.shape[1] == 1:
        return query * 0 * grad.unsqueeze(2).to(query.dtype)
    s, logits = _cpu_logits(query, key, temperature, epsilon, iterations, negative_weight, cost)
    negatives = logits.logsumexp(2, keepdim=True)
    positive = s.diagonal(dim1=1, dim2=2).unsqueeze(2) / temperature
    row = grad.float().unsqueeze(2) * torch.sigmoid(negatives - positive)
    grad_s = logits.sub_(negatives).exp_().mul_(row / temperature)
    grad_s.diagonal(dim1=1, dim2=2).sub_(row.squeeze(2) / temperature)
    if plan_gradient == "exact":
        # The gradient of the plan itself, not of its logarithm: an entry may have underflowed to
        # 0, and this form never divides by it.
        offset = math.log(negative_weight * (s.shape[-1] - 1))
        grad_plan = torch.exp(s / temperature + (offset - negatives)).mul_(row)
        grad_s += torch.ops.mghf_native.sinkhorn_backward(
            grad_plan, s, cost, epsilon, iterations, None
        )
    return (grad_s @ key.float()).to(query.dtype)


# The plan and its gradient come from the compiled Sinkhorn; the rest is PyTorch.
OP = Op("monce")
OP.implement("reference", reference_forward, reference_backward)
OP.implement("cpu", _cpu_forward, _cpu_backward, can_run_cpu)


@torch.library.custom_op("mghf_fast::monce", mutates_args=())
def monce(
    query: Tensor,
    key: Tensor,
    temperature: float,
    epsilon: float,
    iterations: int,
    negative_weight: float,
    cost: str,
    plan_gradient: str,
    backend: str,
) -> Tensor:
    run = OP.choose(backend, query, key).forward
    result: Tensor = run(
        query, key, temperature, epsilon, iterations, negative_weight, cost, plan_gradient
    )
    return result.contiguous()


@torch.library.custom_op("mghf_fast::monce_backward", mutates_args=())
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
    backend: str,
) -> Tensor:
    run = OP.choose(backend, grad, query, key).differentiate
    options = (temperature, epsilon, iterations, negative_weight, cost, plan_gradient)
    result: Tensor = run(grad, query, key, *options)
    return result.contiguous()


@monce.register_fake
def _(query: Tensor, key: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[:2], dtype=accumulation_dtype(query.dtype))


@monce_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(query, key)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key = ctx.saved_tensors
    if double_backward_requested():
        grad_query = reference_backward(grad, query, key, *ctx.options)
    else:
        grad_query = monce_backward(grad, query, key, *ctx.options, ctx.backend)
    return grad_query, None, None, None, None, None, None, None, None


monce.register_autograd(_backward, setup_context=_setup_context)
register_float32_autocast(monce)
