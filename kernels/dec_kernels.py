"""Triton kernels of DECLoss; the formulas and the two ways of computing distances are in dec.py.

Sizes in the floors below: P = 4096 patches (512 x 512, B = 1) of D = 192 values, P^2 D = 3.2 G
multiply-adds. The patches are 3 MB each way, so nothing here is bound by memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---- packing the patches for the products ----


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
    # Comparisons, because a NaN must stay one.
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
    """The products <rows_i, columns_j>."""
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
    """Masks of the positive pairs and of all pairs. `values`: GT values (D, P)."""
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


# Qpos_i and Qneg_i over a run of columns (without the 1 / t of a temperature outside), and whether
# there are negatives.
#
# Floor: 3 P^2 D multiply-adds, three TF32 products each: 145 us at 400 TFLOP/s; 2 P^2 exponentials.
# Sums of differences for every tile would take 3.2 G multiply-adds more: 107 us at 60 TFLOP/s.
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
# over a run of columns, for BLOCK_D values of the patches.
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


# dS = (ds - s <s, ds>) / max(|S|, floor), with ds the sum over the runs. A patch below the floor is
# divided by a constant, so nothing is projected out.
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


# ---- sums over rows, the loss and factors of the gradient ----


# Every row's sums over its runs, and log(positive / negative), in float64.
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
    # A row without negatives does not count, but a NaN in it makes the loss NaN.
    ratio = tl.log(positive)
    ratio = tl.where(found > 0, ratio - tl.log(negative) + offset, 0 * ratio)
    negative = tl.where(found > 0, negative, -1.0)
    tl.store(ratios + row, ratio, mask=inside)
    tl.store(statistics + row, positive.to(tl.float32), mask=inside)
    tl.store(statistics + patches + row, negative.to(tl.float32), mask=inside)


@triton.jit
def _rows_with_negatives(statistics, patches, BLOCK: tl.constexpr):
    """The number of rows with negatives, at least 1."""
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, patches, BLOCK):
        row = first + tl.arange(0, BLOCK)
        negative = tl.load(statistics + patches + row, mask=row < patches, other=-1)
        count += (negative != -1).to(tl.int32)
    return tl.maximum(tl.sum(count, axis=0), 1)


# The loss, by one program: the order of the sum is fixed.
#
# Floor: 12 P bytes, by one multiprocessor: 98 KB for 8192 patches, about 2 us of latencies.
@triton.jit
def loss_kernel(ratios, statistics, loss, patches, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, patches, BLOCK):
        row = first + tl.arange(0, BLOCK)
        total += tl.load(ratios + row, mask=row < patches, other=0)
    mean = tl.sum(total, axis=0) / _rows_with_negatives(statistics, patches, BLOCK)
    tl.store(loss, -mean.to(tl.float32))


# The factors of a row's positives and negatives in the gradient; 0 in the padding. Every program
# counts all rows with negatives, 4 P bytes from the caches: 1 us.
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
