"""The contract of `dec`: the detail-enhanced contrastive loss over flattened patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..precision import accumulation_dtype
from ..reference import dec as reference
from ._dispatch import Op, double_backward_requested
from ._registration import Operator
from .native.dec import Dec

OP = Op("dec")
OP.implement("reference", reference)
OP.implement("triton", "mghf_fast.kernels.dec")
OP.implement("cpu", Dec("cpu"))
OP.implement("cuda", Dec("cuda"))


@Operator
def dec(
    sr: Tensor,
    gt: Tensor,
    threshold_db: float,
    positive_temperature: float,
    negative_temperature: float,
    temperature: str,
    similarity: str,
    max_value: float,
    norm_floor: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and a backend's statistics for its own backward, (2, P)."""
    temperatures = (positive_temperature, negative_temperature, temperature)
    run = OP.choose(backend, sr, gt, temperatures=temperatures).forward
    return run(sr, gt, threshold_db, *temperatures, similarity, max_value, norm_floor)


@Operator
def dec_backward(
    grad: Tensor,
    sr: Tensor,
    gt: Tensor,
    statistics: Tensor,
    threshold_db: float,
    positive_temperature: float,
    negative_temperature: float,
    temperature: str,
    similarity: str,
    max_value: float,
    norm_floor: float,
    backend: str,
) -> Tensor:
    temperatures = (positive_temperature, negative_temperature, temperature)
    run = OP.choose(backend, sr, gt, temperatures=temperatures).backward
    options = (threshold_db, *temperatures, similarity, max_value, norm_floor)
    return run(grad, sr, gt, statistics, *options).contiguous()


@dec.fake
def _(sr: Tensor, gt: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(sr.dtype)
    return sr.new_empty((), dtype=dtype), sr.new_empty((2, sr.shape[0]), dtype=dtype)


@dec_backward.fake
def _(grad: Tensor, sr: Tensor, gt: Tensor, *_: Any) -> Tensor:
    return sr.new_empty(sr.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    sr, gt, *ctx.options, ctx.backend = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(sr, gt, statistics)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    sr, gt, statistics = ctx.saved_tensors
    if double_backward_requested():
        grad_sr = reference.backward(grad, sr, gt, statistics, *ctx.options)
    else:
        grad_sr = dec_backward(grad, sr, gt, statistics, *ctx.options, ctx.backend)
    return grad_sr, *[None] * 9


dec.differentiate(_backward, _setup_context)
dec.in_float32_under_autocast()
