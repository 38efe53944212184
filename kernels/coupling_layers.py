"""Functions of the Triton kernels of `coupling`: activations, tiles of pixels, products with
weights, depthwise layers."""

from __future__ import annotations

import triton
import triton.language as tl

from mghf_fast.kernels.products import dot

# Sizes that differ from band to band: specialising to them would compile the kernel for each.
BAND = ("first_image", "first_row", "own_begin", "own_end", "rows", "height")


# ---- pointwise ----


@triton.jit
def activated(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    # Comparisons, not minimum and maximum: a NaN must stay one.
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
def slope(value: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
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
def log_scale_of(raw: tl.tensor, CLAMP: tl.constexpr) -> tl.tensor:
    if CLAMP > 0.0:
        return CLAMP * _tanh(raw / CLAMP)
    else:
        return raw


# ---- tiles ----


@triton.jit
def tile_of(
    number: tl.tensor | None,
    rows: tl.tensor,
    width: tl.tensor,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """The image of the band, and the rows (counted from the band's first) and columns of the pixels
    of a tile, some of which may be beyond the last. Without a number it is the program's."""
    across = tl.cdiv(width, TILE_COLUMNS)
    down = tl.cdiv(rows, TILE_ROWS)
    tile = tl.program_id(0) if number is None else number
    pixel = tl.arange(0, TILE_ROWS * TILE_COLUMNS)
    y = tile // across % down * TILE_ROWS + pixel // TILE_COLUMNS
    x = tile % across * TILE_COLUMNS + pixel % TILE_COLUMNS
    return tile // (across * down), y, x


@triton.jit
def pixel_of(
    image: tl.tensor, y: tl.tensor, x: tl.tensor, rows: tl.tensor, width: tl.tensor
) -> tl.tensor:
    """The index of a pixel of the band."""
    return ((image * rows + y) * width + x).to(tl.int64)


@triton.jit
def offsets_of(
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
def kept(value: tl.tensor, channel: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """``value`` with zeros in the channels beyond the last, where a zero weight times infinity may
    have given NaN."""
    if value.shape[1] > COUNT:
        value = tl.where((channel < COUNT)[None, :], value, 0.0)
    return value


@triton.jit
def matrix(
    pointer: tl.tensor,
    k: tl.tensor,
    n: tl.tensor,
    K_STRIDE: tl.constexpr,
    N_STRIDE: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
) -> tl.tensor:
    """Elements [k, n] of a matrix of weights, zero beyond K and N."""
    known = (k < K)[:, None] & (n < N)[None, :]
    at = pointer + k[:, None] * K_STRIDE + n[None, :] * N_STRIDE
    return tl.load(at, mask=known, other=0.0).to(tl.float32)


@triton.jit
def product(
    a: tl.tensor, b: tl.tensor, total: tl.tensor, OPERAND: tl.constexpr, PRECISION: tl.constexpr
) -> tl.tensor:
    return dot(a.to(OPERAND), b.to(OPERAND), total, PRECISION)


# ---- the depthwise layers ----


@triton.jit
def reflected(i: tl.tensor, n: tl.tensor) -> tl.tensor:
    """Index i reflected at the borders; a side of length one is repeated. The result is always
    within 0 and n - 1."""
    i = tl.abs(i)
    i = tl.where(i < n, i, 2 * (n - 1) - i)
    return tl.maximum(i, 0)


@triton.jit
def within(y: tl.tensor, rows: tl.tensor) -> tl.tensor:
    """Row y clamped to the band. Rows outside are only read for results that nobody uses."""
    return tl.minimum(tl.maximum(y, 0), rows - 1)


@triton.jit
def depthwise(
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
    sub-network's first channel in a layer of LAYER_WIDTH channels."""
    total = tl.zeros((y.shape[0], channel.shape[0]), tl.float32)
    # A loop, because the loads of nine copies of its body would overflow the registers.
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
def depthwise_transposed(
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
        # Rows outside the band are only read for results that nobody uses.
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
