"""The contract of `sinkhorn`: its two operators, their shapes, gradients and backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..reference.sinkhorn import sinkhorn_plan, sinkhorn_plan_backward
from ._dispatch import (
    Op,
    can_run_cpu,
    can_run_cuda,
    can_run_triton,
    double_backward_requested,
    register_float32_autocast,
)
from .vocabulary import MOST_PATCHES

# Of the implementations the options are cost, epsilon, iterations and tolerance.


def _triton_forward(similarity: Tensor, *options: Any) -> Tensor:
    from ..kernels import sinkhorn as kernels

    return kernels.sinkhorn(similarity, *options)


def _triton_backward(grad: Tensor, similarity: Tensor, *options: Any) -> Tensor:
    from ..kernels import sinkhorn as kernels

    return kernels.sinkhorn_backward(grad, similarity, *options)


def _cpu_forward(similarity: Tensor, *options: Any) -> Tensor:
    plan: Tensor = torch.ops.mghf_native.sinkhorn(similarity.float(), *options)
    return plan.to(similarity.dtype)


def _cpu_backward(grad: Tensor, similarity: Tensor, *options: Any) -> Tensor:
    grad_similarity: Tensor = torch.ops.mghf_native.sinkhorn_backward(
        grad.float(), similarity.float(), *options
    )
    return grad_similarity.to(similarity.dtype)


def _cuda_forward(similarity: Tensor, *options: Any) -> Tensor:
    plan: Tensor = native.cuda_ops().sinkhorn(similarity, *options)
    return plan


def _cuda_backward(grad: Tensor, similarity: Tensor, *options: Any) -> Tensor:
    grad_similarity: Tensor = native.cuda_ops().sinkhorn_backward(grad, similarity, *options)
    return grad_similarity


def _can_run_cuda(*tensors: Tensor) -> str | None:
    if (reason := can_run_cuda(*tensors)) is not None:
        return reason
    if tensors and (n := tensors[-1].shape[-1]) > MOST_PATCHES:
        return f"it takes matrices of up to {MOST_PATCHES} rows, and these have {n}"
    return None


OP = Op("sinkhorn")
OP.implement("reference", sinkhorn_plan, sinkhorn_plan_backward)
OP.implement("cuda", _cuda_forward, _cuda_backward, _can_run_cuda)
OP.implement("triton", _triton_forward, _triton_backward, can_run_triton)
OP.implement("cpu", _cpu_forward, _cpu_backward, can_run_cpu)


@torch.library.custom_op("mghf_fast::sinkhorn", mutates_args=())
def sinkhorn(
    similarity: Tensor,
    cost: str,
    epsilon: float,
    iterations: int,
    tolerance: float | None,
    backend: str,
) -> Tensor:
    run = OP.choose(backend, similarity).forward
    plan: Tensor = run(similarity, cost, epsilon, iterations, tolerance)
    return plan.contiguous()


@torch.library.custom_op("mghf_fast::sinkhorn_backward", mutates_args=())
def sinkhorn_backward(
    grad: Tensor,
    similarity: Tensor,
    cost: str,
    epsilon: float,
    iterations: int,
    tolerance: float | None,
    backend: str,
) -> Tensor:
    run = OP.choose(backend, grad, similarity).differentiate
    grad_similarity: Tensor = run(grad, similarity, cost, epsilon, iterations, tolerance)
    return grad_similarity.contiguous()


@sinkhorn.register_fake
def _(similarity: Tensor, *_: Any) -> Tensor:
    return similarity.new_empty(similarity.shape)


@sinkhorn_backward.register_fake
def _(grad: Tensor, similarity: Tensor, *_: Any) -> Tensor:
    return similarity.new_empty(similarity.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    similarity, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(similarity)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (similarity,) = ctx.saved_tensors
    if double_backward_requested():
        grad_similarity = sinkhorn_plan_backward(grad, similarity, *ctx.options)
    else:
        grad_similarity = sinkhorn_backward(grad, similarity, *ctx.options, ctx.backend)
    return grad_similarity, None, None, None, None, None


sinkhorn.register_autograd(_backward, setup_context=_setup_context)
register_float32_autocast(sinkhorn)
