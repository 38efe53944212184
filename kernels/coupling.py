"""Triton kernels of the op `coupling`: the invertible block, its inverse and its gradients.

With A the activation, D* the depthwise 3x3 with reflection, and, at every pixel,

    (z1, z2) = M x + b                        M 1x1, or 3x3 with zero padding
    h  = A(Ep z1)             z2 <- z2 + Pp A(Dp h)
    hr = A(Er z2), he = A(Ee z2)
    r  = Pr A(Dr hr)          or k tanh(r / k)
    y1 = z1 exp(r) + Pe A(De he),   y2 = z2

the forward is three kernels: M and Ep; the rest of phi with Er and Ee; the rest of rho and eta with
the coupling. Between them only z, h and (hr, he) are in memory, [pixel][channel] whatever the
image's strides are, and only of a band of rows or a few images at a time (WORKSPACE_BYTES). A
hidden layer is read by tiles of pixels whose 3x3 halo comes from the caches.

The gradient computes the first two kernels again and then goes back in three of its own, T marking
a transposed matrix, A' the slope of the activation, and (g1, g2) the gradient of y:

    d_r = g1 z1 exp(r) (1 - (r / k)^2)
    gr = A' Pr^T d_r,  ge = A' Pe^T g1        before the depthwise layers of rho and eta
    d2 = g2 + Er^T A' Dr^T gr + Ee^T A' De^T ge
    gp = A' Pp^T d2
    d1 = g1 exp(r) + Ep^T A' Dp^T gp
    d_x = M^T (d1, d2)

The slope is taken from the activation's value. D^T gathers: a pixel sums over those whose reflected
window holds it. Gradients of the weights are products of these with the layers' inputs, summed over
the pixels in a fixed number of parts, and then over the parts.

Floors below are for B = 1, C = 128 (c = 64), 512 x 512, float32, a 1x1 mix: MB at 4.3 TB/s, and
multiply-adds of the products, taken three times in TF32 (400 TFLOP/s); the depthwise layers are
float32 multiply-adds (60 TFLOP/s). With bfloat16 images (790 TFLOP/s, half the bytes) the products
take a sixth and the bytes half of the time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_is_interpreted
from . import launch

WORKSPACE_BYTES = 192 << 20
"""What the hidden layers may take of memory at a time: a twelfth of what the gradient of the
reference keeps for one image of 512 x 512. Pixels of a band times channels also stay within 32 bits
of pixel indices."""


TILE_COLUMNS = 16  # 16 neighbours of a row of NCHW are whole sectors of memory
BLOCK_HIDDEN = 32
BLOCK_INPUTS = 32
BLOCK_WEIGHTS = 64
NUM_WARPS = 8
NUM_STAGES = 1  # more would copy the weights, and all taps of a layer, into shared memory ahead
MOST_PARTS = 64  # of a sum over pixels
PIXELS_OF_A_PART = 256

# ---- pointwise ----


@triton.jit
def _activated(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    # Comparisons and not minimum and maximum: a NaN stays one.
    if ACTIVATION == "relu6":
        x = tl.where(x < 0.0, 0.0, x)
        return tl.where(x > 6.0, 6.0, x)
    elif ACTIVATION == "softplus":
        # max(x, 0) + log(1 + u), the logarithm as 2 artanh(u / (2 + u)): exact for small u too.
        u = tl.exp(-tl.abs(x))
        s = u / (u + 2.0)
        q = s * s
        p = q * (1.0 / 15) + 1.0 / 13
        p = p * q + 1.0 / 11
        p = p * q + 1.0 / 9
        p = p * q + 1.0 / 7
        p = p * q + 1.0 / 5
        p = p * q + 1.0 / 3
        return tl.where(x > 0.0, x, 0.0) + 2.0 * s * (p * q + 1.0)
    else:
        return tl.where(x > 0.0, x, 0.01 * x)


@triton.jit
def _slope(value: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The activation's derivative, from its value."""
    if ACTIVATION == "relu6":
        return tl.where((value > 0.0) & (value < 6.0), 1.0, 0.0)
    elif ACTIVATION == "softplus":
        small = value * (1.0 - value * (0.5 - value * (1.0 / 6)))
        return tl.where(value < 0.01, small, 1.0 - tl.exp(-value))
    else:
        return tl.where(value > 0.0, 1.0, 0.01)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    q = x * x
    p = q * (62.0 / 2835) - 17.0 / 315
    p = p * q + 2.0 / 15
    p = p * q - 1.0 / 3
    large = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return tl.where(tl.abs(x) < 0.25, x + x * q * p, large)


@triton.jit
def _log_scale(raw: tl.tensor, CLAMP: tl.constexpr) -> tl.tensor:
    if CLAMP > 0.0:
        return CLAMP * _tanh(raw / CLAMP)
    else:
        return raw


# ---- tiles ----


@triton.jit
def _tile(
    rows: tl.tensor, width: tl.tensor, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr
) -> tl.tensor:
    """This program's image of the band, and the rows (of the band) and columns of its pixels; some
    may lie beyond the last."""
    across = tl.cdiv(width, TILE_COLUMNS)
    down = tl.cdiv(rows, TILE_ROWS)
    tile = tl.program_id(0)
    pixel = tl.arange(0, TILE_ROWS * TILE_COLUMNS)
    y = tile // across % down * TILE_ROWS + pixel // TILE_COLUMNS
    x = tile % across * TILE_COLUMNS + pixel % TILE_COLUMNS
    return tile // (across * down), y, x


@triton.jit
def _pixel(
    image: tl.tensor, y: tl.tensor, x: tl.tensor, rows: tl.tensor, width: tl.tensor
) -> tl.tensor:
    """The index of a pixel of the band."""
    return ((image * rows + y) * width + x).to(tl.int64)


@triton.jit
def _offsets(
    image: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    channel: tl.tensor,
    batch_stride: tl.tensor,
    channel_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
) -> tl.tensor:
    """[pixel, channel] offsets into an image with any strides."""
    pixel = row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    pixel += image.to(tl.int64) * batch_stride
    return pixel[:, None] + (channel.to(tl.int64) * channel_stride)[None, :]


@triton.jit
def _kept(value: tl.tensor, channel: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """Zeros in the channels beyond the last, where an infinite factor may have made a NaN of a
    weight of zero."""
    if value.shape[1] > COUNT:
        value = tl.where((channel < COUNT)[None, :], value, 0.0)
    return value


@triton.jit
def _matrix(
    pointer: tl.tensor,
    k: tl.tensor,
    n: tl.tensor,
    K_STRIDE: tl.constexpr,
    N_STRIDE: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
) -> tl.tensor:
    """[k, n] of a matrix of weights, zero beyond K and N."""
    known = (k < K)[:, None] & (n < N)[None, :]
    at = pointer + k[:, None] * K_STRIDE + n[None, :] * N_STRIDE
    return tl.load(at, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _product(
    a: tl.tensor, b: tl.tensor, total: tl.tensor, OPERAND: tl.constexpr, PRECISION: tl.constexpr
) -> tl.tensor:
    return tl.dot(a.to(OPERAND), b.to(OPERAND), total, input_precision=PRECISION)


# ---- the depthwise layers ----


@triton.jit
def _reflected(i: tl.tensor, n: tl.tensor) -> tl.tensor:
    """Reflection by one; a side of length one is repeated. Within 0 and n - 1 for any i >= -1."""
    i = tl.abs(i)
    i = tl.where(i < n, i, 2 * (n - 1) - i)
    return tl.maximum(i, 0)


@triton.jit
def _within(y: tl.tensor, rows: tl.tensor) -> tl.tensor:
    """A row of the band in place of one outside, which is only asked for by rows whose result
    nobody reads."""
    return tl.minimum(tl.maximum(y, 0), rows - 1)


@triton.jit
def _depthwise(
    hidden: tl.tensor,
    weight: tl.tensor,
    image: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    channel: tl.tensor,
    first_row: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    LAYER_WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> tl.tensor:
    """The depthwise layer at the pixels of a tile, before its activation; `hidden` points at the
    sub-network's first channel of a layer of LAYER_WIDTH channels."""
    total = tl.zeros((y.shape[0], channel.shape[0]), tl.float32)
    # A loop and not nine copies of its body, whose loads together would overflow the registers.
    for i in tl.range(0, 3, num_stages=1):
        row = tl.abs(first_row + y + (i - 1))
        row = tl.where(row < height, row, 2 * (height - 1) - row) - first_row
        row = image * rows + tl.minimum(tl.maximum(row, 0), rows - 1)
        for j in tl.static_range(3):
            column = tl.abs(x + (j - 1))
            column = tl.maximum(tl.where(column < width, column, 2 * (width - 1) - column), 0)
            pixel = (row * width + column).to(tl.int64)
            at = weight + channel * 9 + (i * 3 + j)
            w = tl.load(at, mask=channel < HIDDEN, other=0.0).to(tl.float32)
            values = tl.load(hidden + pixel[:, None] * LAYER_WIDTH + channel[None, :])
            total += values.to(tl.float32) * w[None, :]
    return total


@triton.jit
def _depthwise_transposed(
    gradient: tl.tensor,
    weight: tl.tensor,
    image: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    channel: tl.tensor,
    first_row: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    LAYER_WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> tl.tensor:
    """The transposed depthwise layer with its reflections, in gather form.

    Along an axis a pixel has three terms, its neighbours with the taps 2, 1, 0; and two more near
    the borders, where the window of the image's first (or last) pixel reaches out with its tap 0
    (or 2) and is reflected back onto the second (or last but one)."""
    total = tl.zeros((y.shape[0], channel.shape[0]), tl.float32)
    at_y = first_row + y
    border = (at_y <= 1) | (at_y >= height - 2) | (x <= 1) | (x >= width - 2)
    terms = 3 + 2 * tl.max(border.to(tl.int32), axis=0)
    for i in tl.range(0, terms, num_stages=1):
        step = tl.where(i < 3, i - 1, 2 * i - 7)
        row = at_y + step
        row_tap = tl.where(i < 3, 1 - step, 1 + step)
        second = tl.where(step < 0, tl.minimum(height - 1, 1), tl.maximum(height - 2, 0))
        row_valid = tl.where(i < 3, (row >= 0) & (row < height), at_y == second)
        # Rows outside of the band are only asked for by rows whose result nobody reads.
        row = tl.minimum(tl.maximum(tl.minimum(row, height - 1) - first_row, 0), rows - 1)
        row = image * rows + row
        for j in tl.range(0, terms, num_stages=1):
            step = tl.where(j < 3, j - 1, 2 * j - 7)
            column = x + step
            tap = row_tap * 3 + tl.where(j < 3, 1 - step, 1 + step)
            second = tl.where(step < 0, tl.minimum(width - 1, 1), tl.maximum(width - 2, 0))
            valid = tl.where(j < 3, (column >= 0) & (column < width), x == second) & row_valid
            column = tl.minimum(tl.maximum(column, 0), width - 1)
            pixel = (row * width + column).to(tl.int64)
            w = tl.load(weight + channel * 9 + tap, mask=channel < HIDDEN, other=0.0)
            values = tl.load(
                gradient + pixel[:, None] * LAYER_WIDTH + channel[None, :],
                mask=valid[:, None],
                other=0.0,
            )
            total += values.to(tl.float32) * w.to(tl.float32)[None, :]
    return total


# ---- forward ----

# Sizes that differ from band to band, and would be compiled for anew.
_BAND = ("first_image", "first_row", "own_begin", "own_end", "rows", "height")


# z = M x + b,  h = A(Ep z1).
# Floor: x read, z and h written: 403 MB, 0.09 ms; 24,576 multiply-adds a pixel, 0.10 ms.
@triton.jit(do_not_specialize=_BAND)
def _mix_expand_kernel(
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
    image, y, column = _tile(rows, width, TILE_ROWS, TILE_COLUMNS)
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
        w1 = _matrix(mix, k, n, 1, TERMS, TERMS, HALF)
        w2 = _matrix(mix + HALF * TERMS, k, n, 1, TERMS, TERMS, HALF)
        z1 = _product(values, w1, z1, OPERAND, PRECISION)
        z2 = _product(values, w2, z2, OPERAND, PRECISION)
    z1 += tl.load(bias + n, mask=n < HALF, other=0.0).to(tl.float32)[None, :]
    z2 += tl.load(bias + HALF + n, mask=n < HALF, other=0.0).to(tl.float32)[None, :]
    z1 = _kept(z1, n, HALF)
    z2 = _kept(z2, n, HALF)
    pixel = _pixel(image, y, column, rows, width)
    target = z + pixel[:, None] * (2 * BLOCK_HALF) + n[None, :]
    tl.store(target, z1, mask=inside[:, None])
    tl.store(target + BLOCK_HALF, z2, mask=inside[:, None])
    for start in range(0, PADDED_HIDDEN, BLOCK_HIDDEN):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        h = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = _matrix(phi_expand, n, m, 1, HALF, HALF, HIDDEN)
        h = _kept(_activated(_product(z1, w, h, OPERAND, PRECISION), ACTIVATION), m, HIDDEN)
        tl.store(hidden1 + pixel[:, None] * PADDED_HIDDEN + m[None, :], h, mask=inside[:, None])


# z2 <- z2 + Pp A(Dp h);  (hr, he) = A((Er, Ee) z2);  y2 = z2.
# Floor: h and z2 read, y2 and (hr, he) written: 536 MB, 0.12 ms; 24,576 multiply-adds a pixel,
# 0.10 ms, and 1,152 of the depthwise layer, 0.01 ms.
@triton.jit(do_not_specialize=_BAND)
def _phi_expand_kernel(
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
    image, down, column = _tile(rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (down < rows) & (column < width)
    pixel = _pixel(image, down, column, rows, width)
    n = tl.arange(0, BLOCK_HALF)
    at_z2 = z + pixel[:, None] * (2 * BLOCK_HALF) + (BLOCK_HALF + n)[None, :]
    z2 = tl.load(at_z2, mask=inside[:, None], other=0.0).to(tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        d = _depthwise(
            hidden1, phi_depthwise, image, down, column, m, first_row, rows, height, width,
            PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        w = _matrix(phi_project, m, n, 1, HIDDEN, HIDDEN, HALF)
        z2 = _product(_activated(d, ACTIVATION), w, z2, OPERAND, PRECISION)
    z2 = _kept(z2, n, HALF)
    if FOR_GRADIENT:
        tl.store(at_z2, z2, mask=inside[:, None])
    else:
        row = first_row + down
        own = inside & (row >= own_begin) & (row < own_end)
        at_y = _offsets(
            first_image + image, row, column, HALF + n, y_batch, y_channel, y_row, y_column
        )
        tl.store(y + at_y, z2, mask=own[:, None] & (n < HALF)[None, :])
    for start in range(0, PADDED_HIDDEN, BLOCK_HIDDEN):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        target = hidden2 + pixel[:, None] * (2 * PADDED_HIDDEN) + m[None, :]
        h = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = _matrix(rho_expand, n, m, 1, HALF, HALF, HIDDEN)
        h = _kept(_activated(_product(z2, w, h, OPERAND, PRECISION), ACTIVATION), m, HIDDEN)
        tl.store(target, h, mask=inside[:, None])
        h = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = _matrix(eta_expand, n, m, 1, HALF, HALF, HIDDEN)
        h = _kept(_activated(_product(z2, w, h, OPERAND, PRECISION), ACTIVATION), m, HIDDEN)
        tl.store(target + PADDED_HIDDEN, h, mask=inside[:, None])


# r = Pr A(Dr hr),  y1 = z1 exp(r) + Pe A(De he).
# Floor: (hr, he) and z1 read, y1 written: 403 MB, 0.09 ms; 16,384 multiply-adds a pixel, 0.06 ms,
# and 2,304 of the depthwise layers, 0.02 ms.
@triton.jit(do_not_specialize=_BAND)
def _couple_kernel(
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
    image, down, column = _tile(rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (down < rows) & (column < width)
    n = tl.arange(0, BLOCK_HALF)
    raw = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HALF), tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        d = _depthwise(
            hidden2, rho_depthwise, image, down, column, m, first_row, rows, height, width,
            2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        w = _matrix(rho_project, m, n, 1, HIDDEN, HIDDEN, HALF)
        raw = _product(_activated(d, ACTIVATION), w, raw, OPERAND, PRECISION)
    pixel = _pixel(image, down, column, rows, width)
    at_z1 = z + pixel[:, None] * (2 * BLOCK_HALF) + n[None, :]
    z1 = tl.load(at_z1, mask=inside[:, None], other=0.0).to(tl.float32)
    z1 = z1 * tl.exp(_log_scale(raw, CLAMP))
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        d = _depthwise(
            hidden2 + PADDED_HIDDEN, eta_depthwise, image, down, column, m, first_row, rows,
            height, width, 2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        w = _matrix(eta_project, m, n, 1, HIDDEN, HIDDEN, HALF)
        z1 = _product(_activated(d, ACTIVATION), w, z1, OPERAND, PRECISION)
    row = first_row + down
    own = inside & (row >= own_begin) & (row < own_end)
    at_y = _offsets(first_image + image, row, column, n, y_batch, y_channel, y_row, y_column)
    tl.store(y + at_y, z1, mask=own[:, None] & (n < HALF)[None, :])


# ---- inverse ----


# (hr, he) = A((Er, Ee) y2).
# Floor: y2 read, (hr, he) written: 336 MB, 0.08 ms; 16,384 multiply-adds a pixel, 0.06 ms.
@triton.jit(do_not_specialize=_BAND)
def _expand_kernel(
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
    image, down, column = _tile(rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (down < rows) & (column < width)
    pixel = _pixel(image, down, column, rows, width)
    n = tl.arange(0, BLOCK_HALF)
    at_y = _offsets(
        first_image + image, first_row + down, column, HALF + n, y_batch, y_channel, y_row, y_column
    )
    known = inside[:, None] & (n < HALF)[None, :]
    z2 = tl.load(y + at_y, mask=known, other=0.0).to(tl.float32)
    for start in range(0, PADDED_HIDDEN, BLOCK_HIDDEN):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        target = hidden2 + pixel[:, None] * (2 * PADDED_HIDDEN) + m[None, :]
        h = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = _matrix(rho_expand, n, m, 1, HALF, HALF, HIDDEN)
        h = _kept(_activated(_product(z2, w, h, OPERAND, PRECISION), ACTIVATION), m, HIDDEN)
        tl.store(target, h, mask=inside[:, None])
        h = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = _matrix(eta_expand, n, m, 1, HALF, HALF, HIDDEN)
        h = _kept(_activated(_product(z2, w, h, OPERAND, PRECISION), ACTIVATION), m, HIDDEN)
        tl.store(target + PADDED_HIDDEN, h, mask=inside[:, None])


# z1 = (y1 - Pe A(De he)) exp(-r),  h = A(Ep z1).
# Floor: (hr, he) and y1 read, z1 and h written: 536 MB, 0.12 ms; 24,576 multiply-adds a pixel,
# 0.10 ms, and 2,304 of the depthwise layers, 0.02 ms.
@triton.jit(do_not_specialize=_BAND)
def _uncouple_kernel(
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
    image, down, column = _tile(rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (down < rows) & (column < width)
    pixel = _pixel(image, down, column, rows, width)
    n = tl.arange(0, BLOCK_HALF)
    eta = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HALF), tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        d = _depthwise(
            hidden2 + PADDED_HIDDEN, eta_depthwise, image, down, column, m, first_row, rows,
            height, width, 2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        w = _matrix(eta_project, m, n, 1, HIDDEN, HIDDEN, HALF)
        eta = _product(_activated(d, ACTIVATION), w, eta, OPERAND, PRECISION)
    at_y = _offsets(
        first_image + image, first_row + down, column, n, y_batch, y_channel, y_row, y_column
    )
    known = inside[:, None] & (n < HALF)[None, :]
    z1 = tl.load(y + at_y, mask=known, other=0.0).to(tl.float32) - eta
    raw = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HALF), tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        d = _depthwise(
            hidden2, rho_depthwise, image, down, column, m, first_row, rows, height, width,
            2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        w = _matrix(rho_project, m, n, 1, HIDDEN, HIDDEN, HALF)
        raw = _product(_activated(d, ACTIVATION), w, raw, OPERAND, PRECISION)
    z1 = _kept(z1 * tl.exp(-_log_scale(raw, CLAMP)), n, HALF)
    tl.store(z + pixel[:, None] * BLOCK_HALF + n[None, :], z1, mask=inside[:, None])
    for start in range(0, PADDED_HIDDEN, BLOCK_HIDDEN):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        h = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = _matrix(phi_expand, n, m, 1, HALF, HALF, HIDDEN)
        h = _kept(_activated(_product(z1, w, h, OPERAND, PRECISION), ACTIVATION), m, HIDDEN)
        tl.store(hidden1 + pixel[:, None] * PADDED_HIDDEN + m[None, :], h, mask=inside[:, None])


# z2 = y2 - Pp A(Dp h),  x = N (z1, z2) + e with N the inverse of M and e = -N b.
# Floor: h, z1 and y2 read, x written: 403 MB, 0.09 ms; 24,576 multiply-adds a pixel, 0.10 ms, and
# 1,152 of the depthwise layer, 0.01 ms.
@triton.jit(do_not_specialize=_BAND)
def _unmix_kernel(
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
    image, down, column = _tile(rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (down < rows) & (column < width)
    pixel = _pixel(image, down, column, rows, width)
    n = tl.arange(0, BLOCK_HALF)
    phi = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HALF), tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        d = _depthwise(
            hidden1, phi_depthwise, image, down, column, m, first_row, rows, height, width,
            PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        w = _matrix(phi_project, m, n, 1, HIDDEN, HIDDEN, HALF)
        phi = _product(_activated(d, ACTIVATION), w, phi, OPERAND, PRECISION)
    row = first_row + down
    source = first_image + image
    at_y = _offsets(source, row, column, HALF + n, y_batch, y_channel, y_row, y_column)
    known = inside[:, None] & (n < HALF)[None, :]
    z2 = tl.load(y + at_y, mask=known, other=0.0).to(tl.float32) - phi
    z2 = _kept(z2, n, HALF)
    at_z1 = z + pixel[:, None] * BLOCK_HALF + n[None, :]
    z1 = tl.load(at_z1, mask=inside[:, None], other=0.0).to(tl.float32)
    own = inside & (row >= own_begin) & (row < own_end)
    for start in range(0, 2 * HALF, BLOCK_HIDDEN):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        result = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = _matrix(inverse, n, m, 1, 2 * HALF, HALF, 2 * HALF)
        result = _product(z1, w, result, OPERAND, PRECISION)
        w = _matrix(inverse + HALF, n, m, 1, 2 * HALF, HALF, 2 * HALF)
        result = _product(z2, w, result, OPERAND, PRECISION)
        result += tl.load(bias + m, mask=m < 2 * HALF, other=0.0).to(tl.float32)[None, :]
        at_x = _offsets(source, row, column, m, x_batch, x_channel, x_row, x_column)
        tl.store(x + at_x, result, mask=own[:, None] & (m < 2 * HALF)[None, :])


# ---- backward ----


# r again; d_r = g1 z1 exp(r) (1 - (r / k)^2);  gr = A' Pr^T d_r,  ge = A' Pe^T g1;
# g1 exp(r), the direct part of d1.
# Floor: (hr, he), z1, g1 read, (gr, ge), g1 exp(r) written: 737 MB, 0.17 ms; 24,576 multiply-adds
# a pixel, 0.10 ms, and 3,456 of the depthwise layers (rho's twice), 0.03 ms.
@triton.jit(do_not_specialize=_BAND)
def _grad_hidden2_kernel(
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
    image, down, column = _tile(rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (down < rows) & (column < width)
    pixel = _pixel(image, down, column, rows, width)
    n = tl.arange(0, BLOCK_HALF)
    raw = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HALF), tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        d = _depthwise(
            hidden2, rho_depthwise, image, down, column, m, first_row, rows, height, width,
            2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        w = _matrix(rho_project, m, n, 1, HIDDEN, HIDDEN, HALF)
        raw = _product(_activated(d, ACTIVATION), w, raw, OPERAND, PRECISION)
    at_grad = _offsets(
        first_image + image, first_row + down, column, n,
        grad_batch, grad_channel, grad_row, grad_column,
    )  # fmt: skip
    known = inside[:, None] & (n < HALF)[None, :]
    g1 = tl.load(grad + at_grad, mask=known, other=0.0).to(tl.float32)
    at_z1 = pixel[:, None] * (2 * BLOCK_HALF) + n[None, :]
    z1 = tl.load(z + at_z1, mask=inside[:, None], other=0.0).to(tl.float32)
    log_scale = _log_scale(raw, CLAMP)
    scaled = g1 * tl.exp(log_scale)
    tl.store(mixed + at_z1, scaled, mask=inside[:, None])
    d_rho = scaled * z1
    if CLAMP > 0.0:
        d_rho *= 1.0 - (log_scale / CLAMP) * (log_scale / CLAMP)
    d_rho = _kept(d_rho, n, HALF)
    if WITH_WEIGHTS:
        at_rho = grad_rho + pixel[:, None] * BLOCK_HALF + n[None, :]
        tl.store(at_rho, d_rho, mask=inside[:, None])
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        at = pixel[:, None] * (2 * PADDED_HIDDEN) + m[None, :]
        d = _depthwise(
            hidden2, rho_depthwise, image, down, column, m, first_row, rows, height, width,
            2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        d = _activated(d, ACTIVATION)
        if WITH_WEIGHTS:
            tl.store(depthwise2 + at, d, mask=inside[:, None])
        g = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = _matrix(rho_project, n, m, HIDDEN, 1, HALF, HIDDEN)
        g = _product(d_rho, w, g, OPERAND, PRECISION) * _slope(d, ACTIVATION)
        tl.store(grad2 + at, _kept(g, m, HIDDEN), mask=inside[:, None])
    # Read again, so as not to be held in registers all the while.
    g1 = tl.load(grad + at_grad, mask=known, other=0.0).to(tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        at = pixel[:, None] * (2 * PADDED_HIDDEN) + (PADDED_HIDDEN + m)[None, :]
        d = _depthwise(
            hidden2 + PADDED_HIDDEN, eta_depthwise, image, down, column, m, first_row, rows,
            height, width, 2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        d = _activated(d, ACTIVATION)
        if WITH_WEIGHTS:
            tl.store(depthwise2 + at, d, mask=inside[:, None])
        g = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = _matrix(eta_project, n, m, HIDDEN, 1, HALF, HIDDEN)
        g = _product(g1, w, g, OPERAND, PRECISION) * _slope(d, ACTIVATION)
        tl.store(grad2 + at, _kept(g, m, HIDDEN), mask=inside[:, None])


# d2 = g2 + Er^T A' Dr^T gr + Ee^T A' De^T ge,  gp = A' Pp^T d2.
# Floor: (gr, ge), (hr, he), h, g2 read, d2 and gp written: 939 MB, 0.22 ms; 24,576 multiply-adds a
# pixel, 0.10 ms, and 3,456 of the depthwise layers, 0.03 ms.
@triton.jit(do_not_specialize=_BAND)
def _grad_z2_kernel(
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
    image, down, column = _tile(rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (down < rows) & (column < width)
    pixel = _pixel(image, down, column, rows, width)
    n = tl.arange(0, BLOCK_HALF)
    at_grad = _offsets(
        first_image + image, first_row + down, column, HALF + n,
        grad_batch, grad_channel, grad_row, grad_column,
    )  # fmt: skip
    known = inside[:, None] & (n < HALF)[None, :]
    d2 = tl.load(grad + at_grad, mask=known, other=0.0).to(tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        at = pixel[:, None] * (2 * PADDED_HIDDEN) + m[None, :]
        t = _depthwise_transposed(
            grad2, rho_depthwise, image, down, column, m, first_row, rows, height, width,
            2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        h = tl.load(hidden2 + at, mask=inside[:, None], other=0.0).to(tl.float32)
        t *= _slope(h, ACTIVATION)
        if WITH_WEIGHTS:
            tl.store(through2 + at, t, mask=inside[:, None])
        w = _matrix(rho_expand, m, n, HALF, 1, HIDDEN, HALF)
        d2 = _product(t, w, d2, OPERAND, PRECISION)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        at = pixel[:, None] * (2 * PADDED_HIDDEN) + (PADDED_HIDDEN + m)[None, :]
        t = _depthwise_transposed(
            grad2 + PADDED_HIDDEN, eta_depthwise, image, down, column, m, first_row, rows, height,
            width, 2 * PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        h = tl.load(hidden2 + at, mask=inside[:, None], other=0.0).to(tl.float32)
        t *= _slope(h, ACTIVATION)
        if WITH_WEIGHTS:
            tl.store(through2 + at, t, mask=inside[:, None])
        w = _matrix(eta_expand, m, n, HALF, 1, HIDDEN, HALF)
        d2 = _product(t, w, d2, OPERAND, PRECISION)
    d2 = _kept(d2, n, HALF)
    at_d2 = pixel[:, None] * (2 * BLOCK_HALF) + (BLOCK_HALF + n)[None, :]
    tl.store(mixed + at_d2, d2, mask=inside[:, None])
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        at = pixel[:, None] * PADDED_HIDDEN + m[None, :]
        d = _depthwise(
            hidden1, phi_depthwise, image, down, column, m, first_row, rows, height, width,
            PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        d = _activated(d, ACTIVATION)
        if WITH_WEIGHTS:
            tl.store(depthwise1 + at, d, mask=inside[:, None])
        g = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_HIDDEN), tl.float32)
        w = _matrix(phi_project, n, m, HIDDEN, 1, HALF, HIDDEN)
        g = _product(d2, w, g, OPERAND, PRECISION) * _slope(d, ACTIVATION)
        tl.store(grad1 + at, _kept(g, m, HIDDEN), mask=inside[:, None])


# d1 = g1 exp(r) + Ep^T A' Dp^T gp,  d_x = M^T (d1, d2); with a 3x3 mix the products with all of its
# taps, which _gather_kernel adds up.
# Floor: gp, h, d1's direct part and d2 read, d_x written: 536 MB, 0.12 ms; 24,576 multiply-adds a
# pixel, 0.10 ms, and 1,152 of the depthwise layer, 0.01 ms.
@triton.jit(do_not_specialize=_BAND)
def _grad_mixed_kernel(
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
    image, down, column = _tile(rows, width, TILE_ROWS, TILE_COLUMNS)
    inside = (down < rows) & (column < width)
    pixel = _pixel(image, down, column, rows, width)
    n = tl.arange(0, BLOCK_HALF)
    at_d1 = mixed + pixel[:, None] * (2 * BLOCK_HALF) + n[None, :]
    d1 = tl.load(at_d1, mask=inside[:, None], other=0.0).to(tl.float32)
    for start in tl.range(0, PADDED_HIDDEN, BLOCK_HIDDEN, num_stages=1):
        m = start + tl.arange(0, BLOCK_HIDDEN)
        at = pixel[:, None] * PADDED_HIDDEN + m[None, :]
        t = _depthwise_transposed(
            grad1, phi_depthwise, image, down, column, m, first_row, rows, height, width,
            PADDED_HIDDEN, HIDDEN,
        )  # fmt: skip
        h = tl.load(hidden1 + at, mask=inside[:, None], other=0.0).to(tl.float32)
        t *= _slope(h, ACTIVATION)
        if WITH_WEIGHTS:
            tl.store(through1 + at, t, mask=inside[:, None])
        w = _matrix(phi_expand, m, n, HALF, 1, HIDDEN, HALF)
        d1 = _product(t, w, d1, OPERAND, PRECISION)
    d1 = _kept(d1, n, HALF)
    if WITH_WEIGHTS:
        tl.store(at_d1, d1, mask=inside[:, None])
    d2 = tl.load(at_d1 + BLOCK_HALF, mask=inside[:, None], other=0.0).to(tl.float32)
    row = first_row + down
    own = inside & (row >= own_begin) & (row < own_end)
    for start in range(0, TERMS, BLOCK_INPUTS):
        k = start + tl.arange(0, BLOCK_INPUTS)
        result = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_INPUTS), tl.float32)
        w = _matrix(mix, n, k, TERMS, 1, HALF, TERMS)
        result = _product(d1, w, result, OPERAND, PRECISION)
        w = _matrix(mix + HALF * TERMS, n, k, TERMS, 1, HALF, TERMS)
        result = _product(d2, w, result, OPERAND, PRECISION)
        if KERNEL == 1:
            at_x = _offsets(
                first_image + image, row, column, k, x_batch, x_channel, x_row, x_column
            )
            tl.store(grad_x + at_x, result, mask=own[:, None] & (k < TERMS)[None, :])
        else:
            at = pixel[:, None] * TERMS + k[None, :]
            tl.store(products + at, result, mask=inside[:, None] & (k < TERMS)[None, :])


# d_x of a 3x3 mix: the products of each pixel's neighbours with the tap that leads from it to them.
# Floor, 3 inputs: 27 products read and 3 results written a pixel, 31 MB, 0.01 ms.
@triton.jit(do_not_specialize=_BAND)
def _gather_kernel(
    products: tl.tensor,
    grad_x: tl.tensor,
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
    INPUTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    image, down, column = _tile(rows, width, TILE_ROWS, TILE_COLUMNS)
    row = first_row + down
    own = (down < rows) & (column < width) & (row >= own_begin) & (row < own_end)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    known = own[:, None] & (channel < INPUTS)[None, :]
    total = tl.zeros((TILE_ROWS * TILE_COLUMNS, BLOCK_CHANNELS), tl.float32)
    for tap in tl.static_range(9):
        to_row = row + (1 - tap // 3)
        to_column = column + (1 - tap % 3)
        valid = (to_row >= 0) & (to_row < height) & (to_column >= 0) & (to_column < width)
        pixel = _pixel(image, to_row - first_row, to_column, rows, width)
        at = pixel[:, None] * (INPUTS * 9) + (channel * 9 + tap)[None, :]
        total += tl.load(products + at, mask=known & valid[:, None], other=0.0).to(tl.float32)
    at_x = _offsets(first_image + image, row, column, channel, x_batch, x_channel, x_row, x_column)
    tl.store(grad_x + at_x, total, mask=known)


# ---- gradients of the weights ----


# partial[part] = sum over the part's pixels of a b^T, a and b [pixel][channel].
# Floor of all seven together: 69,120 multiply-adds a pixel, 0.27 ms, if the layers of a band are
# still in the second-level cache.
@triton.jit(do_not_specialize=("begin", "end", "pixels_of_a_part"))
def _weights_kernel(
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
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
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
        total = _product(left, right, total, tl.float32, PRECISION)
    target = partial + (part.to(tl.int64) * A_COUNT + i[:, None]) * B_COUNT + j[None, :]
    tl.store(target, total, mask=(i < A_COUNT)[:, None] & (j < B_COUNT)[None, :])


# partial[part, c, tap] = sum over the part's pixels of the hidden layer at the reflected tap times
# the gradient behind the depthwise layer.
# Floor of both layers: 3,456 multiply-adds a pixel, 0.03 ms; read nine times from the caches.
@triton.jit(do_not_specialize=(*_BAND, "begin", "end", "pixels_of_a_part"))
def _depthwise_weights_kernel(
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
    total = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    for start in range(first, last, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        known = (pixel < last)[:, None] & (channel < HIDDEN)[None, :]
        x = pixel % width
        y = pixel // width % rows
        image = pixel // width // rows
        row = _within(_reflected(first_row + y + tap // 3 - 1, height) - first_row, rows)
        column = _reflected(x + tap % 3 - 1, width)
        source = _pixel(image, row, column, rows, width)
        value = tl.load(
            hidden + source[:, None] * LAYER_WIDTH + channel[None, :], mask=known, other=0.0
        ).to(tl.float32)
        at = pixel.to(tl.int64)[:, None] * LAYER_WIDTH + channel[None, :]
        g = tl.load(gradient + at, mask=known, other=0.0).to(tl.float32)
        total += tl.sum(value * g, axis=0)
    target = partial + (part.to(tl.int64) * HIDDEN + channel) * 9 + tap
    tl.store(target, total, mask=channel < HIDDEN)


# ---- launches ----


@dataclass(frozen=True)
class Shape:
    """What the kernels are compiled for."""

    inputs: int
    channels: int
    kernel: int  # of the mix
    activation: str
    clamp: float  # 0 for none
    layers: torch.dtype  # of what lies in memory between the kernels, and of the products' factors

    @property
    def block_half(self) -> int:
        return max(16, triton.next_power_of_2(self.channels // 2))

    @property
    def padded_hidden(self) -> int:
        return launch.blocks(self.channels, BLOCK_HIDDEN) * BLOCK_HIDDEN

    @property
    def terms(self) -> int:
        """Products that make a channel of the mix."""
        return self.inputs * self.kernel**2

    @property
    def tile_rows(self) -> int:
        # So that two halves of the channels of a tile fit the registers of eight warps.
        return min(4, max(1, 256 // self.block_half))

    def constants(self, kernel: Any, **flags: bool) -> dict[str, Any]:
        """The compile-time arguments of a kernel."""
        known = {
            "INPUTS": self.inputs,
            "KERNEL": self.kernel,
            "HALF": self.channels // 2,
            "HIDDEN": self.channels,
            "BLOCK_HALF": self.block_half,
            "BLOCK_HIDDEN": BLOCK_HIDDEN,
            "PADDED_HIDDEN": self.padded_hidden,
            "BLOCK_INPUTS": BLOCK_INPUTS,
            "BLOCK_CHANNELS": 4,
            "TILE_ROWS": self.tile_rows,
            "TILE_COLUMNS": TILE_COLUMNS,
            "ACTIVATION": self.activation,
            "CLAMP": self.clamp,
            "OPERAND": _operand(self.layers),
            "PRECISION": "tf32x3",
            **flags,
        }
        return {name: known[name] for name in kernel.arg_names if name in known}


def _operand(layers: torch.dtype) -> Any:
    return {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }[layers]


def _interpreted(image: torch.dtype) -> bool:
    """Whether this is bfloat16 in Triton's interpreter, which can read it, but neither multiply it
    nor round to it: layers are float32 then, and PyTorch rounds the result."""
    return image == torch.bfloat16 and triton_is_interpreted()


@contextlib.contextmanager
def _written(image: Tensor) -> Iterator[Tensor]:
    """What kernels write in place of ``image``: itself, or what becomes it."""
    if not _interpreted(image.dtype):
        yield image
        return
    exact = torch.empty_like(image, dtype=torch.float32)
    yield exact
    image.copy_(exact)


@dataclass(frozen=True)
class Band:
    """Some images whole, or a band of rows of one: what is in memory at a time."""

    first_image: int
    images: int
    first_row: int
    rows: int
    # The rows whose results count, counted from the image's first; the others are their halo.
    own_begin: int
    own_end: int

    @property
    def pixels(self) -> int:
        """Of one column."""
        return self.images * self.rows


def bands(shape: torch.Size, halo: int, bytes_per_pixel: int) -> Iterator[Band]:
    """The bands of (B, any, H, W) images that keep within WORKSPACE_BYTES."""
    batch, _, height, width = shape
    images = WORKSPACE_BYTES // (bytes_per_pixel * height * width)
    if images > 0:
        for first in range(0, batch, images):
            yield Band(first, min(images, batch - first), 0, height, 0, height)
        return
    most = max(1, WORKSPACE_BYTES // (bytes_per_pixel * width) - 2 * halo)
    own = launch.blocks(height, launch.blocks(height, most))
    for image in range(batch):
        for begin in range(0, height, own):
            end = min(begin + own, height)
            first, last = max(begin - halo, 0), min(end + halo, height)
            yield Band(image, 1, first, last - first, begin, end)


class Run:
    """The kernels of one call, band by band. Arguments of a kernel are found by their names: layers
    and weights, strides, sizes of the band, compile-time constants."""

    def __init__(
        self,
        shape: Shape,
        weights: dict[str, Tensor],
        image: Tensor,
        halo: int,
        layers: dict[str, int],
    ) -> None:
        self.shape = shape
        self.image = image
        self.bands = list(bands(image.shape, halo, sum(layers.values()) * shape.layers.itemsize))
        pixels = max(band.pixels for band in self.bands) * image.shape[3]
        self.tensors = {name: w.contiguous() for name, w in weights.items()}
        for name, channels in layers.items():
            self.tensors[name] = image.new_empty((pixels, channels), dtype=shape.layers)
        # Images that a variant of a kernel leaves alone have strides of zero.
        self.strides = {f"{name}_{axis}": 0 for name in ("x", "y", "grad") for axis in _AXES}

    def add_image(self, name: str, image: Tensor, strides: str) -> None:
        self.tensors[name] = image
        for axis, stride in zip(_AXES, image.stride(), strict=True):
            self.strides[f"{strides}_{axis}"] = stride

    def start(self, kernel: Any, band: Band, second: int = 1, **flags: bool) -> None:
        height, width = self.image.shape[2:]
        known = {
            **self.tensors,
            **self.strides,
            "first_image": band.first_image,
            "first_row": band.first_row,
            "own_begin": band.own_begin,
            "own_end": band.own_end,
            "rows": band.rows,
            "height": height,
            "width": width,
        }
        # A layer that this variant of the kernel leaves alone has no memory; some pointer stands
        # for it.
        anything = self.tensors["z"]
        constants = self.shape.constants(kernel, **flags)
        arguments = {
            name: known.get(name, anything) for name in kernel.arg_names if name not in constants
        }
        tiles = launch.blocks(band.rows, self.shape.tile_rows) * launch.blocks(width, TILE_COLUMNS)
        kernel[(band.images * tiles, second)](
            **arguments, **constants, num_warps=NUM_WARPS, num_stages=NUM_STAGES
        )


def _named(tensors: list[Tensor]) -> dict[str, Tensor]:
    subnets = [f"{subnet}_{layer}" for subnet in ("phi", "rho", "eta") for layer in _LAYERS]
    return dict(zip(("mix", "bias", *subnets), tensors, strict=True))


_LAYERS = ("expand", "depthwise", "project")
_AXES = ("batch", "channel", "row", "column")


def _shape(
    weights: list[Tensor], activation: str, clamp: float | None, layers: torch.dtype
) -> Shape:
    channels, inputs, kernel, _ = weights[0].shape
    if _interpreted(layers):
        layers = torch.float32
    return Shape(inputs, channels, kernel, activation, clamp or 0.0, layers)


def forward(
    x: Tensor, y: Tensor, weights: list[Tensor], activation: str, clamp: float | None
) -> None:
    """Writes the block's value at x (B, inputs, H, W) into y (B, C, H, W), any strides. Beside them
    it needs 8 C values of the type of x for every pixel of a band (16 C bytes in float32 for c a
    power of 2 from 16 up)."""
    with launch.on_device_of(x), _written(y) as target:
        shape = _shape(weights, activation, clamp, x.dtype)
        hidden = shape.padded_hidden
        layers = {"z": 2 * shape.block_half, "hidden1": hidden, "hidden2": 2 * hidden}
        run = Run(shape, _named(weights), x, 2, layers)
        run.add_image("x", x, "x")
        run.add_image("y", target, "y")
        for band in run.bands:
            run.start(_mix_expand_kernel, band)
            run.start(_phi_expand_kernel, band, FOR_GRADIENT=False)
            run.start(_couple_kernel, band)


def inverse(
    y: Tensor, x: Tensor, weights: list[Tensor], activation: str, clamp: float | None
) -> None:
    """Writes the x whose value is y into x, both (B, C, H, W), any strides. ``weights`` begin with
    the inverse of the mix and minus its product with the bias. Layers are kept in float32."""
    with launch.on_device_of(y), _written(x) as target:
        matrix, bias, *rest = weights
        shape = _shape([matrix[:, :, None, None]], activation, clamp, torch.float32)
        hidden = shape.padded_hidden
        layers = {"z": shape.block_half, "hidden1": hidden, "hidden2": 2 * hidden}
        named = _named([matrix, bias, *rest])
        named["inverse"] = named.pop("mix")
        run = Run(shape, named, y, 2, layers)
        run.add_image("y", y, "y")
        run.add_image("x", target, "x")
        for band in run.bands:
            run.start(_expand_kernel, band)
            run.start(_uncouple_kernel, band)
            run.start(_unmix_kernel, band)


def backward(
    grad: Tensor,
    x: Tensor,
    grad_x: Tensor,
    weights: list[Tensor],
    activation: str,
    clamp: float | None,
    need_weights: bool,
) -> list[Tensor]:
    """Writes the gradient of x into grad_x, any strides; returns the float32 gradients of
    ``weights`` if they are needed, and keeps the layers in float32 then."""
    with launch.on_device_of(x), _written(grad_x) as target:
        shape = _shape(weights, activation, clamp, torch.float32 if need_weights else x.dtype)
        hidden, half = shape.padded_hidden, shape.block_half
        layers = {
            "z": 2 * half,
            "hidden1": hidden,
            "hidden2": 2 * hidden,
            "grad2": 2 * hidden,
            "mixed": 2 * half,
            "grad1": hidden,
        }
        if shape.kernel == 3:
            layers["products"] = shape.terms
        if need_weights:
            layers |= {
                "grad_rho": half,
                "depthwise2": 2 * hidden,
                "through2": 2 * hidden,
                "depthwise1": hidden,
                "through1": hidden,
            }
        run = Run(shape, _named(weights), x, 4 + shape.kernel // 2, layers)
        run.add_image("x", x, "x")
        totals = [torch.zeros_like(w, dtype=torch.float32) for w in weights] if need_weights else []
        for band in run.bands:
            run.add_image("x", x, "x")
            run.start(_mix_expand_kernel, band)
            run.start(_phi_expand_kernel, band, FOR_GRADIENT=True)
            run.add_image("grad", grad, "grad")
            run.start(_grad_hidden2_kernel, band, WITH_WEIGHTS=need_weights)
            run.start(_grad_z2_kernel, band, WITH_WEIGHTS=need_weights)
            run.add_image("grad_x", target, "x")
            run.start(_grad_mixed_kernel, band, WITH_WEIGHTS=need_weights)
            if shape.kernel == 3:
                run.start(_gather_kernel, band, launch.blocks(shape.inputs, 4))
            if need_weights:
                for total, more in zip(totals, _weight_gradients(run, band, grad, x), strict=True):
                    total += more.view(total.shape)
        return totals


def _pixel_major(image: Tensor, band: Band) -> Tensor:
    """[pixel][channel] of the band's own pixels, contiguous float32."""
    own = image.narrow(0, band.first_image, band.images)[:, :, band.own_begin : band.own_end]
    return own.permute(0, 2, 3, 1).float().flatten(0, 2).contiguous()


def _terms(x: Tensor, band: Band, kernel: int) -> Tensor:
    """[pixel][term] of the products of the mix, in the order of its weights."""
    if kernel == 1:
        return _pixel_major(x, band)
    height, width = x.shape[2:]
    rows = band.own_end - band.own_begin
    images = x.narrow(0, band.first_image, band.images)
    first, last = max(band.own_begin - 1, 0), min(band.own_end + 1, height)
    above, below = first - (band.own_begin - 1), band.own_end + 1 - last
    padded = F.pad(images[:, :, first:last].float(), (1, 1, above, below))
    taps = [padded[:, :, i : i + rows, j : j + width] for i in range(3) for j in range(3)]
    terms = torch.stack(taps, 2).permute(0, 3, 4, 1, 2)
    return terms.reshape(-1, x.shape[1] * 9).contiguous()  # of one image it is a view


def _weight_gradients(run: Run, band: Band, grad: Tensor, x: Tensor) -> list[Tensor]:
    """The band's part of the gradients of the weights, in the order of ``weights``."""
    shape, width = run.shape, x.shape[3]
    half, hidden = shape.channels // 2, shape.channels
    block, layers = shape.block_half, run.tensors
    begin = (band.own_begin - band.first_row) * width
    count = band.images * (band.own_end - band.own_begin) * width
    own = slice(begin, begin + count)

    def products(a: Tensor, a_count: int, b: Tensor, b_count: int) -> Tensor:
        return _outer_products(a[:, :a_count], b[:, :b_count])

    def depthwise(layer: Tensor, gradient: Tensor) -> Tensor:
        return _depthwise_products(run, band, layer, gradient, begin, begin + count)

    z, mixed = layers["z"][own], layers["mixed"][own]
    first, second = slice(shape.padded_hidden), slice(shape.padded_hidden, None)
    d1, d2 = mixed[:, :half], mixed[:, block : block + half]
    terms = _terms(x, band, shape.kernel)
    g1 = _pixel_major(grad[:, :half], band)
    return [
        torch.cat([_outer_products(d, terms) for d in (d1, d2)]),
        torch.cat([d1, d2], 1).sum(0),
        products(layers["through1"][own], hidden, z, half),
        depthwise(layers["hidden1"], layers["grad1"]),
        products(d2, half, layers["depthwise1"][own], hidden),
        products(layers["through2"][own], hidden, z[:, block:], half),
        depthwise(layers["hidden2"][:, first], layers["grad2"][:, first]),
        products(layers["grad_rho"][own], half, layers["depthwise2"][own], hidden),
        products(layers["through2"][own, second], hidden, z[:, block:], half),
        depthwise(layers["hidden2"][:, second], layers["grad2"][:, second]),
        products(g1, half, layers["depthwise2"][own, second], hidden),
    ]


def _parts(pixels: int) -> tuple[int, int]:
    """Parts of a sum over pixels, and the pixels of one: a function of the size alone."""
    parts = min(MOST_PARTS, launch.blocks(pixels, PIXELS_OF_A_PART))
    return parts, launch.blocks(pixels, parts)


def _outer_products(a: Tensor, b: Tensor) -> Tensor:
    """a^T b for [pixel][channel] float32 with contiguous channels, summed in a fixed order."""
    parts, pixels = _parts(a.shape[0])
    partial = a.new_empty((parts, a.shape[1], b.shape[1]))
    across = launch.blocks(a.shape[1], BLOCK_WEIGHTS), launch.blocks(b.shape[1], BLOCK_WEIGHTS)
    _weights_kernel[(parts, *across)](
        a,
        b,
        partial,
        0,
        a.shape[0],
        pixels,
        **_weights_constants(a.stride(0), a.shape[1], b.stride(0), b.shape[1]),
        num_warps=4,
        num_stages=NUM_STAGES,
    )
    return partial.sum(0)


def _weights_constants(a_width: int, a_count: int, b_width: int, b_count: int) -> dict[str, Any]:
    return {
        "A_WIDTH": a_width,
        "A_COUNT": a_count,
        "B_WIDTH": b_width,
        "B_COUNT": b_count,
        "BLOCK_A": BLOCK_WEIGHTS,
        "BLOCK_B": BLOCK_WEIGHTS,
        "BLOCK_PIXELS": 32,
        "PRECISION": "tf32x3",
    }


def _depthwise_products(
    run: Run, band: Band, layer: Tensor, gradient: Tensor, begin: int, end: int
) -> Tensor:
    """The gradient of a depthwise layer's weights over the pixels from begin to end."""
    parts, pixels = _parts(end - begin)
    hidden = run.shape.channels
    partial = layer.new_empty((parts, hidden, 9), dtype=torch.float32)
    _depthwise_weights_kernel[(parts, launch.blocks(hidden, BLOCK_HIDDEN), 9)](
        layer,
        gradient,
        partial,
        begin,
        end,
        pixels,
        band.first_row,
        band.rows,
        *run.image.shape[2:],
        **_depthwise_constants(layer.stride(0), hidden),
        num_warps=4,
        num_stages=NUM_STAGES,
    )
    return partial.sum(0)


def _depthwise_constants(layer_width: int, hidden: int) -> dict[str, Any]:
    return {
        "LAYER_WIDTH": layer_width,
        "HIDDEN": hidden,
        "BLOCK_HIDDEN": BLOCK_HIDDEN,
        "BLOCK_PIXELS": 64,
    }


# ---- what is compiled ahead of time ----

_IMAGES = ("x", "y", "grad", "grad_x")
_WEIGHTS = ("mix", "bias", "inverse", *(f"{s}_{w}" for s in ("phi", "rho", "eta") for w in _LAYERS))


def _configuration(
    kernel: Any, shape: Shape, image: torch.dtype, channels_last: bool, **flags: bool
) -> launch.Configuration:
    """One kernel for float32 weights and images of multiples of 16."""
    constants = shape.constants(kernel, **flags)
    types: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name.endswith("_channel" if channels_last else "_column"):
            constants[name] = 1
        elif name in _IMAGES:
            types[name] = launch.TYPES[image]
        elif name in _WEIGHTS:
            types[name] = "*fp32"
        elif name in (*_BAND, "width") or name.endswith(("_batch", "_channel", "_row", "_column")):
            types[name] = "i32"
        else:
            types[name] = launch.TYPES[shape.layers]
    layout = "channels_last" if channels_last else "NCHW"
    label = f"{str(image).removeprefix('torch.')} {layout} {shape.inputs} inputs"
    for name, value in flags.items():
        label += f" {name}={value}"
    return launch.Configuration(
        kernel,
        types,
        constants,
        NUM_WARPS,
        NUM_STAGES,
        label,
        frozenset(name for name in types if name not in _BAND),
    )


def _configurations() -> Iterator[launch.Configuration]:
    for image in launch.TYPES:
        for channels_last in (False, True):
            block = Shape(128, 128, 1, "relu6", 0.0, image)
            stem = Shape(3, 128, 3, "relu6", 0.0, image)

            def of(
                kernel: Any,
                shape: Shape = block,
                image: torch.dtype = image,
                channels_last: bool = channels_last,
                **flags: bool,
            ) -> launch.Configuration:
                return _configuration(kernel, shape, image, channels_last, **flags)

            yield of(_mix_expand_kernel)
            yield of(_mix_expand_kernel, stem)
            yield of(_phi_expand_kernel, FOR_GRADIENT=False)
            yield of(_phi_expand_kernel, FOR_GRADIENT=True)
            yield of(_couple_kernel)
            yield of(_grad_hidden2_kernel, WITH_WEIGHTS=False)
            yield of(_grad_z2_kernel, WITH_WEIGHTS=False)
            yield of(_grad_mixed_kernel, WITH_WEIGHTS=False)
            yield of(_grad_mixed_kernel, stem, WITH_WEIGHTS=False)
            yield of(_gather_kernel, stem)
            exact = Shape(128, 128, 1, "relu6", 0.0, torch.float32)
            yield of(_expand_kernel, exact)
            yield of(_uncouple_kernel, exact)
            yield of(_unmix_kernel, exact)
            if image == torch.float32:
                yield of(_grad_hidden2_kernel, WITH_WEIGHTS=True)
                yield of(_grad_z2_kernel, WITH_WEIGHTS=True)
                yield of(_grad_mixed_kernel, WITH_WEIGHTS=True)
    sizes = ("begin", "end", "pixels_of_a_part")
    yield launch.Configuration(
        _weights_kernel,
        {"a": "*fp32", "b": "*fp32", "partial": "*fp32", **dict.fromkeys(sizes, "i32")},
        _weights_constants(256, 128, 128, 64),
        4,
        NUM_STAGES,
        "float32",
        frozenset(("a", "b", "partial")),
    )
    band = ("first_row", "rows", "height", "width")
    yield launch.Configuration(
        _depthwise_weights_kernel,
        {
            "hidden": "*fp32",
            "gradient": "*fp32",
            "partial": "*fp32",
            **dict.fromkeys((*sizes, *band), "i32"),
        },
        _depthwise_constants(256, 128),
        4,
        NUM_STAGES,
        "float32",
        frozenset(("hidden", "gradient", "partial", "width")),
    )


CONFIGURATIONS: tuple[launch.Configuration, ...] = tuple(_configurations())
"""Every kernel as it is launched for 128 channels, a mix of 128 or a stem of 3 inputs."""
