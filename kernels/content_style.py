"""MGHF-n and the content-style terms of a pair of feature stacks. See
mghf_fast/reference/content_style.py for the mathematics.

The weights commute out of every term, so all sums are taken over unweighted features, S, G and
D = S - G, and the weights meet only C-vectors and M x M matrices. Three sweeps over the pair:

1. moments and ranges, per run of pixels about the run's own pivots, which take large means out,
   then merged in float64. D has moments of its own because those of an almost equal pair would
   cancel: 1 - rho = (var D - (sd S - sd G)^2) / (2 sd S sd G);
2. histograms (entropy.py);
3. Gram's difference over the kept maps: S S^T - G G^T is the symmetric part of (S - G) (S + G)^T,
   which is one product instead of two and does not cancel either.

The gradient is one more sweep, which also writes. With K the kept columns of Gram's gradient,

    grad = a D + centred (S - mean S) + other (X - mean X) + K S_kept,      X = D or G

where X is D for maps that are almost equal: with G the terms would nearly cancel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mghf_fast.backends import can_run_triton
from mghf_fast.kernels import launch
from mghf_fast.kernels.content_style_backward import gradient
from mghf_fast.kernels.content_style_forward import naive_of, products_of, statistics_of
from mghf_fast.kernels.content_style_rows import DISTANCE, MOMENTS, SQUARE
from mghf_fast.kernels.entropy import counts_of, entropies_of
from mghf_fast.kernels.selection import gram_difference, select
from mghf_fast.ops.layout import empty_like_laid_out
from mghf_fast.ops.limits import only_channel_gram
from mghf_fast.ops.vocabulary import ContentStyleOutputs


def forward(
    gt: Tensor,
    sr: Tensor,
    top_m: int,
    alpha: float,
    gamma: float,
    bins: int,
    gram: str,
    precision: str = "float32",
) -> ContentStyleOutputs:
    """The op's outputs: terms, kept maps, weights and what the backward needs."""
    batch, _, height, width = sr.shape
    pixels = height * width
    with launch.on_device_of(sr):
        if top_m == 0:
            naive = naive_of(gt, sr)
            mse, correlation, style = (torch.zeros_like(naive) for _ in range(3))
            kept = torch.empty(batch, 0, dtype=torch.int64, device=sr.device)
            weights, moments, difference = (
                naive.new_empty(batch, *shape) for shape in ((0,), (MOMENTS.value, 0), (0, 0))
            )
            return naive, mse, correlation, style, kept, weights, moments, difference

        statistics, ranges, counts, tickets = statistics_of(gt, sr, bins)
        if gt.stride() == sr.stride():
            low, high = ranges
            counts_of(gt, low, high, bins, counts, other=sr)
        else:
            for x, low, high, count in zip((gt, sr), *ranges, counts, strict=True):
                counts_of(x, low, high, bins, count)
        entropies = entropies_of(counts, ranges[0], ranges[1], pixels, torch.float64)
        naive, mse, correlation, kept, weights, moments = select(
            entropies,
            statistics,
            top_m,
            alpha,
            gamma,
            moments=MOMENTS.value,
            distance=DISTANCE.value,
            square=SQUARE.value,
        )
        products = products_of(gt, sr, kept, precision)
        difference, style = gram_difference(products, weights, pixels, tickets)
    return naive, mse, correlation, style, kept, weights, moments, difference


def backward(
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
    precision: str = "float32",
    into: Tensor | None = None,
) -> Tensor:
    """The gradient of ``sr``, with its shape, dtype and layout, from the (B,) gradients of the four
    terms. ``into`` may be ``gt``: a program reads its pixels' values of ``gt`` before it writes
    their gradients, and no other program reads them."""
    grad_sr = empty_like_laid_out(sr) if into is None else into
    grads = (grad_naive, grad_mse, grad_correlation, grad_gram)
    gradient(grads, gt, sr, kept, weights, moments, difference, grad_sr, precision)
    return grad_sr


def can_run(*tensors: Tensor, gram: str = "channel", **options: Any) -> str | None:
    return only_channel_gram(gram) or can_run_triton(*tensors)
