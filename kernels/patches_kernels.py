"""Triton kernels of the strided patch projection and of its gradients; patches.py describes what
they have in common.

Sizes in the floors below: B = 1, C = 128 maps of 512 x 512, N = 441 patches of K = 1024 pixels, 128
hidden units, D = 64, so R = 56,448 rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mghf_fast.kernels.products import dot

NORM_FLOOR = tl.constexpr(1e-7)
TINY = tl.constexpr(1.1754943508222875e-38)  # float32's smallest normal number

# ---- rows: pairs of an item (a patch or a cell of the image) and a map ----


@triton.jit
def _item_and_map(row, maps, items, MAPS_FASTEST: tl.constexpr):
    if MAPS_FASTEST:
        item = row // maps
        map_ = row % maps
    else:
        item = row % items
        map_ = row // items
    return item, map_


@triton.jit
def _row_of(item, map_, maps, items, MAPS_FASTEST: tl.constexpr):
    return item * maps + map_ if MAPS_FASTEST else map_ * items + item


@triton.jit
def _first_pixel(
    item,
    map_,
    channels,
    item_columns,
    x_batch,
    x_channel,
    x_row,
    x_column,
    STRIDE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Offset of an item's first pixel in the image."""
    place = (
        (map_ // channels) * x_batch
        + (map_ % channels) * x_channel
        + (item // item_columns) * STRIDE * x_row
        + (item % item_columns) * STRIDE * x_column
    )
    if VECTOR > 1:
        place = tl.max_contiguous(tl.multiple_of(place, VECTOR), VECTOR)
    return place


# ---- forward ----


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a matrix."""
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def _add_second_layer(
    y,
    h,
    weight2,
    d,
    first_unit,
    HIDDEN: tl.constexpr,
    DIMENSION: tl.constexpr,
    UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y + W2 h for a run of hidden units."""
    unit = first_unit + tl.arange(0, UNITS)
    w2 = tl.load(
        weight2 + d[None, :] * HIDDEN + unit[:, None],
        mask=(d < DIMENSION)[None, :] & (unit < HIDDEN)[:, None],
        other=0.0,
    )
    return dot(h, w2, y, PRECISION)


# h = relu(W1 patch + b1),  y = W2 h + b2,  embedding = y / (|y| + 1e-7)
#
# One program takes BLOCK_M rows through both layers: a product over the patch's pixels for BLOCK_H
# hidden units at a time, whose sign bits go to the state, then their share of y.
#
# Floor: reads x (134 MB, 31 us at 4.3 TB/s) and writes 15.6 MB (4 us). R 128 (1024 + 64) = 7.86 G
# multiply-adds, three TF32 products each: 118 us at 400 TFLOP/s.
@triton.jit
def forward_kernel(
    x,
    weight1,
    bias1,
    weight2,
    bias2,
    embedding,
    state,
    hidden,
    rows,
    maps,
    channels,
    patches,
    patch_columns,
    x_batch,
    x_channel,
    x_row,
    x_column,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    DIMENSION: tl.constexpr,
    MAPS_FASTEST: tl.constexpr,
    VECTOR: tl.constexpr,
    KEEP_HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    PIXELS: tl.constexpr = PATCH * PATCH
    WORDS: tl.constexpr = (HIDDEN + 31) // 32
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < rows
    patch, map_ = _item_and_map(row, maps, patches, MAPS_FASTEST)
    first_pixel = _first_pixel(
        patch,
        map_,
        channels,
        patch_columns,
        x_batch,
        x_channel,
        x_row,
        x_column,
        STRIDE,
        VECTOR,
    )
    patch_state = state + patch * (1 + WORDS) * maps + map_

    d = tl.arange(0, BLOCK_D)
    y = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first_unit in range(0, HIDDEN, BLOCK_H):
        unit = first_unit + tl.arange(0, BLOCK_H)
        is_unit = unit < HIDDEN
        h = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        for first in range(0, PIXELS, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            is_pixel = k < PIXELS
            pixel = (k // PATCH).to(tl.int64) * x_row + (k % PATCH).to(tl.int64) * x_column
            a = tl.load(
                x + first_pixel[:, None] + pixel[None, :],
                mask=is_row[:, None] & is_pixel[None, :],
                other=0.0,
            ).to(tl.float32)
            b = tl.load(
                weight1 + unit[None, :] * PIXELS + k[:, None],
                mask=is_unit[None, :] & is_pixel[:, None],
                other=0.0,
            )
            h = dot(a, b, h, PRECISION)
        h += tl.load(bias1 + unit, mask=is_unit, other=0.0)[None, :]

        bits = tl.reshape((h > 0).to(tl.int32), [BLOCK_M, BLOCK_H // 32, 32])
        words = tl.sum(bits << tl.arange(0, 32)[None, None, :], 2)
        word = first_unit // 32 + tl.arange(0, BLOCK_H // 32)
        tl.store(
            patch_state[:, None] + (1 + word).to(tl.int64)[None, :] * maps,
            words,
            mask=is_row[:, None] & (word < WORDS)[None, :],
        )

        # A NaN must stay one, except in padded columns, where 0 times infinity gives one.
        h = tl.where((h < 0) | (unit >= HIDDEN)[None, :], 0.0, h)
        if KEEP_HIDDEN:
            tl.store(
                hidden + row[:, None] * HIDDEN + unit[None, :],
                h,
                mask=is_row[:, None] & is_unit[None, :],
            )
        # In parts, because a product's left factor is in registers.
        if BLOCK_H == 128:
            left, right = _halves(h, BLOCK_M, 128)
            h0, h1 = _halves(left, BLOCK_M, 64)
            h2, h3 = _halves(right, BLOCK_M, 64)
            y = _add_second_layer(y, h0, weight2, d, first_unit, HIDDEN, DIMENSION, 32, PRECISION)
            y = _add_second_layer(
                y, h1, weight2, d, first_unit + 32, HIDDEN, DIMENSION, 32, PRECISION
            )
            y = _add_second_layer(
                y, h2, weight2, d, first_unit + 64, HIDDEN, DIMENSION, 32, PRECISION
            )
            y = _add_second_layer(
                y, h3, weight2, d, first_unit + 96, HIDDEN, DIMENSION, 32, PRECISION
            )
        else:
            y = _add_second_layer(
                y, h, weight2, d, first_unit, HIDDEN, DIMENSION, BLOCK_H, PRECISION
            )

    is_d = d < DIMENSION
    y = tl.where(is_d[None, :], y + tl.load(bias2 + d, mask=is_d, other=0.0)[None, :], 0.0)
    norm = tl.sqrt_rn(tl.sum(y * y, 1))
    tl.store(patch_state, norm.to(tl.int32, bitcast=True), mask=is_row)
    place = (map_ * patches + patch) * DIMENSION
    tl.store(
        embedding + place[:, None] + d[None, :],
        y / (norm + NORM_FLOOR)[:, None],
        mask=is_row[:, None] & is_d[None, :],
    )


# ---- gradient before the ReLU ----


# With the embedding e:
#   d_y = (d_e - e <d_e, e> (1 + 1e-7 / |y|)) / (|y| + 1e-7),   d_h = (W2^T d_y) [h > 0]
#
# Floor: reads d_e, e and the state and writes d_h, 59 MB (14 us). R 64 128 = 0.46 G multiply-adds,
# three products of bfloat16 each: 4 us.
@triton.jit
def hidden_gradient_kernel(
    grad,
    embedding,
    state,
    weight1,
    weight2,
    transposed,
    grad_hidden,
    grad_output,
    rows,
    maps,
    patches,
    state_patch,
    state_word,
    grad_map,
    grad_patch,
    grad_dimension,
    PIXELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    DIMENSION: tl.constexpr,
    MAPS_FASTEST: tl.constexpr,
    KEEP_OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_WEIGHTS: tl.constexpr,
):
    # All programs together transpose W1 for the next kernel, which reads vectors of hidden units.
    first_weight = tl.program_id(0) * BLOCK_WEIGHTS
    for start in range(first_weight, PIXELS * HIDDEN, tl.num_programs(0) * BLOCK_WEIGHTS):
        to = start + tl.arange(0, BLOCK_WEIGHTS)
        w1 = tl.load(
            weight1 + to % HIDDEN * PIXELS + to // HIDDEN, mask=to < PIXELS * HIDDEN, other=0.0
        )
        tl.store(transposed + to, w1.to(tl.float32), mask=to < PIXELS * HIDDEN)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < rows
    patch, map_ = _item_and_map(row, maps, patches, MAPS_FASTEST)
    # The state may be that of some of the maps, a slice.
    patch_state = state + patch * state_patch + map_

    d = tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (d < DIMENSION)[None, :]
    e_place = (map_ * patches + patch) * DIMENSION
    g_place = map_ * grad_map + patch * grad_patch
    e = tl.load(embedding + e_place[:, None] + d[None, :], mask=mask, other=0.0)
    g = tl.load(
        grad + g_place[:, None] + d.to(tl.int64)[None, :] * grad_dimension, mask=mask, other=0.0
    ).to(tl.float32)
    norm = tl.load(patch_state, mask=is_row, other=0).to(tl.float32, bitcast=True)
    # At y = 0 the embedding is 0 as well; the smallest normal number only prevents 0/0.
    least = tl.where(norm < TINY, TINY, norm)
    along = tl.sum(g * e, 1) * ((least + NORM_FLOOR) / least)
    grad_y = (g - e * along[:, None]) / (norm + NORM_FLOOR)[:, None]
    if KEEP_OUTPUT:
        tl.store(grad_output + row[:, None] * DIMENSION + d[None, :], grad_y, mask=mask)

    for first_unit in range(0, HIDDEN, BLOCK_H):
        unit = first_unit + tl.arange(0, BLOCK_H)
        is_unit = unit < HIDDEN
        w2 = tl.load(
            weight2 + d[:, None] * HIDDEN + unit[None, :],
            mask=(d < DIMENSION)[:, None] & is_unit[None, :],
            other=0.0,
        )
        h = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        h = dot(grad_y, w2, h, PRECISION)
        word = tl.load(
            patch_state[:, None] + (1 + unit // 32).to(tl.int64)[None, :] * state_word,
            mask=is_row[:, None] & is_unit[None, :],
            other=0,
        )
        # A product and not a selection: a NaN must stay one.
        h *= ((word >> (unit % 32)[None, :]) & 1).to(tl.float32)
        tl.store(
            grad_hidden + row[:, None] * HIDDEN + unit[None, :],
            h,
            mask=is_row[:, None] & is_unit[None, :],
        )


# ---- gradient of the image ----


# The image consists of cells of STRIDE x STRIDE pixels. Pixel (r, p) of cell (i, j) is pixel
# (r + s STRIDE, p + t STRIDE) of patch (i - s, j - t), for all s, t that stay within the patch:
#   d_x = sum_st sum_h W1[h][r + s STRIDE][p + t STRIDE] d_h[i - s, j - t][h]
#
# A product for each s, t: rows are pairs of a cell and a map, columns are BLOCK_N pixels of the
# cell. Vertically TERMS patches cover a cell's first TOP rows of pixels, one less the other rows;
# likewise horizontally with its first LEFT columns. A tile's pixels are from one of these four
# regions, so no weights are padded with zeros (through which a NaN of another patch would get in).
# Every pixel is written once, or with ADD added to once.
#
# Floor: writes the gradient (134 MB, 31 us; ADD also reads it, 62 us) and reads d_h (29 MB, 7 us).
# R 128 1024 = 7.4 G multiply-adds, three products of bfloat16 each: 56 us at 790 TFLOP/s; for
# bfloat16 images one TF32 product each: 37 us.
@triton.jit
def image_gradient_kernel(
    grad_hidden,
    weight1,
    grad_x,
    rows,
    maps,
    channels,
    cells,
    cell_columns,
    patches,
    patch_rows,
    patch_columns,
    height,
    width,
    x_batch,
    x_channel,
    x_row,
    x_column,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    TERMS: tl.constexpr,
    CELL_HEIGHT: tl.constexpr,
    CELL_WIDTH: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    TOP_RIGHT: tl.constexpr,
    BOTTOM_LEFT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    TILES: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    MAPS_FASTEST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    STEPS: tl.constexpr = (HIDDEN + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    tile = program % TILES
    row = (program // TILES).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < rows
    cell, map_ = _item_and_map(row, maps, cells, MAPS_FASTEST)
    i = cell // cell_columns
    j = cell % cell_columns

    # The region of the tile, by its number: TOP_RIGHT and so on are the regions' first tiles.
    below = tile >= BOTTOM_LEFT
    right = ((tile >= TOP_RIGHT) & (tile < BOTTOM_LEFT)) | (tile >= BOTTOM_RIGHT)
    first_right = tl.where(below, BOTTOM_RIGHT, TOP_RIGHT)
    first_tile = tl.where(right, first_right, tl.where(below, BOTTOM_LEFT, 0))
    region_row = tl.where(below, TOP, 0)
    region_column = tl.where(right, LEFT, 0)
    region_rows = tl.where(below, CELL_HEIGHT - TOP, TOP)
    region_columns = tl.where(right, CELL_WIDTH - LEFT, LEFT)
    row_terms = tl.where(below, TERMS - 1, TERMS)
    column_terms = tl.where(right, TERMS - 1, TERMS)

    place = (tile - first_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_pixel = place < region_rows * region_columns
    r = region_row + place // region_columns
    p = region_column + place % region_columns

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, row_terms * column_terms * STEPS):
        h = (step % STEPS) * BLOCK_K + tl.arange(0, BLOCK_K)
        term = step // STEPS
        s = term // column_terms
        t = term % column_terms
        is_patch = is_row & (i >= s) & (i - s < patch_rows) & (j >= t) & (j - t < patch_columns)
        source = _row_of((i - s) * patch_columns + j - t, map_, maps, patches, MAPS_FASTEST)
        a = tl.load(
            grad_hidden + source[:, None] * HIDDEN + h[None, :],
            mask=is_patch[:, None] & (h < HIDDEN)[None, :],
            other=0.0,
        )
        pixel = (r + s * STRIDE) * PATCH + p + t * STRIDE
        b = tl.load(
            weight1 + pixel[None, :] * HIDDEN + h[:, None],
            mask=is_pixel[None, :] & (h < HIDDEN)[:, None],
            other=0.0,
        )
        total = dot(a, b, total, PRECISION)

    cell_place = _first_pixel(
        cell,
        map_,
        channels,
        cell_columns,
        x_batch,
        x_channel,
        x_row,
        x_column,
        STRIDE,
        VECTOR,
    )
    pixel_place = r.to(tl.int64) * x_row + p.to(tl.int64) * x_column
    target = grad_x + cell_place[:, None] + pixel_place[None, :]
    mask = (
        (is_row[:, None] & is_pixel[None, :])
        & ((i * STRIDE)[:, None] + r[None, :] < height)
        & ((j * STRIDE)[:, None] + p[None, :] < width)
    )
    if ADD:
        total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(grad_x.dtype.element_ty), mask=mask)


# ---- gradients of the weights ----


# d_W1 = sum over rows of d_h patch^T,  d_W2 = sum over rows of d_y h^T; the biases' are column
# sums.
#
# One program takes a tile of the result and one of SPLITS runs of rows; the runs are added in order
# afterwards. IMPLICIT: the right factor is the rows' patches in the image, not a matrix.
#
# Floor of d_W1: reads d_h and x, 163 MB (38 us). R 128 1024 = 7.4 G multiply-adds, three of
# bfloat16 each: 56 us. d_W2: reads 43 MB (10 us); 0.46 G multiply-adds, 4 us. The hidden layer is
# recomputed: the forward's floor once more.
@triton.jit
def outer_product_kernel(
    left,
    right,
    partial,
    rows,
    run,
    maps,
    channels,
    patches,
    patch_columns,
    x_batch,
    x_channel,
    x_row,
    x_column,
    M: tl.constexpr,
    N: tl.constexpr,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    IMPLICIT: tl.constexpr,
    PRECISION: tl.constexpr,
    MAPS_FASTEST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    if IMPLICIT:
        pixel = (n // PATCH).to(tl.int64) * x_row + (n % PATCH).to(tl.int64) * x_column
    begin = split * run
    end = tl.minimum(begin + run, rows)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(begin, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        is_row = row < end
        a = tl.load(
            left + row[None, :] * M + m[:, None],
            mask=is_row[None, :] & (m < M)[:, None],
            other=0.0,
        )
        mask = is_row[:, None] & (n < N)[None, :]
        if IMPLICIT:
            patch, map_ = _item_and_map(row, maps, patches, MAPS_FASTEST)
            first_pixel = _first_pixel(
                patch,
                map_,
                channels,
                patch_columns,
                x_batch,
                x_channel,
                x_row,
                x_column,
                STRIDE,
                VECTOR,
            )
            b = tl.load(right + first_pixel[:, None] + pixel[None, :], mask=mask, other=0.0)
        else:
            b = tl.load(right + row[:, None] * N + n[None, :], mask=mask, other=0.0)
        total = dot(a, b.to(tl.float32), total, PRECISION)
    place = (split * M + m)[:, None] * N + n[None, :]
    tl.store(partial + place, total, mask=(m < M)[:, None] & (n < N)[None, :])
