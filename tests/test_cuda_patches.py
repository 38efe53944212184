"""The CUDA kernels of `patches` on the host: races and accesses out of bounds. test_patches.py
checks values, with the backend "cuda"."""

from __future__ import annotations

from pathlib import Path

import draws
import numpy as np
import pytest
import torch
from contract import relative_error
from emulated import Call, needs_modules, results, strided
from torch import Tensor

from mghf_fast.reference import patches as reference

pytestmark = needs_modules

# batch, channels, height, width, patch size, stride, hidden, dimension, channels_last: cells with
# one to four patches, more units, dimensions, rows and pixels of a cell than a block has at a time,
# copies by 16 bytes and number by number.
PROBLEMS = [
    (1, 5, 9, 11, 5, 3, 9, 5, False),
    (1, 8, 44, 44, 8, 4, 40, 16, True),
    (2, 1, 24, 40, 16, 12, 140, 70, False),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def problem(number: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], int, int]:
    *shape, size, stride, hidden, dimension, channels_last = PROBLEMS[number]
    torch.manual_seed(number)
    x = draws.randn(*shape).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    shapes = [(hidden, size * size), (hidden,), (dimension, hidden), (dimension,)]
    return x, [draws.randn(s) / s[-1] ** 0.5 for s in shapes], size, stride


def test_long_sums_are_exact(tmp_path: Path) -> None:
    """Sums of 1024 products, in which tensor cores alone would err by 7e-6."""
    torch.manual_seed(0)
    x, shapes = draws.rand(1, 4, 40, 56), [(128, 1024), (128,), (64, 128), (64,)]
    weights = [draws.randn(s) / s[-1] ** 0.5 for s in shapes]
    call: Call = ("patches", (strided(x), *map(strided, weights), 32, 8))
    ((embedding, _),) = results("plain", [call], tmp_path)
    exact = [w.double() for w in weights]
    expected = reference.patch_projection(x.double(), *exact, 32, 8)
    assert relative_error(torch.from_numpy(embedding), expected) <= 1e-6


@pytest.mark.parametrize("kind", ["thread", "address"])
@pytest.mark.parametrize("number", range(len(PROBLEMS)))
def test_patches(kind: str, number: int, tmp_path: Path) -> None:
    x, w, size, stride = problem(number, DTYPES[number])
    options, parameters = (size, stride), [strided(p) for p in w]
    forward: Call = ("patches", (strided(x), *parameters, *options))
    ((embedding, state),) = results(kind, [forward], tmp_path)
    exact = [p.double() for p in w]
    expected = reference.patch_projection(x.double(), *exact, *options)
    assert relative_error(torch.from_numpy(embedding), expected) <= 1e-5

    grad = draws.randn(embedding.shape)
    saved = (grad.numpy(), embedding, state)
    w1, b1, w2, _ = parameters
    calls: list[Call] = [
        ("patches_backward", (*saved, strided(x), w1, w2, *options)),
        ("patches_backward_add_", (strided(x), *saved, w1, w2, *options)),
        ("patches_backward_weights", (*saved, strided(x), w1, b1, w2, *options)),
    ]
    found, _, weights = results(kind, calls, tmp_path)
    grad_x, grad_weights = reference.patch_projection_backward(
        grad.double(), x.double(), *exact, *options, True
    )
    got = torch.from_numpy(np.asarray(found))
    if x.dtype == torch.bfloat16:
        got = got.view(torch.bfloat16)
    assert relative_error(got, grad_x) <= 2 * relative_error(grad_x.to(x.dtype), grad_x) + 1e-5
    for array, want in zip(weights, grad_weights, strict=True):
        assert relative_error(torch.from_numpy(array), want) <= 1e-5
