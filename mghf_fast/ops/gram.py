"""The contract of `gram`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..precision import accumulation_dtype
from ..reference.gram import gram_matrix, gram_matrix_backward
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


def _cpu_forward(x: Tensor, scale: float) -> Tensor:
    result: Tensor = torch.ops.mghf_native.gram(readable_on_cpu(x), scale)
    return result


def _cpu_backward(grad: Tensor, x: Tensor, scale: float) -> Tensor:
    grad_x: Tensor = torch.ops.mghf_native.gram_backward(grad.float(), readable_on_cpu(x), scale)
    return grad_x.to(x.dtype)


def _cuda_forward(x: Tensor, scale: float) -> Tensor:
    result: Tensor = native.cuda_ops().gram(x, scale)
    return result


def _cuda_backward(grad: Tensor, x: Tensor, scale: float) -> Tensor:
    grad_x: Tensor = native.cuda_ops().gram_backward(grad.float(), x, scale)
    return grad_x


def _triton_forward(x: Tensor, scale: float) -> Tensor:
    from ..kernels import gram as kernels

    return kernels.gram_matrix(x, scale)


def _triton_backward(grad: Tensor, x: Tensor, scale: float) -> Tensor:
    from ..kernels import gram as kernels

    grad_x = empty_like_laid_out(x)
    kernels.gram_matrix_backward(grad, x, scale, grad_x)
    return grad_x


OP = Op("gram")
OP.implement("reference", gram_matrix, gram_matrix_backward)
OP.implement("cuda", _cuda_forward, _cuda_backward, can_run_cuda)
OP.implement("triton", _triton_forward, _triton_backward, can_run_triton)
OP.implement("cpu", _cpu_forward, _cpu_backward, can_run_cpu)


@torch.library.custom_op("mghf_fast::gram", mutates_args=())
def gram(x: Tensor, scale: float, backend: str) -> Tensor:
    result: Tensor = OP.choose(backend, x).forward(x, scale)
    return result.contiguous()


@torch.library.custom_op("mghf_fast::gram_backward", mutates_args=())
def gram_backward(grad: Tensor, x: Tensor, scale: float, backend: str) -> Tensor:
    return laid_out_as(x, OP.choose(backend, grad, x).differentiate(grad, x, scale))


@gram.register_fake
def _(x: Tensor, scale: float, backend: str) -> Tensor:
    b, c = x.shape[:2]
    return x.new_empty((b, c, c), dtype=accumulation_dtype(x.dtype))


@gram_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: float, backend: str) -> Tensor:
    return empty_like_laid_out(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    if double_backward_requested():
        return gram_matrix_backward(grad, x, ctx.scale), None, None
    return gram_backward(grad, x, ctx.scale, ctx.backend), None, None


gram.register_autograd(_backward, setup_context=_setup_context)
register_float32_autocast(gram)
