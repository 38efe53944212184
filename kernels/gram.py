"""Gram matrices of feature maps, F being the (C, H W) matrix of an image's maps.

    G = scale F F^T                          dF = scale (dG + dG^T) F

Float32 products run on tensor cores as tf32x3, three products of 10-bit halves. Half-precision
values are exact in TF32, so one product is enough for them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mghf_fast.backends import can_run_triton
from mghf_fast.kernels import launch
from mghf_fast.kernels.image import layout_of, pixel_offsets, power_of_two, runs_of
from mghf_fast.kernels.products import dot, dot_precision
from mghf_fast.ops.layout import empty_like_laid_out

PROGRAMS = 512
SUM_PRODUCTS = {"BLOCK_S": 16, "BLOCK": 64}


# Products over a run of pixels, of two blocks of maps, the first not after the second:
#
#     partial_ij = sum_p F_ip F_jp
#
# Floor for B = 1, C = 128, 512 x 512: reads 134 MB (bfloat16 67), 31 us at 4.3 TB/s (16 us); writes
# 8 MB of partial sums; the three of four blocks that are computed take 3.2 G multiply-adds, as
# tf32x3 9.7 G: 48 us at 400 TFLOP/s (one product of TF32 16 us).
@triton.jit
def _product_kernel(
    x,
    partial,
    channels,
    pixels,
    width,
    runs,
    run_pixels,
    x_batch,
    x_channel,
    x_row,
    x_column,
    X_FLAT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    block_i = program % blocks
    block_j = program // blocks % blocks
    run = program // blocks // blocks % runs
    b = (program // blocks // blocks // runs).to(tl.int64)
    if block_i <= block_j:
        i = block_i * BLOCK_C + tl.arange(0, BLOCK_C)
        j = block_j * BLOCK_C + tl.arange(0, BLOCK_C)
        rows_i = x + b * x_batch + i.to(tl.int64)[:, None] * x_channel
        rows_j = x + b * x_batch + j.to(tl.int64)[:, None] * x_channel
        product = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        begin = run * run_pixels
        end = tl.minimum(begin + run_pixels, pixels)
        for first in range(begin, end, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            offsets = pixel_offsets(p, width, x_row, x_column, X_FLAT)[None, :]
            inside = (i < channels)[:, None] & (p < pixels)[None, :]
            left = tl.load(rows_i + offsets, mask=inside, other=0).to(tl.float32)
            if ONE_BLOCK:
                right = left
            else:
                inside = (j < channels)[:, None] & (p < pixels)[None, :]
                right = tl.load(rows_j + offsets, mask=inside, other=0).to(tl.float32)
            product = dot(left, tl.trans(right), product, PRECISION)
        target = partial + (b * runs + run) * channels * channels
        target += i.to(tl.int64)[:, None] * channels + j[None, :]
        tl.store(target, product, mask=(i < channels)[:, None] & (j < channels)[None, :])


# The sum of the partial products over the runs, in order, and its mirror image, so that G is
# symmetric to the last bit.
#
# Floor: reads the 8 MB that were just written, 2 us.
@triton.jit
def _sum_kernel(partial, result, scale, channels, runs, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    blocks = tl.cdiv(channels * channels, BLOCK)
    b = (program // blocks).to(tl.int64)
    element = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < channels * channels
    i, j = element // channels, element % channels
    source = partial + tl.minimum(i, j) * channels + tl.maximum(i, j)
    total = tl.zeros([BLOCK_S, BLOCK], tl.float32)
    for first in range(0, runs, BLOCK_S):
        run = first + tl.arange(0, BLOCK_S)
        at = source[None, :] + (b * runs + run)[:, None] * channels * channels
        total += tl.load(at, mask=(run < runs)[:, None] & inside[None, :], other=0)
    value = tl.sum(total, axis=0) * scale
    tl.store(result + b * channels * channels + element, value, mask=inside)


# dF = A F for a tile of pixels and a block of maps, A = scale (dG + dG^T).
#
# Floor for B = 1, C = 128, 512 x 512: reads and writes 134 MB each (bfloat16 67), 62 us at 4.3 TB/s
# (31 us); 4.3 G multiply-adds, as tf32x3 12.9 G: 64 us at 400 TFLOP/s, which bounds it together
# with the splitting into halves.
@triton.jit
def _backward_kernel(
    x,
    matrix,
    grad_x,
    channels,
    pixels,
    width,
    tiles,
    x_batch,
    x_channel,
    x_row,
    x_column,
    grad_batch,
    grad_channel,
    grad_row,
    grad_column,
    X_FLAT: tl.constexpr,
    GRAD_FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # The blocks of maps of a tile are consecutive programs: they read the same pixels.
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = program // blocks % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    b = (program // blocks // tiles).to(tl.int64)
    pixel = (p < pixels)[:, None]
    source = x + b * x_batch + pixel_offsets(p, width, x_row, x_column, X_FLAT)[:, None]
    columns = matrix + (b * channels + c)[None, :] * channels
    product = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, channels, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        at = source + j.to(tl.int64)[None, :] * x_channel
        value = tl.load(at, mask=pixel & (j < channels)[None, :], other=0).to(tl.float32)
        inside = (j < channels)[:, None] & (c < channels)[None, :]
        factor = tl.load(columns + j[:, None], mask=inside, other=0)
        product = dot(value, factor, product, PRECISION)
    offsets = pixel_offsets(p, width, grad_row, grad_column, GRAD_FLAT)[:, None]
    target = grad_x + b * grad_batch + c.to(tl.int64)[None, :] * grad_channel + offsets
    tl.store(target, product.to(grad_x.dtype.element_ty), mask=pixel & (c < channels)[None, :])


# ---- launches ----


def _product_options(channels: int, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    block = power_of_two(channels, 16, 64)
    return {
        "ONE_BLOCK": channels <= block,
        "PRECISION": dot_precision(precision, "tf32x3") if dtype == torch.float32 else "tf32",
        "BLOCK_C": block,
        "BLOCK_P": 32,
    }


def _backward_options(channels: int, precision: str) -> dict[str, Any]:
    return {
        "PRECISION": dot_precision(precision, "tf32x3"),
        "BLOCK_C": power_of_two(channels, 16, 64),
        "BLOCK_J": power_of_two(channels, 16, 32),
        "BLOCK_P": 128,
    }


def forward(x: Tensor, scale: float, precision: str = "float32") -> Tensor:
    """(B, C, H, W) -> (B, C, C) float32."""
    batch, channels, height, width = x.shape
    layout, pixels = layout_of(x), height * width
    options = _product_options(channels, x.dtype, precision)
    others = batch * launch.blocks(channels, options["BLOCK_C"]) ** 2
    runs = runs_of(pixels, options["BLOCK_P"], others, PROGRAMS)
    result = torch.empty(batch, channels, channels, dtype=torch.float32, device=x.device)
    partial = result.new_empty(batch, runs.number, channels, channels)
    with launch.on_device_of(x):
        _product_kernel[(others * runs.number,)](
            x,
            partial,
            channels,
            pixels,
            width,
            runs.number,
            runs.size,
            *layout.strides,
            X_FLAT=layout.flat,
            **options,
            num_warps=8,
            num_stages=3,
        )
        programs = batch * launch.blocks(channels * channels, SUM_PRODUCTS["BLOCK"])
        _sum_kernel[(programs,)](
            partial,
            result,
            scale,
            channels,
            runs.number,
            **SUM_PRODUCTS,
            num_warps=4,
            num_stages=2,
        )
    return result


def backward(grad: Tensor, x: Tensor, scale: float, precision: str = "float32") -> Tensor:
    """The gradient of ``x``, with its shape, dtype and layout."""
    grad_x = empty_like_laid_out(x)
    batch, channels, height, width = x.shape
    layout, target = layout_of(x), layout_of(grad_x)
    options = _backward_options(channels, precision)
    tiles = launch.blocks(height * width, options["BLOCK_P"])
    with launch.on_device_of(x):
        matrix = ((grad + grad.mT) * scale).float().contiguous()
        _backward_kernel[(batch * tiles * launch.blocks(channels, options["BLOCK_C"]),)](
            x,
            matrix,
            grad_x,
            channels,
            height * width,
            width,
            tiles,
            *layout.strides,
            *target.strides,
            X_FLAT=layout.flat,
            GRAD_FLAT=target.flat,
            **options,
            num_warps=8,
            num_stages=3,
        )
    return grad_x


can_run = can_run_triton
