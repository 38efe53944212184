"""The contract of `channel_mean`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..precision import accumulation_dtype
from ..reference import channel_mean as reference
from ._dispatch import Op, double_backward_requested
from ._registration import Operator
from .layout import empty_like_laid_out, laid_out_as
from .native.channel_mean import ChannelMean

OP = Op("channel_mean")
OP.implement("reference", reference)
OP.implement("cpu", ChannelMean("cpu"))


@Operator
def channel_mean(x: Tensor, backend: str) -> Tensor:
    return OP.choose(backend, x).forward(x).contiguous()


@Operator
def channel_mean_backward(grad: Tensor, x: Tensor, backend: str) -> Tensor:
    return laid_out_as(x, OP.choose(backend, grad, x).backward(grad, x))


@channel_mean.fake
def _(x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))


@channel_mean_backward.fake
def _(grad: Tensor, x: Tensor, backend: str) -> Tensor:
    return empty_like_laid_out(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    if double_backward_requested():
        return reference.backward(grad, x), None
    return channel_mean_backward(grad, x, ctx.backend), None


channel_mean.differentiate(_backward, _setup_context)
channel_mean.in_float32_under_autocast()
