"""Patch embeddings of feature maps (the first half of MGHF's local information preservation).

    patches of every map, `patch_size` square, every `stride` pixels, no padding, row-major
    y = W2 relu(W1 patch + b1) + b2,   embedding = y / (|y| + 1e-7)

The first layer is a strided convolution with one input channel, so no patch is ever copied.
Gradient: d_y = (d_e - y <d_e, y> / (|y| (|y| + 1e-7))) / (|y| + 1e-7); then the two layers'.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ..backends import can_run_reference
from ..ops.vocabulary import patches_shapes
from ..precision import accumulation_dtype

NORM_FLOOR = 1e-7


def _hidden(x: Tensor, weight1: Tensor, bias1: Tensor, patch_size: int, stride: int) -> Tensor:
    """(B, C, H, W) -> (B C, hidden, rows, columns), before the ReLU."""
    maps = x.reshape(-1, 1, *x.shape[2:])
    return F.conv2d(maps, weight1.view(-1, 1, patch_size, patch_size), bias1, stride=stride)


def patch_projection(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
) -> Tensor:
    """(B, C, H, W) -> (B C, N, D), rows of unit length; float32 for half precision."""
    dtype = accumulation_dtype(x.dtype)
    w1, b1, w2, b2 = (t.to(dtype) for t in (weight1, bias1, weight2, bias2))
    hidden = F.relu(_hidden(x.to(dtype), w1, b1, patch_size, stride))
    y = F.linear(hidden.flatten(2).mT, w2, b2)
    return y / (torch.linalg.vector_norm(y, dim=2, keepdim=True) + NORM_FLOOR)


def patch_projection_backward(
    grad: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    patch_size: int,
    stride: int,
    need_weights: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of ``x`` and, with ``need_weights``, of the two weights and biases in order."""
    dtype = accumulation_dtype(x.dtype)
    w1, b1, w2, b2 = (t.to(dtype) for t in (weight1, bias1, weight2, bias2))
    before = _hidden(x.to(dtype), w1, b1, patch_size, stride)
    hidden = F.relu(before).flatten(2).mT
    y = F.linear(hidden, w2, b2)

    norm = torch.linalg.vector_norm(y, dim=2, keepdim=True)
    # At y = 0 the product <d_e, y> is 0 as well; the clamp only keeps 0/0 away.
    along = (grad.to(dtype) * y).sum(2, keepdim=True) / norm.clamp_min(torch.finfo(dtype).tiny)
    grad_y = (grad.to(dtype) - y * (along / (norm + NORM_FLOOR))) / (norm + NORM_FLOOR)
    grad_before = (grad_y @ w2).mT.reshape(before.shape) * (before > 0)

    kernel = w1.view(-1, 1, patch_size, patch_size)
    grad_maps = F.conv_transpose2d(grad_before, kernel, stride=stride)
    beyond_last_patch = [0, x.shape[3] - grad_maps.shape[3], 0, x.shape[2] - grad_maps.shape[2]]
    grad_x = F.pad(grad_maps, beyond_last_patch).view(x.shape).to(x.dtype)
    if not need_weights:
        return grad_x, []
    maps = x.to(dtype).reshape(-1, 1, *x.shape[2:])
    grad_weights = [
        conv2d_weight(maps, list(kernel.shape), grad_before, stride=stride).view(w1.shape),
        grad_before.sum((0, 2, 3)),
        grad_y.reshape(-1, w2.shape[0]).mT @ hidden.reshape(-1, w2.shape[1]),
        grad_y.sum((0, 1)),
    ]
    parameters = (weight1, bias1, weight2, bias2)
    return grad_x, [g.to(p.dtype) for g, p in zip(grad_weights, parameters, strict=True)]


# ---- as a backend: the state for the backward is left at 0, which starts from the image ----


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
    embedding = patch_projection(x, weight1, bias1, weight2, bias2, patch_size, stride)
    _, shape = patches_shapes(x, weight1, weight2, patch_size, stride)
    return embedding, x.new_zeros(shape, dtype=torch.int32)


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
    parameters = (weight1, bias1, weight2, bias2)
    grad_x, grads = patch_projection_backward(
        grad, x, *parameters, patch_size, stride, need_weights
    )
    return [grad_x, *grads]


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
    parameters = (weight1, bias1, weight2, bias2)
    grad_x += patch_projection_backward(grad, x, *parameters, patch_size, stride, False)[0]


can_run = can_run_reference
