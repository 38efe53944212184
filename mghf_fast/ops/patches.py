"""The contract of `patches`: the strided patch projection.

Embeddings are float32 for images of half precision too (float64 for float64): they are a small part
of the features' size, and rounded ones would cost the gradient more than its own rounding does.

Besides the embeddings the forward returns a `state` for the backward, int32 (N, 1 + ceil(hidden /
32), B C): per patch and map the bits of the norm |y|, then one bit per hidden unit, whether it is
above 0. From the two the gradient of the image needs neither the image nor its hidden layer again.
The reference starts from the image and leaves its state at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..precision import accumulation_dtype
from ..reference.patches import patch_projection, patch_projection_backward
from ._batching import is_batched
from ._dispatch import (
    Op,
    can_run_cpu,
    can_run_cuda,
    can_run_triton,
    double_backward_requested,
    empty_like_laid_out,
    laid_out_as,
    readable_on_cpu,
    register_float32_autocast,
)
from .vocabulary import patches_shapes


def _reference_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
) -> tuple[Tensor, Tensor]:
    embedding = patch_projection(x, weight1, bias1, weight2, bias2, patch_size, stride)
    _, shape = patches_shapes(x, weight1, weight2, patch_size, stride)
    return embedding, x.new_zeros(shape, dtype=torch.int32)


def _reference_backward(
    grad: Tensor, embedding: Tensor, state: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    return patch_projection_backward(grad, *rest)


def _reference_add_backward(
    grad_x: Tensor, grad: Tensor, embedding: Tensor, state: Tensor, *rest: Any
) -> None:
    grad_x += _reference_backward(grad, embedding, state, *rest, False)[0]


# Of the implementations in C++ `rest` is what the operators below take after the image: weight1,
# bias1, weight2, bias2, patch_size, stride.


def _dense(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.float().contiguous() for p in parameters]


def _native_forward(ops: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = ops.patches(x, *_dense(rest[:4]), *rest[4:])
    return result


def _native_backward(
    ops: Any, grad: Tensor, embedding: Tensor, state: Tensor, x: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    parameters, (*options, need_weights) = rest[:4], rest[4:]
    saved, (w1, b1, w2, _) = (grad.float(), embedding, state), _dense(parameters)
    grad_x = ops.patches_backward(*saved, x, w1, w2, *options)
    if not need_weights:
        return grad_x, []
    grads = ops.patches_backward_weights(*saved, x, w1, b1, w2, *options)
    return grad_x, [g.to(p.dtype) for g, p in zip(grads, parameters, strict=True)]


def _native_add_backward(
    ops: Any, grad_x: Tensor, grad: Tensor, embedding: Tensor, state: Tensor, *rest: Any
) -> None:
    _, weight1, _, weight2, _, *options = rest
    w1, w2 = _dense((weight1, weight2))
    ops.patches_backward_add_(grad_x, grad.float(), embedding, state, w1, w2, *options)


def _cpu_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _native_forward(torch.ops.mghf_native, readable_on_cpu(x), *rest)


def _cpu_backward(
    grad: Tensor, embedding: Tensor, state: Tensor, x: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    image = readable_on_cpu(x)
    grad_x, grads = _native_backward(torch.ops.mghf_native, grad, embedding, state, image, *rest)
    return grad_x.to(x.dtype), grads


def _cpu_add_backward(
    grad_x: Tensor, grad: Tensor, embedding: Tensor, state: Tensor, x: Tensor, *rest: Any
) -> None:
    ops, saved = torch.ops.mghf_native, (grad, embedding, state)
    if grad_x.dtype == torch.float16:  # the float32 gradient is rounded once it is added
        grad_x += _native_backward(ops, *saved, readable_on_cpu(x), *rest, False)[0]
    else:
        _native_add_backward(ops, grad_x, *saved, x, *rest)


def _cuda_forward(*args: Any) -> tuple[Tensor, Tensor]:
    return _native_forward(native.cuda_ops(), *args)


def _cuda_backward(*args: Any) -> tuple[Tensor, list[Tensor]]:
    return _native_backward(native.cuda_ops(), *args)


def _cuda_add_backward(*args: Any) -> None:
    _native_add_backward(native.cuda_ops(), *args)


def _can_run_triton(*tensors: Tensor) -> str | None:
    if (reason := can_run_triton(*tensors)) is not None or len(tensors) < 5:
        return reason
    from ..kernels.patches import LARGEST_DIMENSION

    if (dimension := tensors[3].shape[0]) > LARGEST_DIMENSION:
        return (
            "one of its programs holds all dimensions of an embedding, at most "
            f"{LARGEST_DIMENSION}, and weight2 has {dimension}"
        )
    return None


def _triton_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
) -> tuple[Tensor, Tensor]:
    from ..kernels import patches as kernels

    return kernels.forward(x, weight1, bias1, weight2, bias2, patch_size, stride)


def _triton_add_backward(
    grad_x: Tensor,
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
) -> None:
    from ..kernels import patches as kernels

    saved, weights = (grad, embedding, state), (weight1, weight2)
    kernels.backward_x(grad_x, *saved, *weights, patch_size, stride, add=True)


def _triton_backward(
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
) -> tuple[Tensor, list[Tensor]]:
    from ..kernels import patches as kernels

    grad_x, saved, options = empty_like_laid_out(x), (grad, embedding, state), (patch_size, stride)
    if not need_weights:
        kernels.backward_x(grad_x, *saved, weight1, weight2, *options, add=False)
        return grad_x, []
    parameters = (weight1, bias1, weight2, bias2)
    grads = kernels.backward(grad_x, *saved, x, *parameters, *options)
    return grad_x, [g.to(p.dtype) for g, p in zip(grads, parameters, strict=True)]


OP = Op("patches")
OP.implement("reference", _reference_forward, _reference_backward)
OP.implement("cuda", _cuda_forward, _cuda_backward, can_run_cuda)
OP.implement("triton", _triton_forward, _triton_backward, _can_run_triton)
OP.implement("cpu", _cpu_forward, _cpu_backward, can_run_cpu)

# How a backend, known by its backward, adds the gradient of x to one that exists.
_ADD_BACKWARD: dict[Any, Callable[..., None]] = {
    _reference_backward: _reference_add_backward,
    _cuda_backward: _cuda_add_backward,
    _triton_backward: _triton_add_backward,
    _cpu_backward: _cpu_add_backward,
}


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
) -> tuple[Tensor, Tensor]:
    """The embeddings and the state."""
    parameters = (weight1, bias1, weight2, bias2)
    run = OP.choose(backend, x, *parameters).forward
    embedding, state = run(x, *parameters, patch_size, stride)
    return embedding.contiguous(), state


@torch.library.custom_op("mghf_fast::patches_backward", mutates_args=())
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
) -> list[Tensor]:
    """[gradient of x], followed by those of the weights and biases if they are needed."""
    parameters = (weight1, bias1, weight2, bias2)
    # Chosen by the forward's tensors alone, so that it is the backend that made the state.
    run = OP.choose(backend, x, *parameters).differentiate
    options = (patch_size, stride, need_weights)
    grad_x, grad_parameters = run(grad, embedding, state, x, *parameters, *options)
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
) -> tuple[Tensor, Tensor]:
    embedding, state = patches_shapes(x, weight1, weight2, patch_size, stride)
    return (
        x.new_empty(embedding, dtype=accumulation_dtype(x.dtype)),
        x.new_empty(state, dtype=torch.int32),
    )


@patches_backward.register_fake
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
) -> list[Tensor]:
    parameters = (weight1, bias1, weight2, bias2) if need_weights else ()
    return [empty_like_laid_out(x), *(p.new_empty(p.shape) for p in parameters)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.patch_size, ctx.stride, ctx.backend = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Any, ...]:
    options = (ctx.patch_size, ctx.stride, any(ctx.needs_input_grad[1:5]))
    saved = ctx.saved_tensors
    grad_parameters: list[Any]
    if double_backward_requested() or is_batched(grad):
        grad_x, grad_parameters = _reference_backward(grad, *saved, *options)
    else:
        grad_x, *grad_parameters = patches_backward(grad, *saved, *options, ctx.backend)
    return grad_x, *(grad_parameters or [None] * 4), None, None, None


patches.register_autograd(_backward, setup_context=_setup_context)
register_float32_autocast(patches)


@torch.library.custom_op("mghf_fast::patches_backward_add_", mutates_args=("grad_x",))
def patches_backward_add_(
    grad_x: Tensor,
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
    backend: str,
) -> None:
    """Adds the gradient of x to ``grad_x``."""
    parameters = (weight1, bias1, weight2, bias2)
    options = (patch_size, stride)
    add_backward = _ADD_BACKWARD[OP.choose(backend, x, *parameters).backward]
    add_backward(grad_x, grad, embedding, state, x, *parameters, *options)


@patches_backward_add_.register_fake
def _(grad_x: Tensor, *_: Any) -> None:
    return None


class ProjectAndPass(torch.autograd.Function):
    """The embeddings of x, and x for one more use. The gradient that comes back from that use is
    added to in place, so that two uses of a large x need one gradient of its size. That is right
    only if nobody else gets hold of that gradient, so the x returned must have exactly one use,
    which makes its gradient anew: an op of this library."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *parameters, ctx.patch_size, ctx.stride, ctx.backend = rest
        embedding, state = patches(x, *parameters, ctx.patch_size, ctx.stride, ctx.backend)
        ctx.save_for_backward(embedding, state, x, *parameters)
        return embedding, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad, grad_x = grads
        options = (ctx.patch_size, ctx.stride)
        saved = ctx.saved_tensors
        need_weights = any(ctx.needs_input_grad[1:5])
        grad_parameters: list[Any] = []
        if double_backward_requested() or is_batched(grad, grad_x):
            own, grad_parameters = _reference_backward(grad, *saved, *options, need_weights)
            grad_x = grad_x + own
        elif need_weights:
            own, *grad_parameters = patches_backward(grad, *saved, *options, True, ctx.backend)
            grad_x = grad_x + own
        else:
            patches_backward_add_(grad_x, grad, *saved, *options, ctx.backend)
        return grad_x, *(grad_parameters or [None] * 4), None, None, None
