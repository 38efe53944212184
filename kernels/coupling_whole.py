"""Triton kernels that are a whole `coupling`, or its gradient in the image: the kernels of
coupling_forward.py and of coupling_backward.py band by band in one launch."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from mghf_fast.kernels.coupling_backward import (
    gather_kernel,
    grad_hidden2_kernel,
    grad_mixed_kernel,
    grad_z2_kernel,
)
from mghf_fast.kernels.coupling_forward import couple, mix_expand_kernel, phi_expand_kernel
from mghf_fast.kernels.turns import draw, leave, wait

CUT = ("batch", "images", "own_rows", "height", "tiles")
"""Sizes on which the code of the kernels does not depend."""


@triton.jit
def _band(
    number: tl.tensor,
    batch: tl.tensor,
    images: tl.tensor,
    own_rows: tl.tensor,
    height: tl.tensor,
    HALO: tl.constexpr,
) -> Any:
    """The first image of a band and how many it has, its first row and how many, and the rows whose
    results count: `Band` of coupling.py. A band of several images has all of their rows."""
    per_image = tl.cdiv(height, own_rows)
    first_image = number // per_image * images
    begin = number % per_image * own_rows
    end = tl.minimum(begin + own_rows, height)
    first_row = tl.maximum(begin - HALO, 0)
    rows = tl.minimum(end + HALO, height) - first_row
    return first_image, tl.minimum(images, batch - first_image), first_row, rows, begin, end


FORWARD_STEPS = tl.constexpr(3)


@triton.jit(do_not_specialize=CUT)
def forward_kernel(
    counters: tl.tensor,
    x: tl.tensor,
    mix: tl.tensor,
    bias: tl.tensor,
    phi_expand: tl.tensor,
    phi_depthwise: tl.tensor,
    phi_project: tl.tensor,
    rho_expand: tl.tensor,
    rho_depthwise: tl.tensor,
    rho_project: tl.tensor,
    eta_expand: tl.tensor,
    eta_depthwise: tl.tensor,
    eta_project: tl.tensor,
    z: tl.tensor,
    hidden1: tl.tensor,
    hidden2: tl.tensor,
    y: tl.tensor,
    x_batch: tl.tensor,
    x_channel: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    y_batch: tl.tensor,
    y_channel: tl.tensor,
    y_row: tl.tensor,
    y_column: tl.tensor,
    batch: tl.tensor,
    images: tl.tensor,
    own_rows: tl.tensor,
    height: tl.tensor,
    tiles: tl.tensor,
    width: tl.tensor,
    HALO: tl.constexpr,
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
    CLAMP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    drawn = draw(counters)
    wait(counters, drawn // tiles * tiles)
    step = drawn // tiles % FORWARD_STEPS
    tile = drawn % tiles
    first_image, count, first_row, rows, own_begin, own_end = _band(
        drawn // tiles // FORWARD_STEPS, batch, images, own_rows, height, HALO
    )
    if tile < count * tl.cdiv(rows, TILE_ROWS) * tl.cdiv(width, TILE_COLUMNS):
        if step == 0:
            mix_expand_kernel(
                x, mix, bias, phi_expand, z, hidden1, x_batch, x_channel, x_row, x_column, tile,
                first_image, first_row, rows, height, width, INPUTS, KERNEL, HALF, HIDDEN,
                BLOCK_HALF, BLOCK_HIDDEN, PADDED_HIDDEN, BLOCK_INPUTS, TILE_ROWS, TILE_COLUMNS,
                ACTIVATION, OPERAND, PRECISION,
            )  # fmt: skip
        elif step == 1:
            phi_expand_kernel(
                hidden1, phi_depthwise, phi_project, rho_expand, eta_expand, z, hidden2, y,
                y_batch, y_channel, y_row, y_column, tile, first_image, first_row, own_begin,
                own_end, rows, height, width, False, HALF, HIDDEN, BLOCK_HALF, BLOCK_HIDDEN,
                PADDED_HIDDEN, TILE_ROWS, TILE_COLUMNS, ACTIVATION, OPERAND, PRECISION,
            )  # fmt: skip
        else:
            couple(
                hidden2, rho_depthwise, rho_project, eta_depthwise, eta_project, z, y, y_batch,
                y_channel, y_row, y_column, tile, first_image, first_row, own_begin, own_end,
                rows, height, width, HALF, HIDDEN, BLOCK_HALF, BLOCK_HIDDEN, PADDED_HIDDEN,
                TILE_ROWS, TILE_COLUMNS, ACTIVATION, CLAMP, OPERAND, PRECISION,
            )  # fmt: skip
    leave(counters, y)


BACKWARD_STEPS = tl.constexpr(5)


@triton.jit(do_not_specialize=CUT)
def backward_kernel(
    counters: tl.tensor,
    x: tl.tensor,
    mix: tl.tensor,
    bias: tl.tensor,
    phi_expand: tl.tensor,
    phi_depthwise: tl.tensor,
    phi_project: tl.tensor,
    rho_expand: tl.tensor,
    rho_depthwise: tl.tensor,
    rho_project: tl.tensor,
    eta_expand: tl.tensor,
    eta_depthwise: tl.tensor,
    eta_project: tl.tensor,
    z: tl.tensor,
    hidden1: tl.tensor,
    hidden2: tl.tensor,
    grad2: tl.tensor,
    mixed: tl.tensor,
    grad1: tl.tensor,
    products: tl.tensor,
    grad: tl.tensor,
    grad_x: tl.tensor,
    x_batch: tl.tensor,
    x_channel: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    grad_batch: tl.tensor,
    grad_channel: tl.tensor,
    grad_row: tl.tensor,
    grad_column: tl.tensor,
    grad_x_batch: tl.tensor,
    grad_x_channel: tl.tensor,
    grad_x_row: tl.tensor,
    grad_x_column: tl.tensor,
    batch: tl.tensor,
    images: tl.tensor,
    own_rows: tl.tensor,
    height: tl.tensor,
    tiles: tl.tensor,
    width: tl.tensor,
    HALO: tl.constexpr,
    INPUTS: tl.constexpr,
    KERNEL: tl.constexpr,
    HALF: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    PADDED_HIDDEN: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
) -> None:
    STEPS: tl.constexpr = BACKWARD_STEPS + (1 if KERNEL == 3 else 0)
    drawn = draw(counters)
    wait(counters, drawn // tiles * tiles)
    step = drawn // tiles % STEPS
    tile = drawn % tiles
    first_image, count, first_row, rows, own_begin, own_end = _band(
        drawn // tiles // STEPS, batch, images, own_rows, height, HALO
    )
    if tile < count * tl.cdiv(rows, TILE_ROWS) * tl.cdiv(width, TILE_COLUMNS):
        if step == 0:
            mix_expand_kernel(
                x, mix, bias, phi_expand, z, hidden1, x_batch, x_channel, x_row, x_column, tile,
                first_image, first_row, rows, height, width, INPUTS, KERNEL, HALF, HIDDEN,
                BLOCK_HALF, BLOCK_HIDDEN, PADDED_HIDDEN, BLOCK_INPUTS, TILE_ROWS, TILE_COLUMNS,
                ACTIVATION, OPERAND, PRECISION,
            )  # fmt: skip
        elif step == 1:
            phi_expand_kernel(
                hidden1, phi_depthwise, phi_project, rho_expand, eta_expand, z, hidden2, z, 0, 0,
                0, 0, tile, first_image, first_row, own_begin, own_end, rows, height, width,
                True, HALF, HIDDEN, BLOCK_HALF, BLOCK_HIDDEN, PADDED_HIDDEN, TILE_ROWS,
                TILE_COLUMNS, ACTIVATION, OPERAND, PRECISION,
            )  # fmt: skip
        elif step == 2:
            grad_hidden2_kernel(
                grad, hidden2, z, rho_depthwise, rho_project, eta_depthwise, eta_project, grad2,
                mixed, z, z, grad_batch, grad_channel, grad_row, grad_column, tile, first_image,
                first_row, rows, height, width, False, HALF, HIDDEN, BLOCK_HALF, BLOCK_HIDDEN,
                PADDED_HIDDEN, TILE_ROWS, TILE_COLUMNS, ACTIVATION, CLAMP, OPERAND,
                GRADIENT_PRECISION,
            )  # fmt: skip
        elif step == 3:
            grad_z2_kernel(
                grad, grad2, hidden2, hidden1, rho_depthwise, rho_expand, eta_depthwise,
                eta_expand, phi_depthwise, phi_project, mixed, grad1, z, z, grad_batch,
                grad_channel, grad_row, grad_column, tile, first_image, first_row, rows, height,
                width, False, HALF, HIDDEN, BLOCK_HALF, BLOCK_HIDDEN, PADDED_HIDDEN, TILE_ROWS,
                TILE_COLUMNS, ACTIVATION, OPERAND, GRADIENT_PRECISION,
            )  # fmt: skip
        elif step == 4:
            grad_mixed_kernel(
                grad1, hidden1, phi_depthwise, phi_expand, mix, mixed, z, products, grad_x,
                grad_x_batch, grad_x_channel, grad_x_row, grad_x_column, tile, first_image,
                first_row, own_begin, own_end, rows, height, width, False, INPUTS, KERNEL, HALF,
                HIDDEN, BLOCK_HALF, BLOCK_HIDDEN, PADDED_HIDDEN, BLOCK_INPUTS, TILE_ROWS,
                TILE_COLUMNS, ACTIVATION, OPERAND, GRADIENT_PRECISION,
            )  # fmt: skip
        elif KERNEL == 3:
            gather_kernel(
                products, grad_x, grad_x_batch, grad_x_channel, grad_x_row, grad_x_column, tile,
                first_image, first_row, own_begin, own_end, rows, height, width, INPUTS,
                BLOCK_CHANNELS, TILE_ROWS, TILE_COLUMNS,
            )  # fmt: skip
    leave(counters, grad_x)
