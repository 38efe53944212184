"""The contract of `coupling`: the invertible block, its inverse and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.coupling import (
    BlockWeights,
    invertible_block,
    invertible_block_backward,
    invertible_block_inverse,
)
from ._dispatch import (
    Op,
    double_backward_requested,
    empty_like_laid_out,
    laid_out_as,
    register_float32_autocast,
)

OP = Op("coupling")
OP.implement("reference", invertible_block, invertible_block_backward)
INVERSE = Op("coupling_inverse")
INVERSE.implement("reference", invertible_block_inverse)


@torch.library.custom_op("mghf_fast::coupling", mutates_args=())
def coupling(
    x: Tensor,
    weights: list[Tensor],
    activation: str,
    subnet: str,
    clamp: float | None,
    backend: str,
) -> Tensor:
    block = BlockWeights.from_tensors(weights, activation, subnet, clamp)
    return laid_out_as(x, OP.choose(backend, x, *weights).forward(x, block))


@torch.library.custom_op("mghf_fast::coupling_inverse", mutates_args=())
def coupling_inverse(
    y: Tensor,
    weights: list[Tensor],
    activation: str,
    subnet: str,
    clamp: float | None,
    backend: str,
) -> Tensor:
    block = BlockWeights.from_tensors(weights, activation, subnet, clamp)
    return laid_out_as(y, INVERSE.choose(backend, y, *weights).forward(y, block))


@torch.library.custom_op("mghf_fast::coupling_backward", mutates_args=())
def coupling_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    activation: str,
    subnet: str,
    clamp: float | None,
    need_weights: bool,
    backend: str,
) -> list[Tensor]:
    """[gradient of x], followed by those of ``weights`` if they are needed."""
    block = BlockWeights.from_tensors(weights, activation, subnet, clamp)
    run = OP.choose(backend, grad, x, *weights).differentiate
    grad_x, grad_weights = run(grad, x, block, need_weights)
    return [laid_out_as(x, grad_x), *(g.contiguous() for g in grad_weights)]


@coupling.register_fake
def _(x: Tensor, weights: list[Tensor], *_: Any) -> Tensor:
    return empty_like_laid_out(x)


@coupling_inverse.register_fake
def _(y: Tensor, weights: list[Tensor], *_: Any) -> Tensor:
    return empty_like_laid_out(y)


@coupling_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    activation: str,
    subnet: str,
    clamp: float | None,
    need_weights: bool,
    backend: str,
) -> list[Tensor]:
    grad_weights = [w.new_empty(w.shape) for w in weights] if need_weights else []
    return [empty_like_laid_out(x), *grad_weights]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(x, *weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    need_weights = any(ctx.needs_input_grad[1])
    if double_backward_requested():
        block = BlockWeights.from_tensors(weights, *ctx.options)
        grad_x, grad_weights = invertible_block_backward(grad, x, block, need_weights)
    else:
        grad_x, *grad_weights = coupling_backward(
            grad, x, weights, *ctx.options, need_weights, ctx.backend
        )
    return grad_x, grad_weights or [None] * len(weights), None, None, None, None


def _inverse_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # The inverse serves reconstruction and checks, which rarely need a gradient: plain autograd
    # through the reference is enough.
    y, *weights = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [t if t.requires_grad else t.detach().requires_grad_() for t in (y, *weights)]
        block = BlockWeights.from_tensors(inputs[1:], *ctx.options)
        grads = torch.autograd.grad(invertible_block_inverse(inputs[0], block), inputs, grad)
    return grads[0], list(grads[1:]), None, None, None, None


coupling.register_autograd(_backward, setup_context=_setup_context)
coupling_inverse.register_autograd(_inverse_backward, setup_context=_setup_context)
register_float32_autocast(coupling)
register_float32_autocast(coupling_inverse)
