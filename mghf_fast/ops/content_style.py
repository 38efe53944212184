"""The contract of `content_style`: MGHF-n and the content-style terms of a pair in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision import accumulation_dtype
from ..reference import content_style as reference
from ._dispatch import Op, double_backward_requested
from ._registration import Operator
from .layout import empty_like_laid_out, laid_out_as
from .native.content_style import ContentStyle
from .vocabulary import ContentStyleOutputs

importance_weights = reference.importance_weights
"""Indices and weights of the kept maps, both (B, M); plain PyTorch."""

# A backend's backward takes one argument more than the operator, ``into``: a tensor with the shape,
# type and layout of sr, and no element twice, into which it writes the gradient and which it
# returns; it may be gt itself, which is lost. A backend that cannot do so ignores it.
OP = Op("content_style")
OP.implement("reference", reference)
OP.implement("cuda", ContentStyle("cuda"))
OP.implement("triton", "mghf_fast.kernels.content_style")
OP.implement("cpu", ContentStyle("cpu"))


@Operator
def content_style(
    gt: Tensor,
    sr: Tensor,
    top_m: int,
    alpha: float,
    gamma: float,
    bins: int,
    gram: str,
    backend: str,
    precision: str = "float32",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ContentStyleOutputs."""
    run = OP.choose(backend, gt, sr, gram=gram).forward
    return run(gt, sr, top_m, alpha, gamma, bins, gram, precision)


@Operator
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
    precision: str = "float32",
) -> Tensor:
    run = OP.choose(backend, gt, sr, gram=gram).backward
    grads = (grad_naive, grad_mse, grad_correlation, grad_gram)
    statistics = (kept, weights, moments, difference)
    return laid_out_as(sr, run(*grads, gt, sr, *statistics, gram, precision))


@content_style.fake
def _(
    gt: Tensor,
    sr: Tensor,
    top_m: int,
    alpha: float,
    gamma: float,
    bins: int,
    gram: str,
    backend: str,
    precision: str = "float32",
) -> ContentStyleOutputs:
    b, dtype = sr.shape[0], accumulation_dtype(sr.dtype)
    naive, mse, correlation, style = (sr.new_empty((b,), dtype=dtype) for _ in range(4))
    kept = sr.new_empty((b, top_m), dtype=torch.int64)
    weights = sr.new_empty((b, top_m), dtype=dtype)
    moments = sr.new_empty((b, 6, top_m), dtype=dtype)
    size = 0 if gram == "map" else top_m
    difference = sr.new_empty((b, size, size), dtype=dtype)
    return naive, mse, correlation, style, kept, weights, moments, difference


@content_style_backward.fake
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
    gt, sr, *_, ctx.gram, ctx.backend, ctx.precision = inputs
    statistics = output[4:]
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(gt, sr, *statistics)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    given: tuple[Any, ...] = (*grads[:4], *ctx.saved_tensors, ctx.gram)
    if double_backward_requested():
        grad_sr = reference.backward(*given)
    else:
        grad_sr = content_style_backward(*given, ctx.backend, ctx.precision)
    return None, grad_sr, *(None,) * 7


content_style.differentiate(_backward, _setup_context)
content_style.in_float32_under_autocast()
