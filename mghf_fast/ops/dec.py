"""The contract of `dec`: the detail-enhanced contrastive loss over flattened patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..precision import accumulation_dtype
from ..reference.dec import dec as reference_forward
from ..reference.dec import dec_backward as reference_backward
from ._dispatch import (
    Op,
    can_run_cpu,
    can_run_triton,
    double_backward_requested,
    register_float32_autocast,
)
from .vocabulary import LEAST_TEMPERATURE


def _reference_forward(sr: Tensor, gt: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    loss = reference_forward(sr, gt, *options)
    return loss, loss.new_zeros((2, sr.shape[0]))  # it keeps no statistics


def _reference_backward(
    grad: Tensor, sr: Tensor, gt: Tensor, statistics: Tensor, *options: Any
) -> Tensor:
    return reference_backward(grad, sr, gt, *options)


def _cpu_forward(sr: Tensor, gt: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.mghf_native.dec(sr.float(), gt.float(), *options)
    return result


def _cpu_backward(
    grad: Tensor, sr: Tensor, gt: Tensor, statistics: Tensor, *options: Any
) -> Tensor:
    grad_sr: Tensor = torch.ops.mghf_native.dec_backward(
        grad.float(), sr.float(), gt.float(), statistics, *options
    )
    return grad_sr.to(sr.dtype)


def _triton_forward(sr: Tensor, gt: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import dec as kernels

    return kernels.forward(sr, gt, *options)


def _triton_backward(
    grad: Tensor, sr: Tensor, gt: Tensor, statistics: Tensor, *options: Any
) -> Tensor:
    from ..kernels import dec as kernels

    return kernels.backward(grad, sr, gt, statistics, *options)


def _for_temperatures(can_run: Callable[..., str | None]) -> Callable[..., str | None]:
    def check(*tensors: Tensor, temperatures: tuple[float, float, str] = (1, 1, "")) -> str | None:
        *values, place = temperatures
        if place == "inside" and (least := min(values)) < LEAST_TEMPERATURE:
            return (
                f"its kernels' sums could overflow for temperatures below {LEAST_TEMPERATURE}, and "
                f"one is {least:g}"
            )
        return can_run(*tensors)

    return check


OP = Op("dec")
OP.implement("reference", _reference_forward, _reference_backward)
OP.implement("triton", _triton_forward, _triton_backward, _for_temperatures(can_run_triton))
OP.implement("cpu", _cpu_forward, _cpu_backward, _for_temperatures(can_run_cpu))


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
    norm_floor: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and a backend's statistics for its own backward, (2, P)."""
    temperatures = (positive_temperature, negative_temperature, temperature)
    run = OP.choose(backend, sr, gt, temperatures=temperatures).forward
    result: tuple[Tensor, Tensor]
    result = run(sr, gt, threshold_db, *temperatures, similarity, max_value, norm_floor)
    return result


@torch.library.custom_op("mghf_fast::dec_backward", mutates_args=())
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
    run = OP.choose(backend, sr, gt, temperatures=temperatures).differentiate
    options = (threshold_db, *temperatures, similarity, max_value, norm_floor)
    result: Tensor = run(grad, sr, gt, statistics, *options)
    return result.contiguous()


@dec.register_fake
def _(sr: Tensor, gt: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(sr.dtype)
    return sr.new_empty((), dtype=dtype), sr.new_empty((2, sr.shape[0]), dtype=dtype)


@dec_backward.register_fake
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
        grad_sr = reference_backward(grad, sr, gt, *ctx.options)
    else:
        grad_sr = dec_backward(grad, sr, gt, statistics, *ctx.options, ctx.backend)
    return grad_sr, *[None] * 9


dec.register_autograd(_backward, setup_context=_setup_context)
register_float32_autocast(dec)
