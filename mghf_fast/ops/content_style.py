"""The contract of `content_style`: MGHF-n and the content-style terms of a pair in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision import accumulation_dtype
from ..reference.content_style import content_style as reference_forward
from ..reference.content_style import content_style_backward as reference_backward
from ._dispatch import (
    Op,
    double_backward_requested,
    empty_like_laid_out,
    laid_out_as,
    register_float32_autocast,
)

OP = Op("content_style")
OP.implement("reference", reference_forward, reference_backward)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """naive, mse, correlation, gram: (B,) each; the kept maps' indices and weights: (B, M)."""
    run = OP.choose(backend, gt, sr).forward
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    result = run(gt, sr, top_m, alpha, gamma, bins, gram)
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
    gram: str,
    backend: str,
) -> Tensor:
    run = OP.choose(backend, gt, sr).differentiate
    grads = (grad_naive, grad_mse, grad_correlation, grad_gram)
    return laid_out_as(sr, run(*grads, gt, sr, kept, weights, gram))


@content_style.register_fake
def _(
    gt: Tensor, sr: Tensor, top_m: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, dtype = sr.shape[0], accumulation_dtype(sr.dtype)
    naive, mse, correlation, gram = (sr.new_empty((b,), dtype=dtype) for _ in range(4))
    kept = sr.new_empty((b, top_m), dtype=torch.int64)
    return naive, mse, correlation, gram, kept, sr.new_empty((b, top_m), dtype=dtype)


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
    kept, weights = output[4:]
    ctx.mark_non_differentiable(kept, weights)
    ctx.save_for_backward(gt, sr, kept, weights)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    naive, mse, correlation, gram = grads[:4]
    gt, sr, kept, weights = ctx.saved_tensors
    tensors = (naive, mse, correlation, gram, gt, sr, kept, weights)
    if double_backward_requested():
        grad_sr = reference_backward(*tensors, ctx.gram)
    else:
        grad_sr = content_style_backward(*tensors, ctx.gram, ctx.backend)
    return None, grad_sr, None, None, None, None, None, None


content_style.register_autograd(_backward, setup_context=_setup_context)
register_float32_autocast(content_style)
