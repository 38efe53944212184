"""The contract of `monce`: the patch contrastive loss with transported negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision import accumulation_dtype
from ..reference import monce as reference
from ._dispatch import Op, double_backward_requested
from ._registration import Operator
from .native.monce import Monce
from .vocabulary import monce_state_shape

patch_nce = reference.patch_nce
"""(B, N, D) x 2 -> (B, N); every negative has weight 1; plain PyTorch."""


OP = Op("monce")
OP.implement("reference", reference)
OP.implement("cuda", Monce("cuda"))
OP.implement("triton", "mghf_fast.kernels.monce")
OP.implement("cpu", Monce("cpu"))


@Operator
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
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """The losses (B, N), and the state for the backward."""
    run = OP.choose(backend, query, key).forward
    options = (temperature, epsilon, iterations, negative_weight, cost, plan_gradient, precision)
    losses, state = run(query, key, *options)
    return losses.contiguous(), state


@Operator
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
    precision: str = "float32",
) -> Tensor:
    # Chosen by the forward's tensors only, so that it is the backend that produced the state.
    run = OP.choose(backend, query, key).backward
    options = (temperature, epsilon, iterations, negative_weight, cost, plan_gradient, precision)
    return run(grad, query, key, state, *options).contiguous()


@monce.fake
def _(query: Tensor, key: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    losses = query.new_empty(query.shape[:2], dtype=accumulation_dtype(query.dtype))
    return losses, query.new_empty(monce_state_shape(query, options[2]), dtype=torch.int32)


@monce_backward.fake
def _(grad: Tensor, query: Tensor, key: Tensor, state: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, *ctx.options, ctx.backend, ctx.precision = inputs
    ctx.save_for_backward(query, key, output[1])


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    query, key, state = ctx.saved_tensors
    if double_backward_requested():
        grad_query = reference.backward(grad, query, key, state, *ctx.options)
    else:
        chosen = (ctx.backend, ctx.precision)
        grad_query = monce_backward(grad, query, key, state, *ctx.options, *chosen)
    return grad_query, *(None,) * 9


monce.differentiate(_backward, _setup_context)
monce.in_float32_under_autocast()
