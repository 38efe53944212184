"""DECLoss in Triton. See mghf_fast/reference/dec.py for the mathematics.

With unit patches s, g and E = exp(./t) the loss needs, for every row i, the sums over its positives
and its negatives j of E(<s_i, s_j>) + 2 E(<g_i, s_j>). The pairs are visited tile by tile and never
stored. A program takes a block of rows and one of a few runs of columns; the runs are added in
order afterwards.

Thresholds. A pair is positive if the float32 sum of (G_id - G_jd)^2 is at most `limit`. First the
distance comes from |G_i|^2 + |G_j|^2 - 2 <G_i, G_j>; a tile with a pair that this leaves within its
rounding error of the limit takes that sum of differences.

Sizes in the floors below: P = 4096 patches (512 x 512, B = 1) of D = 192 values, P^2 D = 3.2 G
multiply-adds. The patches are 3 MB each way, so nothing here is bound by memory.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from mghf_fast.backends import can_run_triton
from mghf_fast.kernels.launch import blocks, on_device_of
from mghf_fast.ops.limits import temperature_too_low

# ---- patches as the products need them ----


# unit = S / max(|S|, floor), patch = G, both (padded patches, PADDED) with zeros in the padding;
# |S|, 1 / max(|G|, floor) and |G|^2 of every patch.
#
# Floor: 12.6 MB, 3 us.
@triton.jit
def pack_kernel(
    sr,
    gt,
    unit,
    patch,
    norm,
    inverse,
    squared,
    patches,
    sr_patch,
    sr_value,
    gt_patch,
    gt_value,
    norm_floor,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    is_row = row < patches
    s_squared = tl.zeros([BLOCK_P], tl.float32)
    g_squared = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, PADDED, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = is_row[:, None] & (k < DEPTH)[None, :]
        place = k.to(tl.int64)[None, :]
        s = tl.load(sr + row[:, None] * sr_patch + place * sr_value, mask=mask, other=0.0)
        g = tl.load(gt + row[:, None] * gt_patch + place * gt_value, mask=mask, other=0.0)
        s = s.to(tl.float32)
        g = g.to(tl.float32)
        s_squared += tl.sum(s * s, 1)
        g_squared += tl.sum(g * g, 1)
    s_norm = tl.sqrt_rn(s_squared)
    g_norm = tl.sqrt_rn(g_squared)
    # Comparisons, which let a NaN be one.
    s_floored = tl.where(s_norm < norm_floor, norm_floor, s_norm)
    g_floored = tl.where(g_norm < norm_floor, norm_floor, g_norm)
    tl.store(norm + row, s_norm)
    tl.store(inverse + row, tl.where(is_row, 1 / g_floored, 0.0))
    tl.store(squared + row, g_squared)
    for first in range(0, PADDED, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = is_row[:, None] & (k < DEPTH)[None, :]
        place = k.to(tl.int64)[None, :]
        s = tl.load(sr + row[:, None] * sr_patch + place * sr_value, mask=mask, other=0.0)
        g = tl.load(gt + row[:, None] * gt_patch + place * gt_value, mask=mask, other=0.0)
        target = row[:, None] * PADDED + place
        tl.store(unit + target, s.to(tl.float32) / s_floored[:, None])
        tl.store(patch + target, g.to(tl.float32))


# ---- blocks of pairs ----


@triton.jit
def _product(
    rows,
    columns,
    i,
    j,
    PADDED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """<rows_i, columns_j>."""
    total = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    a_place = i.to(tl.int64)[:, None] * PADDED
    b_place = j.to(tl.int64)[None, :] * PADDED
    for first in range(0, PADDED, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(rows + a_place + k[None, :])
        b = tl.load(columns + b_place + k[:, None])
        total = tl.dot(a, b, total, input_precision="tf32x3")
    return total


@triton.jit
def _positives(
    patch,
    squared,
    values,
    i,
    j,
    patches,
    padded_patches,
    limit,
    positive_below,
    negative_above,
    margin,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Which pairs are positive, and which are pairs at all. `values`: GT values (D, P)."""
    is_pair = (i < patches)[:, None] & (j < patches)[None, :]
    same = i[:, None] == j[None, :]
    total = tl.load(squared + i)[:, None] + tl.load(squared + j)[None, :]
    distance = total - 2 * _product(patch, patch, i, j, PADDED, BLOCK_I, BLOCK_J, BLOCK_K)
    error = margin * total
    positive = distance + error < positive_below
    negative = distance - error > negative_above
    undecided = is_pair & ((positive | negative | same) == 0)
    if tl.max(tl.max(undecided.to(tl.int32), 1), 0) > 0:
        exact = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
        values_i, values_j = values + i, values + j
        for _ in range(0, DEPTH):
            difference = tl.load(values_i)[:, None] - tl.load(values_j)[None, :]
            exact += difference * difference
            values_i += padded_patches
            values_j += padded_patches
        positive = tl.where(undecided, exact <= limit, positive)
    return positive | same, is_pair


# ---- forward ----


# Qpos_i and Qneg_i of a run of columns (for the temperature outside, without its 1 / t), and
# whether there are negatives.
#
# Floor: 3 P^2 D multiply-adds, three TF32 products each: 145 us at 400 TFLOP/s; 2 P^2 exponentials.
# A sum of differences of every tile would take 3.2 G multiply-adds more: 107 us at 60 TFLOP/s.
@triton.jit
def forward_kernel(
    unit,
    patch,
    values,
    inverse,
    squared,
    partial,
    any_negative,
    patches,
    padded_patches,
    run,
    positive_exponent,
    negative_exponent,
    limit,
    positive_below,
    negative_above,
    margin,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    inverse_i = tl.load(inverse + i)[:, None]
    positives = tl.zeros([BLOCK_I], tl.float32)
    negatives = tl.zeros([BLOCK_I], tl.float32)
    some = tl.zeros([BLOCK_I], tl.int32)
    begin = tl.program_id(1) * run
    for first in range(begin, tl.minimum(begin + run, padded_patches), BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        positive, is_pair = _positives(
            patch,
            squared,
            values,
            i,
            j,
            patches,
            padded_patches,
            limit,
            positive_below,
            negative_above,
            margin,
            DEPTH,
            PADDED,
            BLOCK_I,
            BLOCK_J,
            BLOCK_K,
        )
        exponent = tl.where(positive, positive_exponent, negative_exponent)
        own = _product(unit, unit, i, j, PADDED, BLOCK_I, BLOCK_J, BLOCK_K)
        cross = _product(patch, unit, i, j, PADDED, BLOCK_I, BLOCK_J, BLOCK_K)
        q = tl.exp2(own * exponent) + 2 * tl.exp2((cross * inverse_i) * exponent)
        is_negative = is_pair & (positive == 0)
        positives += tl.sum(tl.where(is_pair & positive, q, 0.0), 1)
        negatives += tl.sum(tl.where(is_negative, q, 0.0), 1)
        some = tl.maximum(some, tl.max(is_negative.to(tl.int32), 1))
    place = 2 * split * padded_patches + i
    tl.store(partial + place, positives)
    tl.store(partial + place + padded_patches, negatives)
    tl.store(any_negative + split * padded_patches + i, some)


# ---- backward ----


# With f_i = c / (t Qpos_i) for a positive pair and -c / (t Qneg_i) for a negative one,
#   d loss / d s_i = sum_j (f_i + f_j) E(<s_i, s_j>) s_j + 2 f_j E(<g_j, s_i>) g_j
# of a run of columns, for BLOCK_D values of the patches.
#
# Floor: 5 P^2 D multiply-adds, three TF32 products each: 242 us; 2 P^2 exponentials.
@triton.jit
def backward_kernel(
    unit,
    patch,
    values,
    inverse,
    squared,
    positive_factor,
    negative_factor,
    partial,
    patches,
    padded_patches,
    run,
    positive_exponent,
    negative_exponent,
    limit,
    positive_below,
    negative_above,
    margin,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_d = d < PADDED
    positive_i = tl.load(positive_factor + i)[:, None]
    negative_i = tl.load(negative_factor + i)[:, None]
    total = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    begin = tl.program_id(1) * run
    for first in range(begin, tl.minimum(begin + run, padded_patches), BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        positive, is_pair = _positives(
            patch,
            squared,
            values,
            i,
            j,
            patches,
            padded_patches,
            limit,
            positive_below,
            negative_above,
            margin,
            DEPTH,
            PADDED,
            BLOCK_I,
            BLOCK_J,
            BLOCK_K,
        )
        exponent = tl.where(positive, positive_exponent, negative_exponent)
        factor_i = tl.where(positive, positive_i, negative_i)
        positive_j = tl.load(positive_factor + j)[None, :]
        negative_j = tl.load(negative_factor + j)[None, :]
        factor_j = tl.where(positive, positive_j, negative_j)
        place = j.to(tl.int64)[:, None] * PADDED + d[None, :]
        own = _product(unit, unit, i, j, PADDED, BLOCK_I, BLOCK_J, BLOCK_K)
        own = tl.where(is_pair, tl.exp2(own * exponent) * (factor_i + factor_j), 0.0)
        s_j = tl.load(unit + place, mask=is_d[None, :], other=0.0)
        total = tl.dot(own, s_j, total, input_precision="tf32x3")
        inverse_j = tl.load(inverse + j)[None, :]
        cross = _product(unit, patch, i, j, PADDED, BLOCK_I, BLOCK_J, BLOCK_K)
        cross = tl.exp2((cross * inverse_j) * exponent) * (factor_j * (2 * inverse_j))
        g_j = tl.load(patch + place, mask=is_d[None, :], other=0.0)
        total = tl.dot(tl.where(is_pair, cross, 0.0), g_j, total, input_precision="tf32x3")
    place = (split * padded_patches + i)[:, None] * PADDED + d[None, :]
    tl.store(partial + place, total, mask=is_d[None, :])


# dS = (ds - s <s, ds>) / max(|S|, floor), ds being the sum of the runs. Below the floor a patch is
# divided by a constant and nothing is projected out.
#
# Floor: reads the runs (8 of 3 MB) and s, writes dS: 7 us.
@triton.jit
def project_kernel(
    partial,
    unit,
    norm,
    grad_sr,
    patches,
    padded_patches,
    splits,
    norm_floor,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    is_row = row < patches
    mask = is_row[:, None] & (d < DEPTH)[None, :]
    place = row[:, None] * PADDED + d[None, :]
    grad = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    run = partial + place
    for _ in range(0, splits):
        grad += tl.load(run, mask=mask, other=0.0)
        run += padded_patches * PADDED
    s = tl.load(unit + place, mask=mask, other=0.0)
    length = tl.load(norm + row, mask=is_row, other=0.0)
    floored = tl.where(length < norm_floor, norm_floor, length)
    along = tl.where(floored > norm_floor, tl.sum(s * grad, 1), 0.0)
    result = (grad - s * along[:, None]) / floored[:, None]
    target = grad_sr + row[:, None] * DEPTH + d[None, :]
    tl.store(target, result.to(grad_sr.dtype.element_ty), mask=mask)


# ---- the ends ----


# Of every row the sums over its runs, and log(positive / negative), in float64.
#
# Floor: reads what was just written, 12 splits P bytes, 6 MB at most: 2 us.
@triton.jit
def row_kernel(
    partial,
    any_negative,
    statistics,
    ratios,
    patches,
    padded_patches,
    splits,
    offset,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < patches
    positive = tl.zeros([BLOCK], tl.float64)
    negative = tl.zeros([BLOCK], tl.float64)
    found = tl.zeros([BLOCK], tl.int32)
    sums = partial + row
    flags = any_negative + row
    for _ in range(0, splits):
        positive += tl.load(sums, mask=inside, other=1).to(tl.float64)
        negative += tl.load(sums + padded_patches, mask=inside, other=1).to(tl.float64)
        found |= tl.load(flags, mask=inside, other=0)
        sums += 2 * padded_patches
        flags += padded_patches
    # A row without negatives counts for nothing, but a NaN in it is a NaN in the loss.
    ratio = tl.log(positive)
    ratio = tl.where(found > 0, ratio - tl.log(negative) + offset, 0 * ratio)
    negative = tl.where(found > 0, negative, -1.0)
    tl.store(ratios + row, ratio, mask=inside)
    tl.store(statistics + row, positive.to(tl.float32), mask=inside)
    tl.store(statistics + patches + row, negative.to(tl.float32), mask=inside)


@triton.jit
def _rows_with_negatives(statistics, patches, BLOCK: tl.constexpr):
    """Their number, at least 1."""
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, patches, BLOCK):
        row = first + tl.arange(0, BLOCK)
        negative = tl.load(statistics + patches + row, mask=row < patches, other=-1)
        count += (negative != -1).to(tl.int32)
    return tl.maximum(tl.sum(count, axis=0), 1)


# The loss, by one program: the order of the sum is fixed.
#
# Floor: 12 P bytes, by one multiprocessor: 98 KB for 8192 patches, 2 us or so of latencies.
@triton.jit
def loss_kernel(ratios, statistics, loss, patches, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, patches, BLOCK):
        row = first + tl.arange(0, BLOCK)
        total += tl.load(ratios + row, mask=row < patches, other=0)
    mean = tl.sum(total, axis=0) / _rows_with_negatives(statistics, patches, BLOCK)
    tl.store(loss, -mean.to(tl.float32))


# What a row's positives and negatives are multiplied by in the gradient; 0 in the padding. Every
# program counts all rows with negatives, 4 P bytes from the caches: 1 us.
@triton.jit
def factor_kernel(
    grad,
    statistics,
    factors,
    positive_scale,
    negative_scale,
    patches,
    padded_patches,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < patches
    positive = tl.load(statistics + row, mask=inside, other=1)
    negative = tl.load(statistics + patches + row, mask=inside, other=-1)
    scale = -tl.load(grad).to(tl.float32) / _rows_with_negatives(statistics, patches, BLOCK)
    scale = tl.where(negative != -1, scale, 0.0)
    known = row < padded_patches
    tl.store(factors + row, scale * positive_scale / positive, mask=known)
    tl.store(factors + padded_patches + row, -scale * negative_scale / negative, mask=known)


# ---- options ----


@functools.cache
def _largest_positive(threshold_db: float, rmse: bool, max_value: float, depth: int) -> float:
    """The largest float32 squared distance whose pair is positive by the reference's formula, which
    is evaluated in float32 step by step; below 0 if even a distance of 0 is not."""
    threshold, peak = np.float32(threshold_db), np.float32(max_value)
    divisor = np.float32(math.sqrt(depth) if rmse else 1)

    def positive(bits: int) -> bool:
        with np.errstate(all="ignore"):
            distance = np.sqrt(np.uint32(bits).view(np.float32)) / divisor
            return bool(np.float32(-20) * np.log10(distance / peak) >= threshold)

    yes, no = 0, 0x7F800000  # infinity's bits
    if not positive(yes):
        return -1.0
    while no - yes > 1:  # the bits of numbers of one sign are in the order of the numbers
        middle = (yes + no) // 2
        yes, no = (middle, no) if positive(middle) else (yes, middle)
    return float(np.uint32(yes).view(np.float32))


def _float32(x: float) -> float:
    """Infinity for what float32 has not: launches refuse such numbers."""
    return math.copysign(math.inf, x) if abs(x) > torch.finfo(torch.float32).max else x


@dataclass(frozen=True)
class _Options:
    threshold_db: float
    positive_temperature: float
    negative_temperature: float
    temperature: str
    similarity: str
    max_value: float
    norm_floor: float

    @property
    def inside(self) -> bool:
        return self.temperature == "inside"

    def exponents(self) -> tuple[float, float]:
        """Factors of a cosine in a power of 2. Bounded, so that they stay finite; e^1e30 and
        e^-1e30 are infinity and 0 all the same."""
        temperatures = (self.positive_temperature, self.negative_temperature)
        positive, negative = (
            min(math.log2(math.e) / (t if self.inside else 1), 1e30) for t in temperatures
        )
        return positive, negative

    def limits(self, depth: int) -> tuple[float, float, float, float]:
        """limit, positive_below, negative_above, margin."""
        limit = _largest_positive(
            self.threshold_db, self.similarity == "rmse", self.max_value, depth
        )
        roundoff = 2.0**-24
        # The sum of differences is within (D + 4) roundoffs of the exact distance (twice that, for
        # the roundings here), and may lose squares below float32's normal range altogether.
        own = 2 * (depth + 4) * roundoff
        tiny = depth * 1e-37
        # tf32x3 leaves out products below 2^-20 of the whole ones, and tensor cores truncate where
        # they add; |G_i|^2 + |G_j|^2 bounds 2 <G_i, G_j> and all that adds up to it.
        margin = 5 * (depth + 32) * roundoff
        below = _float32(limit * (1 - own) - tiny)
        above = _float32(limit * (1 + own) + tiny)
        if own >= 0.25 or margin >= 0.25 or above == math.inf:  # nothing can be said without
            return limit, -math.inf, math.inf, margin
        return limit, below, above, margin


# ---- block sizes ----

FORWARD_BLOCKS = {"BLOCK_I": 64, "BLOCK_J": 64, "BLOCK_K": 16}
BACKWARD_BLOCKS = {"BLOCK_I": 32, "BLOCK_J": 16, "BLOCK_K": 16}
PACK = {"num_warps": 4, "num_stages": 2}
FORWARD = {"num_warps": 8, "num_stages": 3}
BACKWARD = {"num_warps": 8, "num_stages": 2}
PROJECT = {"num_warps": 4, "num_stages": 2}
ROWS = {"BLOCK": 128, "num_warps": 4, "num_stages": 2}
ALL_ROWS = {"BLOCK": 1024, "num_warps": 4, "num_stages": 2}

_MULTIPLE = 64  # of patches, after padding: of every BLOCK_I and BLOCK_J
_PROGRAMS = 512  # in a grid: enough to fill a GPU


def _padded_depth(depth: int) -> int:
    return blocks(depth, 32) * 32


def _depth_constants(depth: int) -> dict[str, Any]:
    return {"DEPTH": depth, "PADDED": _padded_depth(depth)}


def _pack_constants(depth: int) -> dict[str, Any]:
    return _depth_constants(depth) | {"BLOCK_P": 16, "BLOCK_K": 32}


def _forward_constants(depth: int) -> dict[str, Any]:
    return _depth_constants(depth) | FORWARD_BLOCKS


def _backward_constants(depth: int) -> dict[str, Any]:
    block = min(int(triton.next_power_of_2(_padded_depth(depth))), 256)
    return _depth_constants(depth) | BACKWARD_BLOCKS | {"BLOCK_D": block}


def _project_constants(depth: int) -> dict[str, Any]:
    block = max(16, int(triton.next_power_of_2(depth)))
    return _depth_constants(depth) | {"BLOCK_P": max(1, min(16, 4096 // block)), "BLOCK_D": block}


def _runs(padded_patches: int, block_i: int, block_j: int) -> tuple[int, int]:
    """Columns of a run, and the number of runs."""
    tiles = blocks(padded_patches, block_j)
    splits = max(1, min(tiles, _PROGRAMS // blocks(padded_patches, block_i)))
    run = blocks(tiles, splits)
    return run * block_j, blocks(tiles, run)


# ---- launches ----


class _Packed:
    """The patches as the products need them."""

    def __init__(self, sr: Tensor, gt: Tensor, norm_floor: float) -> None:
        self.patches, self.depth = sr.shape
        self.padded_patches = blocks(self.patches, _MULTIPLE) * _MULTIPLE
        constants = _pack_constants(self.depth)
        shape = (self.padded_patches, constants["PADDED"])
        self.unit = sr.new_empty(shape, dtype=torch.float32)
        self.patch = torch.empty_like(self.unit)
        vectors = sr.new_empty((3, self.padded_patches), dtype=torch.float32)
        self.norm, self.inverse, self.squared = vectors
        pack_kernel[(blocks(self.padded_patches, constants["BLOCK_P"]),)](
            sr,
            gt,
            self.unit,
            self.patch,
            self.norm,
            self.inverse,
            self.squared,
            self.patches,
            *sr.stride(),
            *gt.stride(),
            norm_floor,
            **constants,
            **PACK,
        )
        self.values = self.patch.t().contiguous()


def forward(
    sr: Tensor,
    gt: Tensor,
    threshold_db: float,
    positive_temperature: float,
    negative_temperature: float,
    temperature: str,
    similarity: str,
    max_value: float,
    norm_floor: float,
) -> tuple[Tensor, Tensor]:
    """The loss, and of every row the sum of exp(cos(S_i, S_j)/t) + 2 exp(cos(G_i, S_j)/t) over its
    positives and over its negatives, (2, P), the latter -1 where there are none. For the
    temperature outside, exp(cos) stands for exp(cos/t)."""
    temperatures = (positive_temperature, negative_temperature, temperature)
    o = _Options(threshold_db, *temperatures, similarity, max_value, norm_floor)
    if sr.numel() == 0:
        return sr.new_zeros((), dtype=torch.float32), sr.new_zeros(
            (2, sr.shape[0]), dtype=torch.float32
        )
    with on_device_of(sr):
        p = _Packed(sr, gt, o.norm_floor)
        constants = _forward_constants(p.depth)
        run, splits = _runs(p.padded_patches, constants["BLOCK_I"], constants["BLOCK_J"])
        partial = p.unit.new_empty((splits, 2, p.padded_patches))
        any_negative = p.unit.new_empty((splits, p.padded_patches), dtype=torch.int32)
        forward_kernel[(blocks(p.padded_patches, constants["BLOCK_I"]), splits)](
            p.unit,
            p.patch,
            p.values,
            p.inverse,
            p.squared,
            partial,
            any_negative,
            p.patches,
            p.padded_patches,
            run,
            *o.exponents(),
            *o.limits(p.depth),
            **constants,
            **FORWARD,
        )
        # 1 / t outside the exponentials
        offset = 0.0 if o.inside else math.log(o.negative_temperature / o.positive_temperature)
        loss = p.unit.new_empty(())
        statistics = p.unit.new_empty((2, p.patches))
        ratios = p.unit.new_empty(p.patches, dtype=torch.float64)
        row_kernel[(blocks(p.patches, ROWS["BLOCK"]),)](
            partial,
            any_negative,
            statistics,
            ratios,
            p.patches,
            p.padded_patches,
            splits,
            offset,
            **ROWS,
        )
        loss_kernel[(1,)](ratios, statistics, loss, p.patches, **ALL_ROWS)
    return loss, statistics


def backward(
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
) -> Tensor:
    """The gradient of sr, contiguous."""
    temperatures = (positive_temperature, negative_temperature, temperature)
    o = _Options(threshold_db, *temperatures, similarity, max_value, norm_floor)
    grad_sr = torch.empty_like(sr, memory_format=torch.contiguous_format)
    if sr.numel() == 0:
        return grad_sr
    with on_device_of(sr):
        p = _Packed(sr, gt, o.norm_floor)
        factors = p.unit.new_empty((2, p.padded_patches))
        factor_kernel[(blocks(p.padded_patches, ALL_ROWS["BLOCK"]),)](
            grad,
            statistics.contiguous(),
            factors,
            1 / o.positive_temperature if o.inside else 1.0,
            1 / o.negative_temperature if o.inside else 1.0,
            p.patches,
            p.padded_patches,
            **ALL_ROWS,
        )
        constants = _backward_constants(p.depth)
        run, splits = _runs(p.padded_patches, constants["BLOCK_I"], constants["BLOCK_J"])
        partial = p.unit.new_empty((splits, *p.unit.shape))
        grid = (
            blocks(p.padded_patches, constants["BLOCK_I"]),
            splits,
            blocks(constants["PADDED"], constants["BLOCK_D"]),
        )
        backward_kernel[grid](
            p.unit,
            p.patch,
            p.values,
            p.inverse,
            p.squared,
            factors[0],
            factors[1],
            partial,
            p.patches,
            p.padded_patches,
            run,
            *o.exponents(),
            *o.limits(p.depth),
            **constants,
            **BACKWARD,
        )
        constants = _project_constants(p.depth)
        project_kernel[(blocks(p.patches, constants["BLOCK_P"]),)](
            partial,
            p.unit,
            p.norm,
            grad_sr,
            p.patches,
            p.padded_patches,
            splits,
            o.norm_floor,
            **constants,
            **PROJECT,
        )
    return grad_sr


def can_run(
    *tensors: Tensor, temperatures: tuple[float, float, str] = (1, 1, ""), **options: Any
) -> str | None:
    return temperature_too_low(temperatures) or can_run_triton(*tensors)
