"""The contract of `patches`: the strided patch projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.patches import patch_projection, patch_projection_backward
from ._dispatch import (
    Op,
    double_backward_requested,
    empty_like_laid_out,
    laid_out_as,
    register_float32_autocast,
)

OP = Op("patches")
OP.implement("reference", patch_projection, patch_projection_backward)


@torch.library.custom_op("mghf_fast::patches", mutates_args=())
def patches(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
    backend: str,
) -> Tensor:
    parameters = (weight1, bias1, weight2, bias2)
    run = OP.choose(backend, x, *parameters).forward
    result: Tensor = run(x, *parameters, patch_size, stride)
    return result.contiguous()


@torch.library.custom_op("mghf_fast::patches_backward", mutates_args=())
def patches_backward(
    grad: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
    need_weights: bool,
    backend: str,
) -> list[Tensor]:
    """[gradient of x], followed by those of the weights and biases if they are needed."""
    parameters = (weight1, bias1, weight2, bias2)
    run = OP.choose(backend, grad, x, *parameters).differentiate
    grad_x, grad_parameters = run(grad, x, *parameters, patch_size, stride, need_weights)
    return [laid_out_as(x, grad_x), *(g.contiguous() for g in grad_parameters)]


@patches.register_fake
def _(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
    backend: str,
) -> Tensor:
    b, c, h, w = x.shape
    n = ((h - patch_size) // stride + 1) * ((w - patch_size) // stride + 1)
    return x.new_empty((b * c, n, weight2.shape[0]))


@patches_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
    need_weights: bool,
    backend: str,
) -> list[Tensor]:
    parameters = (weight1, bias1, weight2, bias2) if need_weights else ()
    return [empty_like_laid_out(x), *(p.new_empty(p.shape) for p in parameters)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.patch_size, ctx.stride, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    options = (ctx.patch_size, ctx.stride, any(ctx.needs_input_grad[1:5]))
    grad_parameters: list[Any]
    if double_backward_requested():
        x, weight1, bias1, weight2, bias2 = ctx.saved_tensors
        grad_x, grad_parameters = patch_projection_backward(
            grad, x, weight1, bias1, weight2, bias2, *options
        )
    else:
        grad_x, *grad_parameters = patches_backward(grad, *ctx.saved_tensors, *options, ctx.backend)
    return grad_x, *(grad_parameters or [None] * 4), None, None, None


patches.register_autograd(_backward, setup_context=_setup_context)
register_float32_autocast(patches)
