"""The contract of `gram`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..precision import accumulation_dtype
from ..reference import gram as reference
from ._dispatch import Op, double_backward_requested
from ._registration import Operator
from .layout import empty_like_laid_out, laid_out_as
from .native.gram import Gram

OP = Op("gram")
OP.implement("reference", reference)
OP.implement("cuda", Gram("cuda"))
OP.implement("triton", "mghf_fast.kernels.gram")
OP.implement("cpu", Gram("cpu"))


@Operator
def gram(x: Tensor, scale: float, backend: str, precision: str = "float32") -> Tensor:
    return OP.choose(backend, x).forward(x, scale, precision).contiguous()


@Operator
def gram_backward(
    grad: Tensor, x: Tensor, scale: float, backend: str, precision: str = "float32"
) -> Tensor:
    return laid_out_as(x, OP.choose(backend, grad, x).backward(grad, x, scale, precision))


@gram.fake
def _(x: Tensor, scale: float, backend: str, precision: str = "float32") -> Tensor:
    b, c = x.shape[:2]
    return x.new_empty((b, c, c), dtype=accumulation_dtype(x.dtype))


@gram_backward.fake
def _(grad: Tensor, x: Tensor, scale: float, backend: str, precision: str = "float32") -> Tensor:
    return empty_like_laid_out(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.scale, ctx.backend, ctx.precision = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    if double_backward_requested():
        return reference.backward(grad, x, ctx.scale), None, None, None
    grad_x = gram_backward(grad, x, ctx.scale, ctx.backend, ctx.precision)
    return grad_x, None, None, None


gram.differentiate(_backward, _setup_context)
gram.in_float32_under_autocast()
