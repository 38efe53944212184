"""The contract of `dec`: the detail-enhanced contrastive loss over flattened patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision import accumulation_dtype
from ..reference.dec import dec as reference_forward
from ..reference.dec import dec_backward as reference_backward
from ._dispatch import Op, double_backward_requested, register_float32_autocast

OP = Op("dec")
OP.implement("reference", reference_forward, reference_backward)


@torch.library.custom_op("mghf_fast::dec", mutates_args=())
def dec(
    sr: Tensor,
    gt: Tensor,
    threshold_db: float,
    positive_temperature: float,
    negative_temperature: float,
    temperature: str,
    similarity: str,
    max_value: float,
    backend: str,
) -> Tensor:
    temperatures = (positive_temperature, negative_temperature, temperature)
    run = OP.choose(backend, sr, gt).forward
    result: Tensor = run(sr, gt, threshold_db, *temperatures, similarity, max_value)
    return result


@torch.library.custom_op("mghf_fast::dec_backward", mutates_args=())
def dec_backward(
    grad: Tensor,
    sr: Tensor,
    gt: Tensor,
    threshold_db: float,
    positive_temperature: float,
    negative_temperature: float,
    temperature: str,
    similarity: str,
    max_value: float,
    backend: str,
) -> Tensor:
    temperatures = (positive_temperature, negative_temperature, temperature)
    run = OP.choose(backend, grad, sr, gt).differentiate
    result: Tensor = run(grad, sr, gt, threshold_db, *temperatures, similarity, max_value)
    return result.contiguous()


@dec.register_fake
def _(sr: Tensor, gt: Tensor, *_: Any) -> Tensor:
    return sr.new_empty((), dtype=accumulation_dtype(sr.dtype))


@dec_backward.register_fake
def _(grad: Tensor, sr: Tensor, gt: Tensor, *_: Any) -> Tensor:
    return sr.new_empty(sr.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sr, gt, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(sr, gt)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sr, gt = ctx.saved_tensors
    if double_backward_requested():
        grad_sr = reference_backward(grad, sr, gt, *ctx.options)
    else:
        grad_sr = dec_backward(grad, sr, gt, *ctx.options, ctx.backend)
    return grad_sr, None, None, None, None, None, None, None, None


dec.register_autograd(_backward, setup_context=_setup_context)
register_float32_autocast(dec)
