"""Triton kernels of the invertible block and of its inverse; the formulas, and the sizes to which
the floors apply, are in coupling.py."""

from __future__ import annotations

import triton
import triton.language as tl

from mghf_fast.kernels.coupling_layers import (
    BAND,
    activated,
    depthwise,
    kept,
    log_scale_of,
    matrix,
    offsets_of,
    pixel_of,
    product,
    tile_of,
)

# ---- forward ----


# z = M x + b,  h = A(Ep z1).
# Floor: x read, z and h written: 403 MB, 0.09 ms; 24,576 multiply-adds a pixel, 0.10 ms.
@triton.jit(do_not_specialize=BAND)
def mix_expand_kernel(
    x: tl.tensor,
    mix: tl.tensor,
    bias: tl.tensor,
    phi_expand: tl.tensor,
    z: tl.tensor,
    hidden1: tl.tensor,
    x_batch: tl.tensor,
    x_channel: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    tile: tl.tensor | None,
    first_image: tl.tensor,
    first_row: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
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
    image, y, column = tile_of(tile, rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (y < rows) & (column < width)
    row = first_row + y
    n = tl.arange(0, BLOCK_HALF)
    z1 = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HALF), tl.float32)
    z2 = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HALF), tl.float32)
    origin = x + (first_image + image).to(tl.int64) * x_batch
    for start in range(0, TERMS, BLOCK_INPUTS):
        # The terms of an output pixel in the order of the weights: input channel, then tap.
        k = start + tl.arange(0, BLOCK_INPUTS)
        at = row.to(tl.int64)[:, None] * x_row + column.to(tl.int64)[:, None] * x_column
        known = inside[:, None] & (k < TERMS)[None, :]
        if KERNEL == 1:
            at += (k.to(tl.int64) * x_channel)[None, :]
        else:
            down, right = k % 9 // 3 - 1, k % 3 - 1
            to = (k // 9).to(tl.int64) * x_channel + down.to(tl.int64) * x_row
            at += (to + right.to(tl.int64) * x_column)[None, :]
            source_row = row[:, None] + down[None, :]
            source_column = column[:, None] + right[None, :]
            known &= (source_row >= 0) & (source_row < height)
            known &= (source_column >= 0) & (source_column < width)
        values = tl.load(origin + at, mask=known, other=0.0).to(tl.float32)
        w1 = matrix(mix, k, n, 1, TERMS, TERMS, HALF)
        w2 = matrix(mix + HALF * TERMS, k, n, 1, TERMS, TERMS, HALF)
        z1 = product(values, w1, z1, OPERAND, PRECISION)
        z2 = product(values, w2, z2, OPERAND, PRECISION)
    z1 += tl.load(bias + n, mask=n < HALF, other=0.0).to(tl.float32)[None, :]
    z2 += tl.load(bias + HALF + n, mask=n < HALF, other=0.0).to(tl.float32)[None, :]
    z1 = kept(z1, n, HALF)
    z2 = kept(z2, n, HALF)
    pixel = pixel_of(image, y, column, rows, width)
    target = z + pixel[:, None] * (2 * BLOCK_HALF) + n[None, :]
    tl.store(target, z1, mask=inside[:, None])
    tl.store(target + BLOCK_HALF, z2, mask=inside[:, None])
    for start in range(0, PADDED_HIDDEN, BLOCK_HIDDEN):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        h = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = matrix(phi_expand, n, m, 1, HALF, HALF, HIDDEN)
        h = kept(activated(product(z1, w, h, OPERAND, PRECISION), ACTIVATION), m, HIDDEN)
        tl.store(hidden1 + pixel[:, None] * PADDED_HIDDEN + m[None, :], h, mask=inside[:, None])


# z2 <- z2 + Pp A(Dp h);  (hr, he) = A((Er, Ee) z2);  y2 = z2.
# Floor: h and z2 read, y2 and (hr, he) written: 536 MB, 0.12 ms; 24,576 multiply-adds a pixel,
# 0.10 ms, and 1,152 of the depthwise layer, 0.01 ms.
@triton.jit(do_not_specialize=BAND)
def phi_expand_kernel(
    hidden1: tl.tensor,
    phi_depthwise: tl.tensor,
    phi_project: tl.tensor,
    rho_expand: tl.tensor,
    eta_expand: tl.tensor,
    z: tl.tensor,
    hidden2: tl.tensor,
    y: tl.tensor,
    y_batch: tl.tensor,
    y_channel: tl.tensor,
    y_row: tl.tensor,
    y_column: tl.tensor,
    tile: tl.tensor | None,
    first_image: tl.tensor,
    first_row: tl.tensor,
    own_begin: tl.tensor,
    own_end: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    FOR_GRADIENT: tl.constexpr,
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
    at_z2 = z + pixel[:, None] * (2 * BLOCK_HALF) + (BLOCK_HALF + n)[None, :]
    z2 = tl.load(at_z2, mask=inside[:, None], other=0.0).to(tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        d = depthwise(
            hidden1, phi_depthwise, image, down, column, m, first_row, rows, height, width,
            PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        w = matrix(phi_project, m, n, 1, HIDDEN, HIDDEN, HALF)
        z2 = product(activated(d, ACTIVATION), w, z2, OPERAND, PRECISION)
    z2 = kept(z2, n, HALF)
    if FOR_GRADIENT:
        tl.store(at_z2, z2, mask=inside[:, None])
    else:
        row = first_row + down
        own = inside & (row >= own_begin) & (row < own_end)
        at_y = offsets_of(
            first_image + image, row, column, HALF + n, y_batch, y_channel, y_row, y_column
        )
        tl.store(y + at_y, z2, mask=own[:, None] & (n < HALF)[None, :])
    for start in range(0, PADDED_HIDDEN, BLOCK_HIDDEN):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        target = hidden2 + pixel[:, None] * (2 * PADDED_HIDDEN) + m[None, :]
        h = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = matrix(rho_expand, n, m, 1, HALF, HALF, HIDDEN)
        h = kept(activated(product(z2, w, h, OPERAND, PRECISION), ACTIVATION), m, HIDDEN)
        tl.store(target, h, mask=inside[:, None])
        h = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = matrix(eta_expand, n, m, 1, HALF, HALF, HIDDEN)
        h = kept(activated(product(z2, w, h, OPERAND, PRECISION), ACTIVATION), m, HIDDEN)
        tl.store(target + PADDED_HIDDEN, h, mask=inside[:, None])


# r = Pr A(Dr hr),  y1 = z1 exp(r) + Pe A(De he).
# Floor: (hr, he) and z1 read, y1 written: 403 MB, 0.09 ms; 16,384 multiply-adds a pixel, 0.06 ms,
# and 2,304 of the depthwise layers, 0.02 ms.
@triton.jit
def couple(
    hidden2: tl.tensor,
    rho_depthwise: tl.tensor,
    rho_project: tl.tensor,
    eta_depthwise: tl.tensor,
    eta_project: tl.tensor,
    z: tl.tensor,
    y: tl.tensor,
    y_batch: tl.tensor,
    y_channel: tl.tensor,
    y_row: tl.tensor,
    y_column: tl.tensor,
    tile: tl.tensor | None,
    first_image: tl.tensor,
    first_row: tl.tensor,
    own_begin: tl.tensor,
    own_end: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
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
    pixel = pixel_of(image, down, column, rows, width)
    at_z1 = z + pixel[:, None] * (2 * BLOCK_HALF) + n[None, :]
    z1 = tl.load(at_z1, mask=inside[:, None], other=0.0).to(tl.float32)
    z1 = z1 * tl.exp(log_scale_of(raw, CLAMP))
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        d = depthwise(
            hidden2 + PADDED_HIDDEN, eta_depthwise, image, down, column, m, first_row, rows,
            height, width, 2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        w = matrix(eta_project, m, n, 1, HIDDEN, HIDDEN, HALF)
        z1 = product(activated(d, ACTIVATION), w, z1, OPERAND, PRECISION)
    row = first_row + down
    own = inside & (row >= own_begin) & (row < own_end)
    at_y = offsets_of(first_image + image, row, column, n, y_batch, y_channel, y_row, y_column)
    tl.store(y + at_y, z1, mask=own[:, None] & (n < HALF)[None, :])


# ---- inverse ----


# (hr, he) = A((Er, Ee) y2).
# Floor: y2 read, (hr, he) written: 336 MB, 0.08 ms; 16,384 multiply-adds a pixel, 0.06 ms.
@triton.jit(do_not_specialize=BAND)
def expand_kernel(
    y: tl.tensor,
    rho_expand: tl.tensor,
    eta_expand: tl.tensor,
    hidden2: tl.tensor,
    y_batch: tl.tensor,
    y_channel: tl.tensor,
    y_row: tl.tensor,
    y_column: tl.tensor,
    first_image: tl.tensor,
    first_row: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
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
    image, down, column = tile_of(None, rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (down < rows) & (column < width)
    pixel = pixel_of(image, down, column, rows, width)
    n = tl.arange(0, BLOCK_HALF)
    at_y = offsets_of(
        first_image + image, first_row + down, column, HALF + n, y_batch, y_channel, y_row, y_column
    )
    known = inside[:, None] & (n < HALF)[None, :]
    z2 = tl.load(y + at_y, mask=known, other=0.0).to(tl.float32)
    for start in range(0, PADDED_HIDDEN, BLOCK_HIDDEN):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        target = hidden2 + pixel[:, None] * (2 * PADDED_HIDDEN) + m[None, :]
        h = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = matrix(rho_expand, n, m, 1, HALF, HALF, HIDDEN)
        h = kept(activated(product(z2, w, h, OPERAND, PRECISION), ACTIVATION), m, HIDDEN)
        tl.store(target, h, mask=inside[:, None])
        h = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = matrix(eta_expand, n, m, 1, HALF, HALF, HIDDEN)
        h = kept(activated(product(z2, w, h, OPERAND, PRECISION), ACTIVATION), m, HIDDEN)
        tl.store(target + PADDED_HIDDEN, h, mask=inside[:, None])


# z1 = (y1 - Pe A(De he)) exp(-r),  h = A(Ep z1).
# Floor: (hr, he) and y1 read, z1 and h written: 536 MB, 0.12 ms; 24,576 multiply-adds a pixel,
# 0.10 ms, and 2,304 of the depthwise layers, 0.02 ms.
@triton.jit(do_not_specialize=BAND)
def uncouple_kernel(
    hidden2: tl.tensor,
    rho_depthwise: tl.tensor,
    rho_project: tl.tensor,
    eta_depthwise: tl.tensor,
    eta_project: tl.tensor,
    phi_expand: tl.tensor,
    y: tl.tensor,
    z: tl.tensor,
    hidden1: tl.tensor,
    y_batch: tl.tensor,
    y_channel: tl.tensor,
    y_row: tl.tensor,
    y_column: tl.tensor,
    first_image: tl.tensor,
    first_row: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
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
    image, down, column = tile_of(None, rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (down < rows) & (column < width)
    pixel = pixel_of(image, down, column, rows, width)
    n = tl.arange(0, BLOCK_HALF)
    eta = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HALF), tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        d = depthwise(
            hidden2 + PADDED_HIDDEN, eta_depthwise, image, down, column, m, first_row, rows,
            height, width, 2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        w = matrix(eta_project, m, n, 1, HIDDEN, HIDDEN, HALF)
        eta = product(activated(d, ACTIVATION), w, eta, OPERAND, PRECISION)
    at_y = offsets_of(
        first_image + image, first_row + down, column, n, y_batch, y_channel, y_row, y_column
    )
    known = inside[:, None] & (n < HALF)[None, :]
    z1 = tl.load(y + at_y, mask=known, other=0.0).to(tl.float32) - eta
    raw = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HALF), tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        d = depthwise(
            hidden2, rho_depthwise, image, down, column, m, first_row, rows, height, width,
            2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        w = matrix(rho_project, m, n, 1, HIDDEN, HIDDEN, HALF)
        raw = product(activated(d, ACTIVATION), w, raw, OPERAND, PRECISION)
    z1 = kept(z1 * tl.exp(-log_scale_of(raw, CLAMP)), n, HALF)
    tl.store(z + pixel[:, None] * BLOCK_HALF + n[None, :], z1, mask=inside[:, None])
    for start in range(0, PADDED_HIDDEN, BLOCK_HIDDEN):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        h = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = matrix(phi_expand, n, m, 1, HALF, HALF, HIDDEN)
        h = kept(activated(product(z1, w, h, OPERAND, PRECISION), ACTIVATION), m, HIDDEN)
        tl.store(hidden1 + pixel[:, None] * PADDED_HIDDEN + m[None, :], h, mask=inside[:, None])


# z2 = y2 - Pp A(Dp h),  x = N (z1, z2) + e with N the inverse of M and e = -N b.
# Floor: h, z1 and y2 read, x written: 403 MB, 0.09 ms; 24,576 multiply-adds a pixel, 0.10 ms, and
# 1,152 of the depthwise layer, 0.01 ms.
@triton.jit(do_not_specialize=BAND)
def unmix_kernel(
    hidden1: tl.tensor,
    phi_depthwise: tl.tensor,
    phi_project: tl.tensor,
    inverse: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    z: tl.tensor,
    x: tl.tensor,
    y_batch: tl.tensor,
    y_channel: tl.tensor,
    y_row: tl.tensor,
    y_column: tl.tensor,
    x_batch: tl.tensor,
    x_channel: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    first_image: tl.tensor,
    first_row: tl.tensor,
    own_begin: tl.tensor,
    own_end: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
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
    image, down, column = tile_of(None, rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (down < rows) & (column < width)
    pixel = pixel_of(image, down, column, rows, width)
    n = tl.arange(0, BLOCK_HALF)
    phi = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HALF), tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        d = depthwise(
            hidden1, phi_depthwise, image, down, column, m, first_row, rows, height, width,
            PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        w = matrix(phi_project, m, n, 1, HIDDEN, HIDDEN, HALF)
        phi = product(activated(d, ACTIVATION), w, phi, OPERAND, PRECISION)
    row = first_row + down
    source = first_image + image
    at_y = offsets_of(source, row, column, HALF + n, y_batch, y_channel, y_row, y_column)
    known = inside[:, None] & (n < HALF)[None, :]
    z2 = tl.load(y + at_y, mask=known, other=0.0).to(tl.float32) - phi
    z2 = kept(z2, n, HALF)
    at_z1 = z + pixel[:, None] * BLOCK_HALF + n[None, :]
    z1 = tl.load(at_z1, mask=inside[:, None], other=0.0).to(tl.float32)
    own = inside & (row >= own_begin) & (row < own_end)
    for start in range(0, 2 * HALF, BLOCK_HIDDEN):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        result = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = matrix(inverse, n, m, 1, 2 * HALF, HALF, 2 * HALF)
        result = product(z1, w, result, OPERAND, PRECISION)
        w = matrix(inverse + HALF, n, m, 1, 2 * HALF, HALF, 2 * HALF)
        result = product(z2, w, result, OPERAND, PRECISION)
        result += tl.load(bias + m, mask=m < 2 * HALF, other=0.0).to(tl.float32)[None, :]
        at_x = offsets_of(source, row, column, m, x_batch, x_channel, x_row, x_column)
        tl.store(x + at_x, result, mask=own[:, None] & (m < 2 * HALF)[None, :])
