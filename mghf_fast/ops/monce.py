"""The contract of `monce`: the patch contrastive loss with transported negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..precision import accumulation_dtype
from ..reference.monce import monce as reference_forward
from ..reference.monce import monce_backward as reference_backward
from ..reference.monce import patch_nce as reference_patch_nce
from ._dispatch import (
    Op,
    can_run_cpu,
    can_run_cuda,
    can_run_triton,
    double_backward_requested,
    register_float32_autocast,
)
from .vocabulary import MOST_PATCHES, kept_iterations, monce_state_shape

patch_nce = reference_patch_nce
"""(B, N, D) x 2 -> (B, N), every negative weighs one, in plain PyTorch."""


def _reference_forward(query: Tensor, key: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    state = torch.zeros(
        monce_state_shape(query, options[2]), dtype=torch.int32, device=query.device
    )
    return reference_forward(query, key, *options), state


def _reference_backward(
    grad: Tensor, query: Tensor, key: Tensor, state: Tensor, *options: Any
) -> Tensor:
    return reference_backward(grad, query, key, *options)


def _triton_forward(query: Tensor, key: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import monce as kernels

    arguments = (*options, kept_iterations(options[2]))
    return kernels.monce(query, key, *arguments)


def _triton_backward(
    grad: Tensor, query: Tensor, key: Tensor, state: Tensor, *options: Any
) -> Tensor:
    from ..kernels import monce as kernels

    return kernels.monce_backward(grad, query, key, state, *options)


def _cpu_forward(query: Tensor, key: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    losses, state = torch.ops.mghf_native.monce(
        query.float(), key.float(), *options, kept_iterations(options[2])
    )
    return losses, state


def _cpu_backward(grad: Tensor, query: Tensor, key: Tensor, state: Tensor, *options: Any) -> Tensor:
    grad_query: Tensor = torch.ops.mghf_native.monce_backward(
        grad.float(), query.float(), key.float(), state, *options
    )
    return grad_query.to(query.dtype)


def _cuda_forward(query: Tensor, key: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    losses, state = native.cuda_ops().monce(query, key, *options, kept_iterations(options[2]))
    return losses, state


def _cuda_backward(
    grad: Tensor, query: Tensor, key: Tensor, state: Tensor, *options: Any
) -> Tensor:
    grad_query: Tensor = native.cuda_ops().monce_backward(grad, query, key, state, *options)
    return grad_query


def _can_run_cuda(*tensors: Tensor) -> str | None:
    if (reason := can_run_cuda(*tensors)) is not None:
        return reason
    if tensors and max(tensors[-1].shape[1:], default=0) > MOST_PATCHES:
        return f"it takes up to {MOST_PATCHES} patches of as many numbers"
    return None


OP = Op("monce")
OP.implement("reference", _reference_forward, _reference_backward)
OP.implement("cuda", _cuda_forward, _cuda_backward, _can_run_cuda)
OP.implement("triton", _triton_forward, _triton_backward, can_run_triton)
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
) -> tuple[Tensor, Tensor]:
    """The losses (B, N), and the state for the backward."""
    run = OP.choose(backend, query, key).forward
    losses, state = run(
        query, key, temperature, epsilon, iterations, negative_weight, cost, plan_gradient
    )
    return losses.contiguous(), state


@torch.library.custom_op("mghf_fast::monce_backward", mutates_args=())
def monce_backward(
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
    backend: str,
) -> Tensor:
    # Chosen by the forward's tensors alone, so that it is the backend that made the state.
    run = OP.choose(backend, query, key).differentiate
    options = (temperature, epsilon, iterations, negative_weight, cost, plan_gradient)
    result: Tensor = run(grad, query, key, state, *options)
    return result.contiguous()


@monce.register_fake
def _(query: Tensor, key: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    losses = query.new_empty(query.shape[:2], dtype=accumulation_dtype(query.dtype))
    return losses, query.new_empty(monce_state_shape(query, options[2]), dtype=torch.int32)


@monce_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, state: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(query, key, output[1])


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    query, key, state = ctx.saved_tensors
    if double_backward_requested():
        grad_query = reference_backward(grad, query, key, *ctx.options)
    else:
        grad_query = monce_backward(grad, query, key, state, *ctx.options, ctx.backend)
    return grad_query, None, None, None, None, None, None, None, None


monce.register_autograd(_backward, setup_context=_setup_context)
register_float32_autocast(monce)
