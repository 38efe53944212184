"""The contract of `content_style`: MGHF-n and the content-style terms of a pair in one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..precision import accumulation_dtype
from ..reference.content_style import content_style as reference_forward
from ..reference.content_style import content_style_backward as reference_backward
from ..reference.content_style import importance_weights as reference_importance_weights
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

importance_weights = reference_importance_weights
"""Indices and weights of the kept maps, both (B, M), in plain PyTorch."""

# naive, mse, correlation, gram: (B,) each; kept, weights: (B, M); moments: (B, 6, M);
# difference: (B, M, M), or (B, 0, 0) for gram="map". The last two are the statistics with which the
# backward is one sweep.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


# The implementations take what the operators below do: forwards the pair, top_m, alpha, gamma, bins
# and gram; backwards the four gradients, the pair, the four statistics and gram.


def _reference_backward(*args: Any) -> Tensor:
    naive, mse, correlation, style, gt, sr, kept, weights, _moments, _difference, gram = args
    return reference_backward(naive, mse, correlation, style, gt, sr, kept, weights, gram)


def _cpu_forward(gt: Tensor, sr: Tensor, *options: Any) -> Outputs:
    images = readable_on_cpu(gt), readable_on_cpu(sr)
    result: Outputs = torch.ops.mghf_native.content_style(*images, *options[:-1])
    return result


def _cpu_backward(*args: Any) -> Tensor:
    (*grads, gt, sr), statistics = args[:6], args[6:-1]
    images = readable_on_cpu(gt), readable_on_cpu(sr)
    grad_sr: Tensor = torch.ops.mghf_native.content_style_backward(
        *(grad.float() for grad in grads), *images, *statistics
    )
    return grad_sr.to(sr.dtype)


def _cuda_forward(gt: Tensor, sr: Tensor, *options: Any) -> Outputs:
    result: Outputs = native.cuda_ops().content_style(gt, sr, *options[:-1])
    return result


def _cuda_backward(*args: Any) -> Tensor:
    grads, rest = args[:4], args[4:-1]
    grad_sr: Tensor = native.cuda_ops().content_style_backward(
        *(grad.float() for grad in grads), *rest
    )
    return grad_sr


def _triton_forward(gt: Tensor, sr: Tensor, *options: Any) -> Outputs:
    from ..kernels import content_style as kernels

    return kernels.content_style(gt, sr, *options[:-1])


def _triton_backward(*args: Any) -> Tensor:
    from ..kernels import content_style as kernels

    grads, rest = args[:4], args[4:-1]
    grad_sr = empty_like_laid_out(rest[1])
    kernels.content_style_backward(grads, *rest, grad_sr)
    return grad_sr


def _for_channels(can_run: Callable[..., str | None]) -> Callable[..., str | None]:
    """What kernels of gram='channel' can run."""

    def check(*tensors: Tensor, gram: str = "channel") -> str | None:
        return "it has kernels for gram='channel' only" if gram == "map" else can_run(*tensors)

    return check


OP = Op("content_style")
OP.implement("reference", reference_forward, _reference_backward)
OP.implement("cuda", _cuda_forward, _cuda_backward, _for_channels(can_run_cuda))
OP.implement("triton", _triton_forward, _triton_backward, _for_channels(can_run_triton))
OP.implement("cpu", _cpu_forward, _cpu_backward, _for_channels(can_run_cpu))


@torch.library.custom_op("mghf_fast::content_style", mutates_args=())
def content_style(
    gt: Tensor,
    sr: Tensor,
    top_m: int,
    alpha: float,
    gamma: float,
    bins: int,
    gram: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """naive, mse, correlation, gram, kept, weights, moments, difference: see Outputs."""
    run = OP.choose(backend, gt, sr, gram=gram).forward
    result: Outputs = run(gt, sr, top_m, alpha, gamma, bins, gram)
    return result


@torch.library.custom_op("mghf_fast::content_style_backward", mutates_args=())
def content_style_backward(
    grad_naive: Tensor,
    grad_mse: Tensor,
    grad_correlation: Tensor,
    grad_gram: Tensor,
    gt: Tensor,
    sr: Tensor,
    kept: Tensor,
    weights: Tensor,
    moments: Tensor,
    difference: Tensor,
    gram: str,
    backend: str,
) -> Tensor:
    run = OP.choose(backend, gt, sr, gram=gram).differentiate
    grads = (grad_naive, grad_mse, grad_correlation, grad_gram)
    statistics = (kept, weights, moments, difference)
    return laid_out_as(sr, run(*grads, gt, sr, *statistics, gram))


@content_style.register_fake
def _(
    gt: Tensor,
    sr: Tensor,
    top_m: int,
    alpha: float,
    gamma: float,
    bins: int,
    gram: str,
    backend: str,
) -> Outputs:
    b, dtype = sr.shape[0], accumulation_dtype(sr.dtype)
    naive, mse, correlation, style = (sr.new_empty((b,), dtype=dtype) for _ in range(4))
    kept = sr.new_empty((b, top_m), dtype=torch.int64)
    weights = sr.new_empty((b, top_m), dtype=dtype)
    moments = sr.new_empty((b, 6, top_m), dtype=dtype)
    size = 0 if gram == "map" else top_m
    difference = sr.new_empty((b, size, size), dtype=dtype)
    return naive, mse, correlation, style, kept, weights, moments, difference


@content_style_backward.register_fake
def _(
    grad_naive: Tensor,
    grad_mse: Tensor,
    grad_correlation: Tensor,
    grad_gram: Tensor,
    gt: Tensor,
    sr: Tensor,
    *_: Any,
) -> Tensor:
    return empty_like_laid_out(sr)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gt, sr, *_, ctx.gram, ctx.backend = inputs
    statistics = output[4:]
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(gt, sr, *statistics)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    naive, mse, correlation, gram = grads[:4]
    gt, sr, kept, weights, *statistics = ctx.saved_tensors
    tensors = (naive, mse, correlation, gram, gt, sr, kept, weights)
    if double_backward_requested():
        # The statistics depend on sr, so the derivative computes them anew.
        grad_sr = reference_backward(*tensors, ctx.gram)
    else:
        grad_sr = content_style_backward(*tensors, *statistics, ctx.gram, ctx.backend)
    return None, grad_sr, None, None, None, None, None, None


content_style.register_autograd(_backward, setup_context=_setup_context)
register_float32_autocast(content_style)
