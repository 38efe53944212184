"""Triton kernels of the gradient of the invertible block, and of the gradients of its weights; the
formulas, and the sizes to which the floors apply, are in coupling.py."""

from __future__ import annotations

import triton
import triton.language as tl

from mghf_fast.kernels.coupling_layers import (
    BAND,
    activated,
    depthwise,
    depthwise_transposed,
    kept,
    log_scale_of,
    matrix,
    offsets_of,
    pixel_of,
    product,
    reflected,
    slope,
    tile_of,
    within,
)

# ---- backward ----


# r recomputed; d_r = g1 z1 exp(r) (1 - (r / k)^2);  gr = A' Pr^T d_r,  ge = A' Pe^T g1;
# g1 exp(r), the direct part of d1.
# Floor: (hr, he), z1, g1 read, (gr, ge), g1 exp(r) written: 737 MB, 0.17 ms; 24,576 multiply-adds
# a pixel, 0.05 ms, and 3,456 of the depthwise layers (rho's twice), 0.03 ms.
@triton.jit(do_not_specialize=BAND)
def grad_hidden2_kernel(
    grad: tl.tensor,
    hidden2: tl.tensor,
    z: tl.tensor,
    rho_depthwise: tl.tensor,
    rho_project: tl.tensor,
    eta_depthwise: tl.tensor,
    eta_project: tl.tensor,
    grad2: tl.tensor,
    mixed: tl.tensor,
    depthwise2: tl.tensor,
    grad_rho: tl.tensor,
    grad_batch: tl.tensor,
    grad_channel: tl.tensor,
    grad_row: tl.tensor,
    grad_column: tl.tensor,
    tile: tl.tensor | None,
    first_image: tl.tensor,
    first_row: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    WITH_WEIGHTS: tl.constexpr,
    HALF: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    PADDED_HIDDEN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    image, down, column = tile_of(tile, rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (down < rows) & (column < width)
    pixel = pixel_of(image, down, column, rows, width)
    n = tl.arange(0, BLOCK_HALF)
    raw = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HALF), tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        d = depthwise(
            hidden2, rho_depthwise, image, down, column, m, first_row, rows, height, width,
            2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        w = matrix(rho_project, m, n, 1, HIDDEN, HIDDEN, HALF)
        raw = product(activated(d, ACTIVATION), w, raw, OPERAND, PRECISION)
    at_grad = offsets_of(
        first_image + image, first_row + down, column, n,
        grad_batch, grad_channel, grad_row, grad_column,
    )  # fmt: skip
    known = inside[:, None] & (n < HALF)[None, :]
    g1 = tl.load(grad + at_grad, mask=known, other=0.0).to(tl.float32)
    at_z1 = pixel[:, None] * (2 * BLOCK_HALF) + n[None, :]
    z1 = tl.load(z + at_z1, mask=inside[:, None], other=0.0).to(tl.float32)
    log_scale = log_scale_of(raw, CLAMP)
    scaled = g1 * tl.exp(log_scale)
    tl.store(mixed + at_z1, scaled, mask=inside[:, None])
    d_rho = scaled * z1
    if CLAMP > 0.0:
        d_rho *= 1.0 - (log_scale / CLAMP) * (log_scale / CLAMP)
    d_rho = kept(d_rho, n, HALF)
    if WITH_WEIGHTS:
        at_rho = grad_rho + pixel[:, None] * BLOCK_HALF + n[None, :]
        tl.store(at_rho, d_rho, mask=inside[:, None])
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        at = pixel[:, None] * (2 * PADDED_HIDDEN) + m[None, :]
        d = depthwise(
            hidden2, rho_depthwise, image, down, column, m, first_row, rows, height, width,
            2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        d = activated(d, ACTIVATION)
        if WITH_WEIGHTS:
            tl.store(depthwise2 + at, d, mask=inside[:, None])
        g = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = matrix(rho_project, n, m, HIDDEN, 1, HALF, HIDDEN)
        g = product(d_rho, w, g, OPERAND, PRECISION) * slope(d, ACTIVATION)
        tl.store(grad2 + at, kept(g, m, HIDDEN), mask=inside[:, None])
    # Read again, because keeping it would take registers.
    g1 = tl.load(grad + at_grad, mask=known, other=0.0).to(tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        at = pixel[:, None] * (2 * PADDED_HIDDEN) + (PADDED_HIDDEN + m)[None, :]
        d = depthwise(
            hidden2 + PADDED_HIDDEN, eta_depthwise, image, down, column, m, first_row, rows,
            height, width, 2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        d = activated(d, ACTIVATION)
        if WITH_WEIGHTS:
            tl.store(depthwise2 + at, d, mask=inside[:, None])
        g = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = matrix(eta_project, n, m, HIDDEN, 1, HALF, HIDDEN)
        g = product(g1, w, g, OPERAND, PRECISION) * slope(d, ACTIVATION)
        tl.store(grad2 + at, kept(g, m, HIDDEN), mask=inside[:, None])


# d2 = g2 + Er^T A' Dr^T gr + Ee^T A' De^T ge,  gp = A' Pp^T d2.
# Floor: (gr, ge), (hr, he), h, g2 read, d2 and gp written: 939 MB, 0.22 ms; 24,576 multiply-adds a
# pixel, 0.05 ms, and 3,456 of the depthwise layers, 0.03 ms.
@triton.jit(do_not_specialize=BAND)
def grad_z2_kernel(
    grad: tl.tensor,
    grad2: tl.tensor,
    hidden2: tl.tensor,
    hidden1: tl.tensor,
    rho_depthwise: tl.tensor,
    rho_expand: tl.tensor,
    eta_depthwise: tl.tensor,
    eta_expand: tl.tensor,
    phi_depthwise: tl.tensor,
    phi_project: tl.tensor,
    mixed: tl.tensor,
    grad1: tl.tensor,
    through2: tl.tensor,
    depthwise1: tl.tensor,
    grad_batch: tl.tensor,
    grad_channel: tl.tensor,
    grad_row: tl.tensor,
    grad_column: tl.tensor,
    tile: tl.tensor | None,
    first_image: tl.tensor,
    first_row: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    WITH_WEIGHTS: tl.constexpr,
    HALF: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    PADDED_HIDDEN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    image, down, column = tile_of(tile, rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (down < rows) & (column < width)
    pixel = pixel_of(image, down, column, rows, width)
    n = tl.arange(0, BLOCK_HALF)
    at_grad = offsets_of(
        first_image + image, first_row + down, column, HALF + n,
        grad_batch, grad_channel, grad_row, grad_column,
    )  # fmt: skip
    known = inside[:, None] & (n < HALF)[None, :]
    d2 = tl.load(grad + at_grad, mask=known, other=0.0).to(tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        at = pixel[:, None] * (2 * PADDED_HIDDEN) + m[None, :]
        t = depthwise_transposed(
            grad2, rho_depthwise, image, down, column, m, first_row, rows, height, width,
            2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        h = tl.load(hidden2 + at, mask=inside[:, None], other=0.0).to(tl.float32)
        t *= slope(h, ACTIVATION)
        if WITH_WEIGHTS:
            tl.store(through2 + at, t, mask=inside[:, None])
        w = matrix(rho_expand, m, n, HALF, 1, HIDDEN, HALF)
        d2 = product(t, w, d2, OPERAND, PRECISION)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        at = pixel[:, None] * (2 * PADDED_HIDDEN) + (PADDED_HIDDEN + m)[None, :]
        t = depthwise_transposed(
            grad2 + PADDED_HIDDEN, eta_depthwise, image, down, column, m, first_row, rows, height,
            width, 2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        h = tl.load(hidden2 + at, mask=inside[:, None], other=0.0).to(tl.float32)
        t *= slope(h, ACTIVATION)
        if WITH_WEIGHTS:
            tl.store(through2 + at, t, mask=inside[:, None])
        w = matrix(eta_expand, m, n, HALF, 1, HIDDEN, HALF)
        d2 = product(t, w, d2, OPERAND, PRECISION)
    d2 = kept(d2, n, HALF)
    at_d2 = pixel[:, None] * (2 * BLOCK_HALF) + (BLOCK_HALF + n)[None, :]
    tl.store(mixed + at_d2, d2, mask=inside[:, None])
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        at = pixel[:, None] * PADDED_HIDDEN + m[None, :]
        d = depthwise(
            hidden1, phi_depthwise, image, down, column, m, first_row, rows, height, width,
            PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        d = activated(d, ACTIVATION)
        if WITH_WEIGHTS:
            tl.store(depthwise1 + at, d, mask=inside[:, None])
        g = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = matrix(phi_project, n, m, HIDDEN, 1, HALF, HIDDEN)
        g = product(d2, w, g, OPERAND, PRECISION) * slope(d, ACTIVATION)
        tl.store(grad1 + at, kept(g, m, HIDDEN), mask=inside[:, None])


# d1 = g1 exp(r) + Ep^T A' Dp^T gp,  d_x = M^T (d1, d2). For a 3x3 mix this stores the products with
# all of its taps, which gather_kernel adds up.
# Floor: gp, h, d1's direct part and d2 read, d_x written: 536 MB, 0.12 ms; 24,576 multiply-adds a
# pixel, 0.05 ms, and 1,152 of the depthwise layer, 0.01 ms.
@triton.jit(do_not_specialize=BAND)
def grad_mixed_kernel(
    grad1: tl.tensor,
    hidden1: tl.tensor,
    phi_depthwise: tl.tensor,
    phi_expand: tl.tensor,
    mix: tl.tensor,
    mixed: tl.tensor,
    through1: tl.tensor,
    products: tl.tensor,
    grad_x: tl.tensor,
    x_batch: tl.tensor,
    x_channel: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    tile: tl.tensor | None,
    first_image: tl.tensor,
    first_row: tl.tensor,
    own_begin: tl.tensor,
    own_end: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    WITH_WEIGHTS: tl.constexpr,
    INPUTS: tl.constexpr,
    KERNEL: tl.constexpr,
    HALF: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    PADDED_HIDDEN: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    TERMS: tl.constexpr = INPUTS * KERNEL * KERNEL
    image, down, column = tile_of(tile, rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (down < rows) & (column < width)
    pixel = pixel_of(image, down, column, rows, width)
    n = tl.arange(0, BLOCK_HALF)
    at_d1 = mixed + pixel[:, None] * (2 * BLOCK_HALF) + n[None, :]
    d1 = tl.load(at_d1, mask=inside[:, None], other=0.0).to(tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        at = pixel[:, None] * PADDED_HIDDEN + m[None, :]
        t = depthwise_transposed(
            grad1, phi_depthwise, image, down, column, m, first_row, rows, height, width,
            PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        h = tl.load(hidden1 + at, mask=inside[:, None], other=0.0).to(tl.float32)
        t *= slope(h, ACTIVATION)
        if WITH_WEIGHTS:
            tl.store(through1 + at, t, mask=inside[:, None])
        w = matrix(phi_expand, m, n, HALF, 1, HIDDEN, HALF)
        d1 = product(t, w, d1, OPERAND, PRECISION)
    d1 = kept(d1, n, HALF)
    if WITH_WEIGHTS:
        tl.store(at_d1, d1, mask=inside[:, None])
    d2 = tl.load(at_d1 + BLOCK_HALF, mask=inside[:, None], other=0.0).to(tl.float32)
    row = first_row + down
    own = inside & (row >= own_begin) & (row < own_end)
    for start in range(0, TERMS, BLOCK_INPUTS):
        k = start + tl.arange(0, BLOCK_INPUTS)
        result = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_INPUTS), tl.float32)
        w = matrix(mix, n, k, TERMS, 1, HALF, TERMS)
        result = product(d1, w, result, OPERAND, PRECISION)
        w = matrix(mix + HALF * TERMS, n, k, TERMS, 1, HALF, TERMS)
        result = product(d2, w, result, OPERAND, PRECISION)
        if KERNEL == 1:
            at_x = offsets_of(
                first_image + image, row, column, k, x_batch, x_channel, x_row, x_column
            )
            tl.store(grad_x + at_x, result, mask=own[:, None] & (k < TERMS)[None, :])
        else:
            at = pixel[:, None] * TERMS + k[None, :]
            tl.store(products + at, result, mask=inside[:, None] & (k < TERMS)[None, :])


# d_x of a 3x3 mix: every pixel sums the products of its neighbours with the taps that reach it.
# Floor, 3 inputs: 27 products read and 3 results written a pixel, 31 MB, 0.01 ms.
@triton.jit(do_not_specialize=BAND)
def gather_kernel(
    products: tl.tensor,
    grad_x: tl.tensor,
    x_batch: tl.tensor,
    x_channel: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    tile: tl.tensor | None,
    first_image: tl.tensor,
    first_row: tl.tensor,
    own_begin: tl.tensor,
    own_end: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    INPUTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    image, down, column = tile_of(tile, rows, width, TILE_ROWS, TILE_COLUMNS)
    row = first_row + down
    own = (down < rows) & (column < width) & (row >= own_begin) & (row < own_end)
    for start in range(0, INPUTS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        known = own[:, None] & (channel < INPUTS)[None, :]
        total = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_CHANNELS), tl.float32)
        for tap in tl.static_range(9):
            to_row = row + (1 - tap // 3)
            to_column = column + (1 - tap % 3)
            valid = (to_row >= 0) & (to_row < height) & (to_column >= 0) & (to_column < width)
            pixel = pixel_of(image, to_row - first_row, to_column, rows, width)
            at = pixel[:, None] * (INPUTS * 9) + (channel * 9 + tap)[None, :]
            value = tl.load(products + at, mask=known & valid[:, None], other=0.0)
            total += value.to(tl.float32)
        at_x = offsets_of(
            first_image + image, row, column, channel, x_batch, x_channel, x_row, x_column
        )
        tl.store(grad_x + at_x, total, mask=known)


# ---- gradients of the weights ----


# partial[part] += sum over the part's pixels of a b^T, a and b [pixel][channel].
# Floor of all seven launches together: 69,120 multiply-adds a pixel, 0.14 ms, if the layers of a
# band are still in the second-level cache.
@triton.jit(do_not_specialize=("begin", "end", "pixels_of_a_part"))
def weights_kernel(
    a: tl.tensor,
    b: tl.tensor,
    partial: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    pixels_of_a_part: tl.tensor,
    A_WIDTH: tl.constexpr,
    A_COUNT: tl.constexpr,
    B_WIDTH: tl.constexpr,
    B_COUNT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    part = tl.program_id(0)
    i = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    j = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    first = begin + part * pixels_of_a_part
    last = tl.minimum(first + pixels_of_a_part, end)
    target = partial + (part.to(tl.int64) * A_COUNT + i[:, None]) * B_COUNT + j[None, :]
    inside = (i < A_COUNT)[:, None] & (j < B_COUNT)[None, :]
    total = tl.load(target, mask=inside, other=0.0)
    for start in range(first, last, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        at = pixel.to(tl.int64)
        known = pixel < last
        left = tl.load(
            a + at[None, :] * A_WIDTH + i[:, None],
            mask=known[None, :] & (i < A_COUNT)[:, None],
            other=0.0,
        )
        right = tl.load(
            b + at[:, None] * B_WIDTH + j[None, :],
            mask=known[:, None] & (j < B_COUNT)[None, :],
            other=0.0,
        )
        total = product(left, right, total, tl.float32, PRECISION)
    tl.store(target, total, mask=inside)


# partial[part, c, tap] += sum over the part's pixels of the hidden layer at the reflected tap times
# the gradient behind the depthwise layer.
# Floor of both layers: 3,456 multiply-adds a pixel, 0.03 ms; read nine times from the caches.
@triton.jit(do_not_specialize=(*BAND, "begin", "end", "pixels_of_a_part"))
def depthwise_weights_kernel(
    hidden: tl.tensor,
    gradient: tl.tensor,
    partial: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    pixels_of_a_part: tl.tensor,
    first_row: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    LAYER_WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
) -> None:
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    tap = tl.program_id(2)
    first = begin + part * pixels_of_a_part
    last = tl.minimum(first + pixels_of_a_part, end)
    target = partial + (part.to(tl.int64) * HIDDEN + channel) * 9 + tap
    total = tl.load(target, mask=channel < HIDDEN, other=0.0)
    for start in range(first, last, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        known = (pixel < last)[:, None] & (channel < HIDDEN)[None, :]
        x = pixel % width
        y = pixel // width % rows
        image = pixel // width // rows
        row = within(reflected(first_row + y + tap // 3 - 1, height) - first_row, rows)
        column = reflected(x + tap % 3 - 1, width)
        source = pixel_of(image, row, column, rows, width)
        value = tl.load(
            hidden + source[:, None] * LAYER_WIDTH + channel[None, :], mask=known, other=0.0
        ).to(tl.float32)
        at = pixel.to(tl.int64)[:, None] * LAYER_WIDTH + channel[None, :]
        g = tl.load(gradient + at, mask=known, other=0.0).to(tl.float32)
        total += tl.sum(value * g, axis=0)
    tl.store(target, total, mask=channel < HIDDEN)
