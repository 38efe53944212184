"""The sweeps of the forward of `content_style`, and their launches; the formulas are in
content_style.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mghf_fast.kernels import launch
from mghf_fast.kernels.content_style_rows import (
    DISTANCE,
    EXCESS,
    SCALE,
    SLOPE,
    SQUARE,
    STATISTICS,
)
from mghf_fast.kernels.image import layout_of, pixel_offsets, place_of, power_of_two, runs_of
from mghf_fast.kernels.products import dot, dot_precision

SWEEP_PROGRAMS = 4096
PRODUCT_PROGRAMS = 256

VARIANCE_FLOOR = tl.constexpr(1e-8)

# Rows of a run's partial results, all float32: sums of deviations from the pivots, ...
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


@triton.jit
def _store_sum(target, tile, inside):
    tl.store(target, tl.sum(tile, axis=1), mask=inside)


# Sums over a run of deviations from its pivots s, g, d (means of its first tile), and ranges:
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
    # Pivots are single columns; summing over that column makes them vectors.
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


# Statistics of each map from those of its runs, in float64, about the first run's pivots. A map
# with a NaN or an infinity, seen from its mean, gets NaN for its range.
#
# Floor: reads at most 2 MB that were just written, under 1 us; float64 arithmetic on about 10^5
# numbers.
@triton.jit
def _merge_kernel(
    partial,
    statistics,
    ranges,
    counts,
    tickets,
    bins,
    images,
    channels,
    pixels,
    runs,
    run_pixels,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    b = (program // blocks).to(tl.int64)
    ok = c < channels
    # What later kernels add to.
    nothing = tl.zeros([BLOCK_C, BLOCK_BINS], tl.int32)
    of_gt = counts + (b * channels + c)[:, None] * bins
    of_sr = of_gt + (images * channels).to(tl.int64) * bins
    for first in range(0, bins, BLOCK_BINS):
        i = first + tl.arange(0, BLOCK_BINS)
        inside = ok[:, None] & (i < bins)[None, :]
        tl.store(of_gt + i[None, :], nothing, mask=inside)
        tl.store(of_sr + i[None, :], nothing, mask=inside)
    if program % blocks == 0:
        tl.store(tickets + b, 0)
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
    # Almost equal maps: from the moments of D, because those of S and G would cancel.
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


# Products of two blocks of kept maps over a run of pixels:
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
    PRECISION: tl.constexpr,
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
        product = dot(difference, tl.trans(total), product, PRECISION)
    target = partial + (b * runs + run) * maps * maps + i.to(tl.int64)[:, None] * maps + j[None, :]
    tl.store(target, product, mask=(i < maps)[:, None] & (j < maps)[None, :])


# ---- launches ----


def _sweep_options(by_maps: bool, channels: int, values: int) -> dict[str, Any]:
    """Block sizes of the kernels whose tile has ``values`` values, channels times pixels."""
    block = 1 if by_maps else power_of_two(channels, 1, 32)
    return {"BLOCK_C": block, "BLOCK_P": values // block}


MOMENT_VALUES = 512  # each needs a dozen accumulators
SQUARE_VALUES = 1024
MERGE_BLOCKS = {"BLOCK_R": 32, "BLOCK_C": 8, "BLOCK_BINS": 32}


def _product_options(maps: int) -> dict[str, Any]:
    block = power_of_two(maps, 16, 64)
    return {"ONE_BLOCK": maps <= block, "BLOCK_M": block, "BLOCK_P": 32}


def naive_of(gt: Tensor, sr: Tensor) -> Tensor:
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
        *of_gt.strides,
        *of_sr.strides,
        GT_FLAT=of_gt.flat,
        SR_FLAT=of_sr.flat,
        **options,
        num_warps=4,
        num_stages=2,
    )
    return (partial.sum(1, dtype=torch.float64) / (channels * pixels)).float()


def statistics_of(gt: Tensor, sr: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of all maps, (B, 8, C) float64, and their ranges, (2, 2, B, C): the lows of gt and
    sr, then the highs; and zeros, (2, B, C, bins) and (B,) int32."""
    batch, channels, height, width = sr.shape
    of_gt, of_sr, pixels = layout_of(gt), layout_of(sr), height * width
    options = _sweep_options(of_sr.by_maps, channels, MOMENT_VALUES)
    others = batch * launch.blocks(channels, options["BLOCK_C"])
    runs = runs_of(pixels, options["BLOCK_P"], others, SWEEP_PROGRAMS)
    rows = PARTIAL_ROWS.value
    ranges = torch.empty(2, 2, batch, channels, dtype=torch.float32, device=sr.device)
    partial = ranges.new_empty(batch, runs.number, rows, channels)
    statistics = ranges.new_empty(batch, STATISTICS.value, channels, dtype=torch.float64)
    counts = ranges.new_empty(2, batch, channels, bins, dtype=torch.int32)
    tickets = counts.new_empty(batch)
    _moments_kernel[(others * runs.number,)](
        gt,
        sr,
        partial,
        channels,
        pixels,
        width,
        runs.number,
        runs.size,
        *of_gt.strides,
        *of_sr.strides,
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
        counts,
        tickets,
        bins,
        batch,
        channels,
        pixels,
        runs.number,
        runs.size,
        **MERGE_BLOCKS,
        num_warps=8,
        num_stages=2,
    )
    return statistics, ranges, counts, tickets


def products_of(gt: Tensor, sr: Tensor, kept: Tensor, precision: str) -> Tensor:
    """Products of the kept maps over each run of pixels, (B, runs, M, M)."""
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
        *of_gt.strides,
        *of_sr.strides,
        GT_FLAT=of_gt.flat,
        SR_FLAT=of_sr.flat,
        PRECISION=dot_precision(precision, "tf32x3"),
        **options,
        num_warps=8,
        num_stages=3,
    )
    return partial
