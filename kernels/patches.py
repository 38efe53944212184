"""The strided patch projection and its gradients, in Triton. See mghf_fast/reference/patches.py for
the mathematics and mghf_fast/ops/patches.py for the state that the forward leaves.

Both layers are products of matrices whose rows are all pairs of a patch and a map. The order of the
rows follows the image's memory: maps run fastest in a channels_last image, patches in a contiguous
one. No patch is ever copied: a tile of patch pixels is gathered from the image when it is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mghf_fast.backends import can_run_triton
from mghf_fast.kernels.image import power_of_two
from mghf_fast.kernels.launch import (
    GRADIENT_PRECISION,
    MOST_REGISTERS,
    architecture_of,
    blocks,
    on_device_of,
)
from mghf_fast.kernels.patches_kernels import (
    forward_kernel,
    hidden_gradient_kernel,
    image_gradient_kernel,
    outer_product_kernel,
)
from mghf_fast.kernels.products import dot_precision
from mghf_fast.ops.layout import empty_like_laid_out

LARGEST_DIMENSION = 256
"""Most dimensions of an embedding: a program holds all of them, to normalise it."""

# ---- block sizes ----


FORWARD = {"num_warps": 8, "num_stages": 3}
HIDDEN_GRADIENT = {"num_warps": 8, "num_stages": 2}
IMAGE_GRADIENT = {"num_warps": 8, "num_stages": 2, "maxnreg": MOST_REGISTERS}
OUTER_PRODUCT = {"num_warps": 4, "num_stages": 3, "maxnreg": MOST_REGISTERS}


def _gradient_precision(precision: str) -> Any:
    return dot_precision(precision, GRADIENT_PRECISION.value)


def _forward_constants(
    patch_size: int,
    stride: int,
    hidden: int,
    dimension: int,
    maps_fastest: bool,
    vector: int,
    keep: bool,
    precision: str,
    architecture: int,
) -> dict[str, Any]:
    return {
        "PATCH": patch_size,
        "STRIDE": stride,
        "HIDDEN": hidden,
        "DIMENSION": dimension,
        "MAPS_FASTEST": maps_fastest,
        "VECTOR": vector,
        "KEEP_HIDDEN": keep,
        "PRECISION": dot_precision(precision, "tf32x3"),
        "BLOCK_M": 64 if architecture >= 90 else 32,  # sm_80 lacks the registers for more
        "BLOCK_H": power_of_two(hidden, 32, 128),
        "BLOCK_D": power_of_two(dimension, 16, LARGEST_DIMENSION),
        "BLOCK_K": power_of_two(patch_size * patch_size, 16, 32),
    }


def _hidden_gradient_constants(
    pixels: int,
    hidden: int,
    dimension: int,
    maps_fastest: bool,
    keep: bool,
    precision: str,
) -> dict[str, Any]:
    return {
        "PIXELS": pixels,
        "HIDDEN": hidden,
        "DIMENSION": dimension,
        "MAPS_FASTEST": maps_fastest,
        "KEEP_OUTPUT": keep,
        "PRECISION": _gradient_precision(precision),
        "BLOCK_M": 64 if dimension <= 64 else 32,
        "BLOCK_H": 32,
        "BLOCK_D": power_of_two(dimension, 16, LARGEST_DIMENSION),
        "BLOCK_WEIGHTS": 256,
    }


def _image_gradient_constants(
    patch_size: int,
    stride: int,
    hidden: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    maps_fastest: bool,
    vector: int,
    add: bool,
    precision: str,
) -> dict[str, Any]:
    terms = blocks(patch_size, stride)
    full = patch_size - (terms - 1) * stride  # pixels of a cell that `terms` patches cover
    cell_height, cell_width = min(stride, height), min(stride, width)
    top, left = min(full, cell_height), min(full, cell_width)
    bottom, right = cell_height - top, cell_width - left
    block = power_of_two(cell_height * cell_width, 16, 64)
    sizes = [top * left, top * right, bottom * left, bottom * right]
    tiles = [blocks(size, block) for size in sizes]
    return {
        "PATCH": patch_size,
        "STRIDE": stride,
        "HIDDEN": hidden,
        "TERMS": terms,
        "CELL_HEIGHT": cell_height,
        "CELL_WIDTH": cell_width,
        "TOP": top,
        "LEFT": left,
        "TOP_RIGHT": tiles[0],
        "BOTTOM_LEFT": sum(tiles[:2]),
        "BOTTOM_RIGHT": sum(tiles[:3]),
        "TILES": sum(tiles),
        "ADD": add,
        # TF32's error, 3e-4, is a sixth of that of rounding the result to bfloat16; the error of
        # three bfloat16 products, 5e-6, is a twentieth of what a gradient may have.
        "PRECISION": (
            "tf32"
            if dtype == torch.bfloat16 and precision == "float32"
            else _gradient_precision(precision)
        ),
        "MAPS_FASTEST": maps_fastest,
        "VECTOR": vector,
        "BLOCK_M": 128,
        "BLOCK_N": block,
        "BLOCK_K": power_of_two(hidden, 16, 32),
    }


def _outer_product_constants(
    m: int,
    n: int,
    patch_size: int,
    stride: int,
    implicit: bool,
    maps_fastest: bool,
    vector: int,
    precision: str,
) -> dict[str, Any]:
    return {
        "M": m,
        "N": n,
        "PATCH": patch_size,
        "STRIDE": stride,
        "IMPLICIT": implicit,
        "PRECISION": _gradient_precision(precision),
        "MAPS_FASTEST": maps_fastest,
        "VECTOR": vector,
        "BLOCK_M": power_of_two(m, 16, 64),
        "BLOCK_N": power_of_two(n, 16, 64),
        "BLOCK_K": 32,
    }


# ---- launches ----


def _maps_fastest(x: Tensor) -> bool:
    """Whether neighbouring maps are closer to each other in memory than neighbouring pixels."""
    return x.stride(1) < x.stride(3)


def _vector(x: Tensor) -> int:
    """How many maps of a pixel can be loaded as one aligned vector, at every pixel."""
    sizes = (x.shape[1], x.stride(0), x.stride(2), x.stride(3))
    together = x.stride(1) == 1 and all(size % 16 == 0 for size in sizes)
    return 16 // x.element_size() if _maps_fastest(x) and together else 1


class _Geometry:
    """Counts of maps, patches and cells of an image."""

    def __init__(self, x: Tensor, patch_size: int, stride: int) -> None:
        batch, self.channels, self.height, self.width = x.shape
        self.maps = batch * self.channels
        self.patch_rows = (self.height - patch_size) // stride + 1
        self.patch_columns = (self.width - patch_size) // stride + 1
        self.patches = self.patch_rows * self.patch_columns
        self.cell_columns = blocks(self.width, stride)
        self.cells = blocks(self.height, stride) * self.cell_columns
        self.rows = self.maps * self.patches
        self.strides = x.stride()


def _forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
    precision: str,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    g = _Geometry(x, patch_size, stride)
    units, dimension = weight1.shape[0], weight2.shape[0]
    embedding = x.new_empty((g.maps, g.patches, dimension), dtype=torch.float32)
    state = x.new_empty((g.patches, 1 + blocks(units, 32), g.maps), dtype=torch.int32)
    if g.rows == 0:
        return embedding, state
    keep = hidden is not None
    constants = _forward_constants(
        patch_size,
        stride,
        units,
        dimension,
        _maps_fastest(x),
        _vector(x),
        keep,
        precision,
        architecture_of(x),
    )
    with on_device_of(x):
        forward_kernel[(blocks(g.rows, constants["BLOCK_M"]),)](
            x,
            *(p.float().contiguous() for p in (weight1, bias1, weight2, bias2)),
            embedding,
            state,
            embedding if hidden is None else hidden,
            g.rows,
            g.maps,
            g.channels,
            g.patches,
            g.patch_columns,
            *g.strides,
            **constants,
            **FORWARD,
        )
    return embedding, state


def forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """The embeddings (B C, N, D), float32, and the state described in mghf_fast/ops/patches.py."""
    return _forward(x, weight1, bias1, weight2, bias2, patch_size, stride, precision, None)


def _hidden_gradient(
    grad: Tensor,
    embedding: Tensor,
    state: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    g: _Geometry,
    maps_fastest: bool,
    precision: str,
    output: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradient before the ReLU, (rows, hidden), and the transpose of ``weight1``, float32. Also
    stores the gradient of y in ``output``, (rows, D)."""
    units, dimension = weight1.shape[0], weight2.shape[0]
    result = grad.new_empty((g.rows, units), dtype=torch.float32)
    pixels, keep = weight1.shape[1], output is not None
    transposed = grad.new_empty((pixels, units), dtype=torch.float32)
    constants = _hidden_gradient_constants(pixels, units, dimension, maps_fastest, keep, precision)
    with on_device_of(grad):
        hidden_gradient_kernel[(blocks(g.rows, constants["BLOCK_M"]),)](
            grad,
            embedding,
            state,
            weight1.contiguous(),
            weight2.float().contiguous(),
            transposed,
            result,
            result if output is None else output,
            g.rows,
            g.maps,
            g.patches,
            state.stride(0),
            state.stride(1),
            *grad.stride(),
            **constants,
            **HIDDEN_GRADIENT,
        )
    return result, transposed


def _image_gradient(
    grad_x: Tensor,
    grad_hidden: Tensor,
    transposed: Tensor,
    patch_size: int,
    stride: int,
    g: _Geometry,
    maps_fastest: bool,
    add: bool,
    precision: str,
) -> None:
    """Writes the gradient of x to ``grad_x``, or adds it, with the transpose of ``weight1``."""
    constants = _image_gradient_constants(
        patch_size,
        stride,
        transposed.shape[1],
        g.height,
        g.width,
        grad_x.dtype,
        maps_fastest,
        _vector(grad_x) if maps_fastest else 1,
        add,
        precision,
    )
    rows = g.maps * g.cells
    with on_device_of(grad_x):
        image_gradient_kernel[(blocks(rows, constants["BLOCK_M"]) * constants["TILES"],)](
            grad_hidden,
            transposed,
            grad_x,
            rows,
            g.maps,
            g.channels,
            g.cells,
            g.cell_columns,
            g.patches,
            g.patch_rows,
            g.patch_columns,
            g.height,
            g.width,
            *grad_x.stride(),
            **constants,
            **IMAGE_GRADIENT,
        )


def _backward_x(
    grad_x: Tensor,
    grad: Tensor,
    embedding: Tensor,
    state: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    patch_size: int,
    stride: int,
    precision: str,
    *,
    add: bool,
) -> None:
    """Writes the gradient of x to ``grad_x``, or adds it to the values there."""
    if grad_x.numel() == 0:
        return
    g, maps_fastest = _Geometry(grad_x, patch_size, stride), _maps_fastest(grad_x)
    given = (grad, embedding, state, weight1, weight2)
    hidden, transposed = _hidden_gradient(*given, g, maps_fastest, precision, None)
    _image_gradient(grad_x, hidden, transposed, patch_size, stride, g, maps_fastest, add, precision)


def _outer_product(
    left: Tensor,
    right: Tensor,
    n: int,
    g: _Geometry,
    patch_size: int,
    stride: int,
    implicit: bool,
    maps_fastest: bool,
    precision: str,
) -> Tensor:
    """left^T right over all rows, (M, n), float32."""
    m = left.shape[1]
    vector = _vector(right) if implicit else 1
    constants = _outer_product_constants(
        m, n, patch_size, stride, implicit, maps_fastest, vector, precision
    )
    tiles = blocks(m, constants["BLOCK_M"]), blocks(n, constants["BLOCK_N"])
    # Enough programs to fill a GPU, but at least 256 rows for each partial result.
    splits = max(1, min(512 // (tiles[0] * tiles[1]), 64, g.rows // 256))
    run = blocks(blocks(g.rows, splits), constants["BLOCK_K"]) * constants["BLOCK_K"]
    splits = blocks(g.rows, run)
    partial = left.new_empty((splits, m, n), dtype=torch.float32)
    grid = (splits, *tiles)
    with on_device_of(left):
        outer_product_kernel[grid](
            left,
            right,
            partial,
            g.rows,
            run,
            g.maps,
            g.channels,
            g.patches,
            g.patch_columns,
            *g.strides,
            **constants,
            **OUTER_PRODUCT,
        )
    return partial.sum(0)


def add_backward(
    grad_x: Tensor,
    grad: Tensor,
    embedding: Tensor,
    state: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
    precision: str = "float32",
) -> None:
    """Adds the gradient of x to ``grad_x``."""
    saved = (grad, embedding, state)
    _backward_x(grad_x, *saved, weight1, weight2, patch_size, stride, precision, add=True)


def backward(
    grad: Tensor,
    embedding: Tensor,
    state: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
    need_weights: bool,
    precision: str = "float32",
) -> list[Tensor]:
    """The gradient of x, laid out as x, followed by those of the weights and biases if they are
    needed."""
    grad_x, saved, sizes = empty_like_laid_out(x), (grad, embedding, state), (patch_size, stride)
    if not need_weights:
        _backward_x(grad_x, *saved, weight1, weight2, *sizes, precision, add=False)
        return [grad_x]
    parameters = (weight1, bias1, weight2, bias2)
    if x.numel() == 0:
        return [
            grad_x,
            *(p.new_zeros(p.shape) for p in parameters),
        ]
    g, maps_fastest = _Geometry(x, patch_size, stride), _maps_fastest(x)
    units, dimension = weight1.shape[0], weight2.shape[0]
    hidden = x.new_empty((g.rows, units), dtype=torch.float32)
    _forward(x, *parameters, *sizes, precision, hidden)
    grad_y = x.new_empty((g.rows, dimension), dtype=torch.float32)
    grad_hidden, transposed = _hidden_gradient(
        grad, embedding, state, weight1, weight2, g, maps_fastest, precision, grad_y
    )
    _image_gradient(grad_x, grad_hidden, transposed, *sizes, g, maps_fastest, False, precision)
    grads = (
        _outer_product(grad_hidden, x, weight1.shape[1], g, *sizes, True, maps_fastest, precision),
        grad_hidden.sum(0),
        _outer_product(grad_y, hidden, units, g, *sizes, False, maps_fastest, precision),
        grad_y.sum(0),
    )
    return [grad_x, *(g.to(p.dtype) for g, p in zip(grads, parameters, strict=True))]


def can_run(*tensors: Tensor, **options: Any) -> str | None:
    if (reason := can_run_triton(*tensors)) is not None or len(tensors) < 5:
        return reason
    if (dimension := tensors[3].shape[0]) > LARGEST_DIMENSION:
        return (
            "one of its programs holds all dimensions of an embedding, at most "
            f"{LARGEST_DIMENSION}, and weight2 has {dimension}"
        )
    return None
