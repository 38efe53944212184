"""The gradient of `content_style`, one sweep, and its launches; the formulas are in
content_style.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mghf_fast.kernels import launch
from mghf_fast.kernels.content_style_rows import EXCESS, MOMENTS, SCALE, SLOPE
from mghf_fast.kernels.image import layout_of, pixel_offsets, power_of_two
from mghf_fast.kernels.products import dot, dot_precision

# Rows of a map's coefficients in the gradient, 0 where it is not kept.
OF_DIFFERENCE = tl.constexpr(0)
OF_CENTRED = tl.constexpr(1)
MEAN_OF_CENTRED = tl.constexpr(2)
OF_OTHER = tl.constexpr(3)
MEAN_OF_OTHER = tl.constexpr(4)
ALIKE = tl.constexpr(5)
KEPT = tl.constexpr(6)
COEFFICIENTS = tl.constexpr(7)


# A map's coefficients of the gradient and, of a kept one, the row of K,
#
#     K_ij = (4 grad / (M^2 n)) w_i w_j D_ij,
#
# zeros for the others. One program per map; its time is negligible.
@triton.jit
def _coefficients_kernel(
    grad_mse,
    grad_correlation,
    grad_gram,
    mse_stride,
    correlation_stride,
    gram_stride,
    kept,
    weights,
    moments,
    difference,
    coefficients,
    matrix,
    mse_scale,
    correlation_scale,
    gram_scale,
    channels,
    maps,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    c = program % channels
    b = (program // channels).to(tl.int64)
    # The map's rank among the kept, or M.
    i = maps
    for first in range(0, maps, BLOCK):
        j = first + tl.arange(0, BLOCK)
        other = tl.load(kept + b * maps + j, mask=j < maps, other=-1)
        i = tl.minimum(i, tl.min(tl.where(other == c, j, maps), axis=0))
    is_kept = i < maps
    weight = tl.load(weights + b * maps + i, mask=is_kept, other=0.0)
    moment = moments + b * MOMENTS * maps + i
    mean_s = tl.load(moment, mask=is_kept, other=0.0)
    mean_g = tl.load(moment + maps, mask=is_kept, other=0.0)
    mean_d = tl.load(moment + 2 * maps, mask=is_kept, other=0.0)
    scale = tl.load(moment + SCALE * maps, mask=is_kept, other=0.0)
    slope = tl.load(moment + SLOPE * maps, mask=is_kept, other=0.0)
    excess = tl.load(moment + EXCESS * maps, mask=is_kept, other=0.0)
    alike = 2 * tl.abs(excess) < scale
    correlation = tl.load(grad_correlation + b * correlation_stride).to(tl.float32)
    correlation *= correlation_scale
    mse = tl.load(grad_mse + b * mse_stride).to(tl.float32)
    of_difference = mse * mse_scale * weight * weight
    of_centred = correlation * tl.where(alike, -excess, slope)
    of_other = correlation * tl.where(alike, scale, -scale)
    target = coefficients + b * COEFFICIENTS * channels + c
    # Selected, because the gradient of a term may be NaN.
    tl.store(target + OF_DIFFERENCE * channels, tl.where(is_kept, of_difference, 0.0))
    tl.store(target + OF_CENTRED * channels, tl.where(is_kept, of_centred, 0.0))
    tl.store(target + MEAN_OF_CENTRED * channels, mean_s)
    tl.store(target + OF_OTHER * channels, tl.where(is_kept, of_other, 0.0))
    tl.store(target + MEAN_OF_OTHER * channels, tl.where(alike, mean_d, mean_g))
    tl.store(target + ALIKE * channels, tl.where(alike, 1.0, 0.0))
    tl.store(target + KEPT * channels, tl.where(is_kept, 1.0, 0.0))
    gram = tl.load(grad_gram + b * gram_stride).to(tl.float32) * gram_scale * weight
    for first in range(0, maps, BLOCK):
        j = first + tl.arange(0, BLOCK)
        inside = j < tl.where(is_kept, maps, 0)
        other = tl.load(weights + b * maps + j, mask=inside, other=0.0)
        element = tl.load(difference + (b * maps + i) * maps + j, mask=inside, other=0.0)
        value = tl.where(inside, gram * other * element, 0.0)
        tl.store(matrix + (b * channels + c) * maps + j, value, mask=j < maps)


# The gradient of a tile of pixels of a block of channels, kept or not:
#
#     grad = naive D + [kept] (a D + centred (S - mean S) + other (X - mean X) + (S_kept^T K^T))
#
# Floor for B = 1, C = 128, M = 64, 512 x 512: reads 268 MB and writes 134 (bfloat16 half of that),
# 94 us at 4.3 TB/s (47 us); the block of M columns for all C channels takes 2.1 G multiply-adds, as
# tf32x3 6.4 G: 32 us at 400 TFLOP/s.
@triton.jit
def _gradient_kernel(
    gt,
    sr,
    grad,
    kept,
    matrix,
    coefficients,
    grad_naive,
    naive_stride,
    naive_scale,
    channels,
    maps,
    pixels,
    width,
    tiles,
    gt_batch,
    gt_channel,
    gt_row,
    gt_column,
    sr_batch,
    sr_channel,
    sr_row,
    sr_column,
    grad_batch,
    grad_channel,
    grad_row,
    grad_column,
    GT_FLAT: tl.constexpr,
    SR_FLAT: tl.constexpr,
    GRAD_FLAT: tl.constexpr,
    NAIVE_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # The blocks of channels of a tile are consecutive programs: they read the same kept maps.
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = program // blocks % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    b = (program // blocks // tiles).to(tl.int64)
    channel = c < channels
    pixel = (p < pixels)[:, None]
    s_base = sr + b * sr_batch + pixel_offsets(p, width, sr_row, sr_column, SR_FLAT)[:, None]
    g_base = gt + b * gt_batch + pixel_offsets(p, width, gt_row, gt_column, GT_FLAT)[:, None]

    product = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if not NAIVE_ONLY:
        columns = matrix + (b * channels + c)[None, :] * maps
        for first in range(0, maps, BLOCK_J):
            j = first + tl.arange(0, BLOCK_J)
            of_j = tl.load(kept + b * maps + j, mask=j < maps, other=0).to(tl.int64)
            at = s_base + of_j[None, :] * sr_channel
            value = tl.load(at, mask=pixel & (j < maps)[None, :], other=0).to(tl.float32)
            inside = (j < maps)[:, None] & channel[None, :]
            factor = tl.load(columns + j[:, None], mask=inside, other=0)
            product = dot(value, factor, product, PRECISION)

    inside = pixel & channel[None, :]
    s = tl.load(s_base + c.to(tl.int64)[None, :] * sr_channel, mask=inside, other=0).to(tl.float32)
    g = tl.load(g_base + c.to(tl.int64)[None, :] * gt_channel, mask=inside, other=0).to(tl.float32)
    d = s - g
    of_naive = tl.load(grad_naive + b * naive_stride).to(tl.float32) * naive_scale
    result = of_naive * d
    if not NAIVE_ONLY:
        row = coefficients + b * COEFFICIENTS * channels + c
        of_difference = tl.load(row + OF_DIFFERENCE * channels, mask=channel, other=0)[None, :]
        of_centred = tl.load(row + OF_CENTRED * channels, mask=channel, other=0)[None, :]
        mean = tl.load(row + MEAN_OF_CENTRED * channels, mask=channel, other=0)[None, :]
        of_other = tl.load(row + OF_OTHER * channels, mask=channel, other=0)[None, :]
        mean_of_other = tl.load(row + MEAN_OF_OTHER * channels, mask=channel, other=0)[None, :]
        alike = tl.load(row + ALIKE * channels, mask=channel, other=0)[None, :]
        is_kept = tl.load(row + KEPT * channels, mask=channel, other=0)[None, :]
        other = tl.where(alike != 0, d, g)
        value = product + of_difference * d
        value += of_centred * (s - mean) + of_other * (other - mean_of_other)
        # Selected, not multiplied: a NaN of a kept map must not reach maps that are not kept.
        result += tl.where(is_kept != 0, value, 0.0)
    offsets = pixel_offsets(p, width, grad_row, grad_column, GRAD_FLAT)[:, None]
    target = grad + b * grad_batch + c.to(tl.int64)[None, :] * grad_channel + offsets
    tl.store(target, result.to(grad.dtype.element_ty), mask=inside)


# ---- launches ----

COEFFICIENT_BLOCKS = {"BLOCK": 128}


def _gradient_options(channels: int, maps: int) -> dict[str, Any]:
    return {
        "NAIVE_ONLY": maps == 0,
        "BLOCK_C": power_of_two(channels, 16, 64),
        "BLOCK_J": power_of_two(maps, 16, 32),
        "BLOCK_P": 64,
    }


def gradient(
    grads: Sequence[Tensor],
    gt: Tensor,
    sr: Tensor,
    kept: Tensor,
    weights: Tensor,
    moments: Tensor,
    difference: Tensor,
    grad_sr: Tensor,
    precision: str,
) -> None:
    """Writes the gradient of ``sr``, from the (B,) gradients of the four terms, into ``grad_sr``,
    which has the shape and dtype of ``sr``."""
    batch, channels, height, width = sr.shape
    pixels, maps = height * width, kept.shape[1]
    of_gt, of_sr, of_grad = layout_of(gt), layout_of(sr), layout_of(grad_sr)
    naive, *others = grads
    kept = kept.contiguous()
    options = _gradient_options(channels, maps)
    tiles = launch.blocks(pixels, options["BLOCK_P"])
    with launch.on_device_of(sr):
        rows = COEFFICIENTS.value
        coefficients = torch.empty(batch, rows, channels, dtype=torch.float32, device=sr.device)
        matrix = coefficients.new_empty(batch, channels, maps)
        if maps > 0:
            _coefficients_kernel[(batch * channels,)](
                *others,
                *(grad.stride(0) for grad in others),
                kept,
                weights.contiguous(),
                moments.contiguous(),
                difference.contiguous(),
                coefficients,
                matrix,
                2 / (maps * pixels),
                1 / (maps * pixels),
                4 / (maps * maps * pixels),
                channels,
                maps,
                **COEFFICIENT_BLOCKS,
                num_warps=4,
                num_stages=2,
            )
        _gradient_kernel[(batch * tiles * launch.blocks(channels, options["BLOCK_C"]),)](
            gt,
            sr,
            grad_sr,
            kept,
            matrix,
            coefficients,
            naive,
            naive.stride(0),
            2 / (channels * pixels),
            channels,
            maps,
            pixels,
            width,
            tiles,
            *of_gt.strides,
            *of_sr.strides,
            *of_grad.strides,
            GT_FLAT=of_gt.flat,
            SR_FLAT=of_sr.flat,
            GRAD_FLAT=of_grad.flat,
            PRECISION=dot_precision(precision, "tf32x3"),
            **options,
            num_warps=8,
            num_stages=3,
        )
