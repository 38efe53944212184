"""The contract of `patches`: the strided patch projection.

Embeddings are float32 for images of half precision too (float64 for float64): they are much smaller
than the features, and rounding them would cost the gradient more accuracy than its own rounding.

Besides the embeddings the forward returns a `state` for the backward, int32 (N, 1 + ceil(hidden /
32), B C): per patch and map the bits of the norm |y|, then one bit per hidden unit, set if it is
above 0. With both, the gradient in the image needs neither the image nor a recomputed hidden layer.
The reference recomputes from the image and leaves its state at 0. A backward for some neighbouring
maps takes their slices of embeddings and state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision import accumulation_dtype
from ..reference import patches as reference
from ._batching import is_batched
from ._dispatch import Op, double_backward_requested
from ._registration import Operator
from .layout import empty_like_laid_out, laid_out_as
from .native.patches import Patches
from .vocabulary import patches_shapes

OP = Op("patches")
OP.implement("reference", reference)
OP.implement("cuda", Patches("cuda"))
OP.implement("triton", "mghf_fast.kernels.patches")
OP.implement("cpu", Patches("cpu"))


@Operator
def patches(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
    backend: str,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """The embeddings and the state."""
    parameters = (weight1, bias1, weight2, bias2)
    run = OP.choose(backend, x, *parameters).forward
    embedding, state = run(x, *parameters, patch_size, stride, precision)
    return embedding.contiguous(), state


@Operator
def patches_backward(
    grad: Tensor,
    embedding: Tensor,
    state: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
    need_weights: bool,
    backend: str,
    precision: str = "float32",
) -> list[Tensor]:
    """[gradient of x], followed by those of the weights and biases if they are needed."""
    parameters = (weight1, bias1, weight2, bias2)
    # Chosen by the forward's tensors only, so that it is the backend that produced the state.
    run = OP.choose(backend, x, *parameters).backward
    options = (patch_size, stride, need_weights, precision)
    grad_x, *grads = run(grad, embedding, state, x, *parameters, *options)
    return [laid_out_as(x, grad_x), *(g.contiguous() for g in grads)]


@patches.fake
def _(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
    backend: str,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    embedding, state = patches_shapes(x, weight1, weight2, patch_size, stride)
    return (
        x.new_empty(embedding, dtype=accumulation_dtype(x.dtype)),
        x.new_empty(state, dtype=torch.int32),
    )


@patches_backward.fake
def _(
    grad: Tensor,
    embedding: Tensor,
    state: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
    need_weights: bool,
    backend: str,
    precision: str = "float32",
) -> list[Tensor]:
    parameters = (weight1, bias1, weight2, bias2) if need_weights else ()
    return [empty_like_laid_out(x), *(p.new_empty(p.shape) for p in parameters)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.patch_size, ctx.stride, ctx.backend, ctx.precision = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Any, ...]:
    need_weights = any(ctx.needs_input_grad[1:5])
    sizes = (ctx.patch_size, ctx.stride)
    given: tuple[Any, ...] = (grad, *ctx.saved_tensors, *sizes, need_weights)
    if double_backward_requested() or is_batched(grad):
        found = reference.backward(*given)
    else:
        found = patches_backward(*given, ctx.backend, ctx.precision)
    grad_x, *grad_parameters = found
    return grad_x, *(grad_parameters or (None,) * 4), *(None,) * 4


patches.differentiate(_backward, _setup_context)
patches.in_float32_under_autocast()
