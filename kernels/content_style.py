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

The gradient is one more, which also writes: with K the kept columns of Gram's gradient,

    grad = a D + centred (S - mean S) + other (X - mean X) + K S_kept,      X = D or G

X being D for maps that are much alike: with the other of the two the terms would nearly cancel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mghf_fast.backends import can_run_triton
from mghf_fast.kernels import launch
from mghf_fast.kernels.entropy import counts_of, entropies_of
from mghf_fast.kernels.image import (
    Layout,
    layout_of,
    pixel_offsets,
    place_of,
    power_of_two,
    runs_of,
)
from mghf_fast.kernels.selection import gram_difference, select
from mghf_fast.ops.layout import empty_like_laid_out
from mghf_fast.ops.limits import only_channel_gram
from mghf_fast.ops.vocabulary import ContentStyleOutputs

SWEEP_PROGRAMS = 4096
PRODUCT_PROGRAMS = 256

VARIANCE_FLOOR = tl.constexpr(1e-8)

# Rows of a run's partial results, all float32: sums of what deviates from the pivots, ...
SUM_S = tl.constexpr(0)
SUM_G = tl.constexpr(1)
SUM_D = tl.constexpr(2)
SUM_SS = tl.constexpr(3)
SUM_GG = tl.constexpr(4)
SUM_DD = tl.constexpr(5)
SUM_SG = tl.constexpr(6)
SUM_SD = tl.constexpr(7)
# ... the pivots, and ranges.
PIVOT_S = tl.constexpr(8)
PIVOT_G = tl.constexpr(9)
PIVOT_D = tl.constexpr(10)
LOW_S = tl.constexpr(11)
HIGH_S = tl.constexpr(12)
LOW_G = tl.constexpr(13)
HIGH_G = tl.constexpr(14)
PARTIAL_ROWS = tl.constexpr(15)

# Rows of the statistics of a map, float64. The first six are what the forward hands to the
# backward: its gradient of the correlation is, per pixel and times -n,
# scale (G - mean G) - slope (S - mean S) = excess (S - mean S) - scale (D - mean D).
MOMENTS = tl.constexpr(6)
SCALE = tl.constexpr(3)
SLOPE = tl.constexpr(4)
EXCESS = tl.constexpr(5)
DISTANCE = tl.constexpr(6)  # 1 - rho
SQUARE = tl.constexpr(7)  # mean D^2
STATISTICS = tl.constexpr(8)

# Rows of a map's coefficients in the gradient, 0 where it is not kept.
OF_DIFFERENCE = tl.constexpr(0)
OF_CENTRED = tl.constexpr(1)
MEAN_OF_CENTRED = tl.constexpr(2)
OF_OTHER = tl.constexpr(3)
MEAN_OF_OTHER = tl.constexpr(4)
ALIKE = tl.constexpr(5)
KEPT = tl.constexpr(6)
COEFFICIENTS = tl.constexpr(7)


@triton.jit
def _store_sum(target, tile, inside):
    tl.store(target, tl.sum(tile, axis=1), mask=inside)


# Sums over a run of what deviates from the run's pivots s, g, d (a tile's means), and ranges:
#
#     sum S - s, G - g, D - d, (S - s)^2, (G - g)^2, (D - d)^2, (S - s)(G - g), (S - s)(D - d)
#
# Floor for B = 1, C = 128, 512 x 512: reads 268 MB (bfloat16 134), 62 us at 4.3 TB/s (31 us); about
# 30 instructions for each pixel of a map, 1 G: 16 us of float32 arithmetic, which hides behind it.
@triton.jit
def _moments_kernel(
    gt,
    sr,
    partial,
    channels,
    pixels,
    width,
    runs,
    run_pixels,
    gt_batch,
    gt_channel,
    gt_row,
    gt_column,
    sr_batch,
    sr_channel,
    sr_row,
    sr_column,
    GT_FLAT: tl.constexpr,
    SR_FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b, run, c = place_of(channels, runs, BLOCK_C)
    s_rows = sr + b * sr_batch + c.to(tl.int64)[:, None] * sr_channel
    g_rows = gt + b * gt_batch + c.to(tl.int64)[:, None] * gt_channel
    begin = run * run_pixels
    end = tl.minimum(begin + run_pixels, pixels)

    # Anchors are values of the map, so that a constant map deviates by exactly 0.
    channel = (c < channels)[:, None]
    at_s = s_rows + pixel_offsets(begin, width, sr_row, sr_column, SR_FLAT)
    at_g = g_rows + pixel_offsets(begin, width, gt_row, gt_column, GT_FLAT)
    anchor_s = tl.load(at_s, mask=channel, other=0).to(tl.float32)
    anchor_g = tl.load(at_g, mask=channel, other=0).to(tl.float32)
    anchor_d = anchor_s - anchor_g
    p = begin + tl.arange(0, BLOCK_P)
    inside = channel & (p < pixels)[None, :]
    at_s = s_rows + pixel_offsets(p, width, sr_row, sr_column, SR_FLAT)[None, :]
    at_g = g_rows + pixel_offsets(p, width, gt_row, gt_column, GT_FLAT)[None, :]
    s = tl.load(at_s, mask=inside, other=0).to(tl.float32)
    g = tl.load(at_g, mask=inside, other=0).to(tl.float32)
    share = 1.0 / tl.minimum(end - begin, BLOCK_P).to(tl.float32)
    s_sum = tl.sum(tl.where(inside, s - anchor_s, 0.0), axis=1)[:, None]
    g_sum = tl.sum(tl.where(inside, g - anchor_g, 0.0), axis=1)[:, None]
    d_sum = tl.sum(tl.where(inside, (s - g) - anchor_d, 0.0), axis=1)[:, None]
    pivot_s = anchor_s + s_sum * share
    pivot_g = anchor_g + g_sum * share
    pivot_d = anchor_d + d_sum * share

    infinity = float("inf")
    sum_s = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum_g = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum_d = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum_ss = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum_gg = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum_dd = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum_sg = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum_sd = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    low_s = tl.full([BLOCK_C, BLOCK_P], infinity, tl.float32)
    low_g = tl.full([BLOCK_C, BLOCK_P], infinity, tl.float32)
    high_s = tl.full([BLOCK_C, BLOCK_P], -infinity, tl.float32)
    high_g = tl.full([BLOCK_C, BLOCK_P], -infinity, tl.float32)
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = channel & (p < pixels)[None, :]
        at_s = s_rows + pixel_offsets(p, width, sr_row, sr_column, SR_FLAT)[None, :]
        at_g = g_rows + pixel_offsets(p, width, gt_row, gt_column, GT_FLAT)[None, :]
        s = tl.load(at_s, mask=inside, other=0).to(tl.float32)
        g = tl.load(at_g, mask=inside, other=0).to(tl.float32)
        s0 = tl.where(inside, s - pivot_s, 0.0)
        g0 = tl.where(inside, g - pivot_g, 0.0)
        d0 = tl.where(inside, (s - g) - pivot_d, 0.0)
        sum_s += s0
        sum_g += g0
        sum_d += d0
        sum_ss += s0 * s0
        sum_gg += g0 * g0
        sum_dd += d0 * d0
        sum_sg += s0 * g0
        sum_sd += s0 * d0
        low_s = tl.minimum(low_s, tl.where(inside, s, infinity))
        low_g = tl.minimum(low_g, tl.where(inside, g, infinity))
        high_s = tl.maximum(high_s, tl.where(inside, s, -infinity))
        high_g = tl.maximum(high_g, tl.where(inside, g, -infinity))

    target = partial + (b * runs + run) * PARTIAL_ROWS * channels + c
    ok = c < channels
    _store_sum(target + SUM_S * channels, sum_s, ok)
    _store_sum(target + SUM_G * channels, sum_g, ok)
    _store_sum(target + SUM_D * channels, sum_d, ok)
    _store_sum(target + SUM_SS * channels, sum_ss, ok)
    _store_sum(target + SUM_GG * channels, sum_gg, ok)
    _store_sum(target + SUM_DD * channels, sum_dd, ok)
    _store_sum(target + SUM_SG * channels, sum_sg, ok)
    _store_sum(target + SUM_SD * channels, sum_sd, ok)
    # A sum over the one column that they have turns a column into a vector.
    _store_sum(target + PIVOT_S * channels, pivot_s, ok)
    _store_sum(target + PIVOT_G * channels, pivot_g, ok)
    _store_sum(target + PIVOT_D * channels, pivot_d, ok)
    tl.store(target + LOW_S * channels, tl.min(low_s, axis=1), mask=ok)
    tl.store(target + LOW_G * channels, tl.min(low_g, axis=1), mask=ok)
    tl.store(target + HIGH_S * channels, tl.max(high_s, axis=1), mask=ok)
    tl.store(target + HIGH_G * channels, tl.max(high_g, axis=1), mask=ok)


@triton.jit
def _load_double(source, inside):
    return tl.load(source, mask=inside, other=0).to(tl.float64)


# Statistics of each map from those of its runs, in float64, about the first run's pivots. Ranges
# are NaN for a map with a NaN or an infinity, which its mean shows.
#
# Floor: reads at most 2 MB that were just written, under 1 us; float64 arithmetic on some 10^5
# numbers.
@triton.jit
def _merge_kernel(
    partial,
    statistics,
    ranges,
    images,
    channels,
    pixels,
    runs,
    run_pixels,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    b = (program // blocks).to(tl.int64)
    ok = c < channels
    origin = partial + b * runs * PARTIAL_ROWS * channels + c
    origin_s = _load_double(origin + PIVOT_S * channels, ok)
    origin_g = _load_double(origin + PIVOT_G * channels, ok)
    origin_d = _load_double(origin + PIVOT_D * channels, ok)

    infinity = float("inf")
    mean_s = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    mean_g = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    mean_d = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    var_s = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    var_g = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    var_d = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    cov = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    cov_sd = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    low_s = tl.full([BLOCK_R, BLOCK_C], infinity, tl.float32)
    low_g = tl.full([BLOCK_R, BLOCK_C], infinity, tl.float32)
    high_s = tl.full([BLOCK_R, BLOCK_C], -infinity, tl.float32)
    high_g = tl.full([BLOCK_R, BLOCK_C], -infinity, tl.float32)
    for first in range(0, runs, BLOCK_R):
        run = first + tl.arange(0, BLOCK_R)
        inside = (run < runs)[:, None] & ok[None, :]
        count = tl.minimum(run_pixels, pixels - run * run_pixels)
        count = tl.where(run < runs, count, 1).to(tl.float64)[:, None]
        share = tl.where(inside, count / pixels, 0.0)
        at = partial + (b * runs + run)[:, None] * PARTIAL_ROWS * channels + c[None, :]
        s = _load_double(at + SUM_S * channels, inside) / count
        g = _load_double(at + SUM_G * channels, inside) / count
        d = _load_double(at + SUM_D * channels, inside) / count
        from_s = _load_double(at + PIVOT_S * channels, inside) + s - origin_s[None, :]
        from_g = _load_double(at + PIVOT_G * channels, inside) + g - origin_g[None, :]
        from_d = _load_double(at + PIVOT_D * channels, inside) + d - origin_d[None, :]
        ss = _load_double(at + SUM_SS * channels, inside) / count
        gg = _load_double(at + SUM_GG * channels, inside) / count
        dd = _load_double(at + SUM_DD * channels, inside) / count
        sg = _load_double(at + SUM_SG * channels, inside) / count
        sd = _load_double(at + SUM_SD * channels, inside) / count
        mean_s += share * from_s
        mean_g += share * from_g
        mean_d += share * from_d
        var_s += share * ((ss - s * s) + from_s * from_s)
        var_g += share * ((gg - g * g) + from_g * from_g)
        var_d += share * ((dd - d * d) + from_d * from_d)
        cov += share * ((sg - s * g) + from_s * from_g)
        cov_sd += share * ((sd - s * d) + from_s * from_d)
        low_s = tl.minimum(low_s, tl.load(at + LOW_S * channels, mask=inside, other=infinity))
        low_g = tl.minimum(low_g, tl.load(at + LOW_G * channels, mask=inside, other=infinity))
        high_s = tl.maximum(high_s, tl.load(at + HIGH_S * channels, mask=inside, other=-infinity))
        high_g = tl.maximum(high_g, tl.load(at + HIGH_G * channels, mask=inside, other=-infinity))

    from_s = tl.sum(mean_s, axis=0)
    from_g = tl.sum(mean_g, axis=0)
    from_d = tl.sum(mean_d, axis=0)
    s, g, d = origin_s + from_s, origin_g + from_g, origin_d + from_d
    ss = tl.sum(var_s, axis=0) - from_s * from_s
    gg = tl.sum(var_g, axis=0) - from_g * from_g
    dd = tl.sum(var_d, axis=0) - from_d * from_d
    sg = tl.sum(cov, axis=0) - from_s * from_g
    sd = tl.sum(cov_sd, axis=0) - from_s * from_d
    ss = tl.where(ss < 0, 0.0, ss)  # by rounding
    gg = tl.where(gg < 0, 0.0, gg)

    root = tl.sqrt(tl.where(ss <= VARIANCE_FLOOR, VARIANCE_FLOOR, ss))
    root *= tl.sqrt(tl.where(gg <= VARIANCE_FLOOR, VARIANCE_FLOOR, gg))
    scale = 1.0 / root
    slope = tl.where(ss <= VARIANCE_FLOOR, 0.0, sg / ss / root)
    # Of a pair that is alike: from the moments of D, as the others would cancel.
    alike = (ss > VARIANCE_FLOOR) & (gg > VARIANCE_FLOOR) & (dd < root)
    apart = (2 * sd - dd) / (tl.sqrt(ss) + tl.sqrt(gg))
    distance = tl.where(alike, (dd - apart * apart) / (2 * root), 1 - sg / root)
    excess = tl.where(alike, sd / ss / root, scale - slope)

    target = statistics + b * STATISTICS * channels + c
    tl.store(target, s, mask=ok)
    tl.store(target + channels, g, mask=ok)
    tl.store(target + 2 * channels, d, mask=ok)
    tl.store(target + SCALE * channels, scale, mask=ok)
    tl.store(target + SLOPE * channels, slope, mask=ok)
    tl.store(target + EXCESS * channels, excess, mask=ok)
    tl.store(target + DISTANCE * channels, distance, mask=ok)
    tl.store(target + SQUARE * channels, dd + d * d, mask=ok)

    # The lows of gt and of sr, then their highs, each (B, C).
    nothing = float("nan")
    size = images * channels
    target = ranges + b * channels + c
    finite = g - g == 0
    tl.store(target, tl.where(finite, tl.min(low_g, axis=0), nothing), mask=ok)
    tl.store(target + 2 * size, tl.where(finite, tl.max(high_g, axis=0), nothing), mask=ok)
    finite = s - s == 0
    tl.store(target + size, tl.where(finite, tl.min(low_s, axis=0), nothing), mask=ok)
    tl.store(target + 3 * size, tl.where(finite, tl.max(high_s, axis=0), nothing), mask=ok)


# MGHF-n alone: sum (S - G)^2 over a run of a block of maps.
#
# Floor for B = 1, C = 128, 512 x 512: reads 268 MB (bfloat16 134), 62 us at 4.3 TB/s (31 us).
@triton.jit
def _squares_kernel(
    gt,
    sr,
    partial,
    channels,
    pixels,
    width,
    runs,
    run_pixels,
    gt_batch,
    gt_channel,
    gt_row,
    gt_column,
    sr_batch,
    sr_channel,
    sr_row,
    sr_column,
    GT_FLAT: tl.constexpr,
    SR_FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b, run, c = place_of(channels, runs, BLOCK_C)
    s_rows = sr + b * sr_batch + c.to(tl.int64)[:, None] * sr_channel
    g_rows = gt + b * gt_batch + c.to(tl.int64)[:, None] * gt_channel
    squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    begin = run * run_pixels
    end = tl.minimum(begin + run_pixels, pixels)
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (c < channels)[:, None] & (p < pixels)[None, :]
        at_s = s_rows + pixel_offsets(p, width, sr_row, sr_column, SR_FLAT)[None, :]
        at_g = g_rows + pixel_offsets(p, width, gt_row, gt_column, GT_FLAT)[None, :]
        s = tl.load(at_s, mask=inside, other=0).to(tl.float32)
        g = tl.load(at_g, mask=inside, other=0).to(tl.float32)
        squares += (s - g) * (s - g)
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(squares, axis=1), axis=0))


# Of two blocks of kept maps, over a run of pixels:
#
#     partial_ij = sum_p (S - G)_ip (S + G)_jp,       S S^T - G G^T = partial + partial^T, halved
#
# Floor for B = 1, M = 64 of C = 128, 512 x 512: reads 134 MB where maps lie one after the other
# (bfloat16 67), 31 us at 4.3 TB/s (16 us), twice that where a pixel's channels do; 1.07 G
# multiply-adds, as tf32x3 3.2 G: 16 us at 400 TFLOP/s.
@triton.jit
def _product_kernel(
    gt,
    sr,
    kept,
    partial,
    maps,
    pixels,
    width,
    runs,
    run_pixels,
    gt_batch,
    gt_channel,
    gt_row,
    gt_column,
    sr_batch,
    sr_channel,
    sr_row,
    sr_column,
    GT_FLAT: tl.constexpr,
    SR_FLAT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(maps, BLOCK_M)
    i = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    j = program // blocks % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    run = program // blocks // blocks % runs
    b = (program // blocks // blocks // runs).to(tl.int64)
    of_i = tl.load(kept + b * maps + i, mask=i < maps, other=0).to(tl.int64)[:, None]
    of_j = tl.load(kept + b * maps + j, mask=j < maps, other=0).to(tl.int64)[:, None]
    s_base = sr + b * sr_batch
    g_base = gt + b * gt_batch
    product = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    begin = run * run_pixels
    end = tl.minimum(begin + run_pixels, pixels)
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        s_offsets = pixel_offsets(p, width, sr_row, sr_column, SR_FLAT)[None, :]
        g_offsets = pixel_offsets(p, width, gt_row, gt_column, GT_FLAT)[None, :]
        inside = (i < maps)[:, None] & (p < pixels)[None, :]
        s = tl.load(s_base + of_i * sr_channel + s_offsets, mask=inside, other=0).to(tl.float32)
        g = tl.load(g_base + of_i * gt_channel + g_offsets, mask=inside, other=0).to(tl.float32)
        difference = s - g
        if ONE_BLOCK:
            total = s + g
        else:
            inside = (j < maps)[:, None] & (p < pixels)[None, :]
            at_s = s_base + of_j * sr_channel + s_offsets
            at_g = g_base + of_j * gt_channel + g_offsets
            total = tl.load(at_s, mask=inside, other=0).to(tl.float32)
            total += tl.load(at_g, mask=inside, other=0).to(tl.float32)
        product = tl.dot(difference, tl.trans(total), product, input_precision="tf32x3")
    target = partial + (b * runs + run) * maps * maps + i.to(tl.int64)[:, None] * maps + j[None, :]
    tl.store(target, product, mask=(i < maps)[:, None] & (j < maps)[None, :])


# The gradient's coefficients of a kept map, and its row of K,
#
#     K_ij = (4 grad / (M^2 n)) w_i w_j D_ij,
#
# put in the place of its channel. One program a map; nothing to be counted.
@triton.jit
def _coefficients_kernel(
    grad_mse,
    grad_correlation,
    grad_gram,
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
    i = program % maps
    b = (program // maps).to(tl.int64)
    c = tl.load(kept + b * maps + i)
    weight = tl.load(weights + b * maps + i)
    moment = moments + b * MOMENTS * maps + i
    scale = tl.load(moment + SCALE * maps)
    slope = tl.load(moment + SLOPE * maps)
    excess = tl.load(moment + EXCESS * maps)
    alike = 2 * tl.abs(excess) < scale
    correlation = tl.load(grad_correlation + b) * correlation_scale
    of_difference = tl.load(grad_mse + b) * mse_scale * weight * weight
    of_centred = correlation * tl.where(alike, -excess, slope)
    of_other = correlation * tl.where(alike, scale, -scale)
    mean_of_other = tl.where(alike, tl.load(moment + 2 * maps), tl.load(moment + maps))
    target = coefficients + b * COEFFICIENTS * channels + c
    tl.store(target + OF_DIFFERENCE * channels, of_difference)
    tl.store(target + OF_CENTRED * channels, of_centred)
    tl.store(target + MEAN_OF_CENTRED * channels, tl.load(moment))
    tl.store(target + OF_OTHER * channels, of_other)
    tl.store(target + MEAN_OF_OTHER * channels, mean_of_other)
    tl.store(target + ALIKE * channels, tl.where(alike, 1.0, 0.0))
    tl.store(target + KEPT * channels, 1.0)
    gram = tl.load(grad_gram + b) * gram_scale * weight
    for first in range(0, maps, BLOCK):
        j = first + tl.arange(0, BLOCK)
        other = tl.load(weights + b * maps + j, mask=j < maps, other=0)
        element = tl.load(difference + (b * maps + i) * maps + j, mask=j < maps, other=0)
        tl.store(matrix + (b * channels + c) * maps + j, gram * other * element, mask=j < maps)


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
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # The blocks of channels of one tile come one after the other: they read the same kept maps.
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
            product = tl.dot(value, factor, product, input_precision="tf32x3")

    inside = pixel & channel[None, :]
    s = tl.load(s_base + c.to(tl.int64)[None, :] * sr_channel, mask=inside, other=0).to(tl.float32)
    g = tl.load(g_base + c.to(tl.int64)[None, :] * gt_channel, mask=inside, other=0).to(tl.float32)
    d = s - g
    result = (tl.load(grad_naive + b) * naive_scale) * d
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
        # Selected and not multiplied: in a map that is not kept nothing spreads from another's NaN.
        result += tl.where(is_kept != 0, value, 0.0)
    offsets = pixel_offsets(p, width, grad_row, grad_column, GRAD_FLAT)[:, None]
    target = grad + b * grad_batch + c.to(tl.int64)[None, :] * grad_channel + offsets
    tl.store(target, result.to(grad.dtype.element_ty), mask=inside)


# ---- launches ----


def _sweep_options(by_maps: bool, channels: int, values: int) -> dict[str, Any]:
    """Of the kernels that hold a tile of ``values`` values of all channels and pixels."""
    block = 1 if by_maps else power_of_two(channels, 1, 32)
    return {"BLOCK_C": block, "BLOCK_P": values // block}


MOMENT_VALUES = 512  # of which each takes a dozen accumulators
SQUARE_VALUES = 1024
MERGE_BLOCKS = {"BLOCK_R": 32, "BLOCK_C": 8}
COEFFICIENT_BLOCKS = {"BLOCK": 128}


def _product_options(maps: int) -> dict[str, Any]:
    block = power_of_two(maps, 16, 64)
    return {"ONE_BLOCK": maps <= block, "BLOCK_M": block, "BLOCK_P": 32}


def _gradient_options(channels: int, maps: int) -> dict[str, Any]:
    return {
        "NAIVE_ONLY": maps == 0,
        "BLOCK_C": power_of_two(channels, 16, 64),
        "BLOCK_J": power_of_two(maps, 16, 32),
        "BLOCK_P": 64,
    }


def _strides(layout: Layout) -> tuple[int, int, int, int]:
    return layout.batch, layout.channel, layout.row, layout.column


def _naive(gt: Tensor, sr: Tensor) -> Tensor:
    batch, channels, height, width = sr.shape
    of_gt, of_sr, pixels = layout_of(gt), layout_of(sr), height * width
    options = _sweep_options(of_sr.by_maps, channels, SQUARE_VALUES)
    blocks = launch.blocks(channels, options["BLOCK_C"])
    runs = runs_of(pixels, options["BLOCK_P"], batch * blocks, SWEEP_PROGRAMS)
    partial = torch.empty(batch, runs.number * blocks, dtype=torch.float32, device=sr.device)
    _squares_kernel[(partial.numel(),)](
        gt,
        sr,
        partial,
        channels,
        pixels,
        width,
        runs.number,
        runs.size,
        *_strides(of_gt),
        *_strides(of_sr),
        GT_FLAT=of_gt.flat,
        SR_FLAT=of_sr.flat,
        **options,
        num_warps=4,
        num_stages=2,
    )
    return (partial.sum(1, dtype=torch.float64) / (channels * pixels)).float()


def _statistics(gt: Tensor, sr: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics of all maps, (B, 8, C) float64, and ranges, (2, 2, B, C): lows and highs, of gt
    and of sr."""
    batch, channels, height, width = sr.shape
    of_gt, of_sr, pixels = layout_of(gt), layout_of(sr), height * width
    options = _sweep_options(of_sr.by_maps, channels, MOMENT_VALUES)
    others = batch * launch.blocks(channels, options["BLOCK_C"])
    runs = runs_of(pixels, options["BLOCK_P"], others, SWEEP_PROGRAMS)
    rows = PARTIAL_ROWS.value
    ranges = torch.empty(2, 2, batch, channels, dtype=torch.float32, device=sr.device)
    partial = ranges.new_empty(batch, runs.number, rows, channels)
    statistics = ranges.new_empty(batch, STATISTICS.value, channels, dtype=torch.float64)
    _moments_kernel[(others * runs.number,)](
        gt,
        sr,
        partial,
        channels,
        pixels,
        width,
        runs.number,
        runs.size,
        *_strides(of_gt),
        *_strides(of_sr),
        GT_FLAT=of_gt.flat,
        SR_FLAT=of_sr.flat,
        **options,
        num_warps=4,
        num_stages=2,
    )
    _merge_kernel[(batch * launch.blocks(channels, MERGE_BLOCKS["BLOCK_C"]),)](
        partial,
        statistics,
        ranges,
        batch,
        channels,
        pixels,
        runs.number,
        runs.size,
        **MERGE_BLOCKS,
        num_warps=8,
        num_stages=2,
    )
    return statistics, ranges


def _products(gt: Tensor, sr: Tensor, kept: Tensor) -> Tensor:
    """Of the kept maps over each run of pixels, (B, runs, M, M)."""
    batch, _, height, width = sr.shape
    of_gt, of_sr, pixels, maps = layout_of(gt), layout_of(sr), height * width, kept.shape[1]
    options = _product_options(maps)
    others = batch * launch.blocks(maps, options["BLOCK_M"]) ** 2
    runs = runs_of(pixels, options["BLOCK_P"], others, PRODUCT_PROGRAMS)
    partial = torch.empty(batch, runs.number, maps, maps, dtype=torch.float32, device=sr.device)
    _product_kernel[(others * runs.number,)](
        gt,
        sr,
        kept,
        partial,
        maps,
        pixels,
        width,
        runs.number,
        runs.size,
        *_strides(of_gt),
        *_strides(of_sr),
        GT_FLAT=of_gt.flat,
        SR_FLAT=of_sr.flat,
        **options,
        num_warps=8,
        num_stages=3,
    )
    return partial


def forward(
    gt: Tensor, sr: Tensor, top_m: int, alpha: float, gamma: float, bins: int, gram: str
) -> ContentStyleOutputs:
    """The op's outputs: terms, kept maps, weights and what the backward needs."""
    batch, channels, height, width = sr.shape
    pixels = height * width
    with launch.on_device_of(sr):
        if top_m == 0:
            naive = _naive(gt, sr)
            mse, correlation, style = (torch.zeros_like(naive) for _ in range(3))
            kept = torch.empty(batch, 0, dtype=torch.int64, device=sr.device)
            weights, moments, difference = (
                naive.new_empty(batch, *shape) for shape in ((0,), (MOMENTS.value, 0), (0, 0))
            )
            return naive, mse, correlation, style, kept, weights, moments, difference

        statistics, ranges = _statistics(gt, sr)
        counts = torch.zeros(2, batch, channels, bins, dtype=torch.int32, device=sr.device)
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
        difference, style = gram_difference(_products(gt, sr, kept), weights, pixels)
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
) -> Tensor:
    """The gradient of ``sr``, of its shape, type and layout, for the (B,) gradients of the four
    terms."""
    grad_sr = empty_like_laid_out(sr)
    batch, channels, height, width = sr.shape
    pixels, maps = height * width, kept.shape[1]
    of_gt, of_sr, of_grad = layout_of(gt), layout_of(sr), layout_of(grad_sr)
    grads = (grad_naive, grad_mse, grad_correlation, grad_gram)
    naive, mse, correlation, style = (grad.float().contiguous() for grad in grads)
    kept = kept.contiguous()
    options = _gradient_options(channels, maps)
    tiles = launch.blocks(pixels, options["BLOCK_P"])
    with launch.on_device_of(sr):
        rows = COEFFICIENTS.value
        coefficients = torch.zeros(batch, rows, channels, dtype=torch.float32, device=sr.device)
        matrix = coefficients.new_zeros(batch, channels, maps)
        if maps > 0:
            _coefficients_kernel[(batch * maps,)](
                mse,
                correlation,
                style,
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
            2 / (channels * pixels),
            channels,
            maps,
            pixels,
            width,
            tiles,
            *_strides(of_gt),
            *_strides(of_sr),
            *_strides(of_grad),
            GT_FLAT=of_gt.flat,
            SR_FLAT=of_sr.flat,
            GRAD_FLAT=of_grad.flat,
            **options,
            num_warps=8,
            num_stages=3,
        )
    return grad_sr


def can_run(*tensors: Tensor, gram: str = "channel", **options: Any) -> str | None:
    return only_channel_gram(gram) or can_run_triton(*tensors)
