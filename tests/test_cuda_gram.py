"""The CUDA kernels of `gram` on the host, against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import contract
import draws
import pytest
import torch
from emulated import KINDS, needs_modules, results, strided
from torch import Tensor

from mghf_fast.reference.gram import gram_matrix, gram_matrix_backward

pytestmark = needs_modules

SCALE = 0.37


def images() -> Iterator[Tensor]:
    """Every type and layout, one pixel, one map, more maps than a block holds, several runs."""
    for size in ((6, 9), (4, 8)):
        x = draws.randn(2, 7, *size)
        for dtype in contract.DTYPES:
            yield x.to(dtype)
            for _, other in contract.image_layouts(x.to(dtype)):
                yield other
    yield draws.randn(1, 1, 1, 1)
    yield draws.randn(2, 3, 33, 32)
    many = draws.randn(1, 140, 3, 5)
    yield many
    yield many.contiguous(memory_format=torch.channels_last).half()
    yield draws.randn(1, 66, 41, 40) + 3


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    of = list(images())
    if kind != "plain":
        of = [of[0], of[1], of[6], of[15], *of[-5:-1]]
    grads = [draws.randn(x.shape[0], x.shape[1], x.shape[1]) for x in of]
    forward = [("gram", (strided(x), SCALE)) for x in of]
    backward = [
        ("gram_backward", (strided(g), strided(x), SCALE)) for g, x in zip(grads, of, strict=True)
    ]
    found = results(kind, forward + backward, tmp_path)
    for x, grad, value, gradient in zip(of, grads, found[: len(of)], found[len(of) :], strict=True):
        got = torch.from_numpy(value)
        assert contract.relative_error(got, gram_matrix(x.double(), SCALE)) <= 1e-5
        assert torch.equal(got, got.mT)
        got = torch.from_numpy(gradient)
        got = got.view(torch.bfloat16) if x.dtype == torch.bfloat16 else got
        want = gram_matrix_backward(grad.double(), x.double(), SCALE)
        rounding = contract.relative_error(want.to(x.dtype), want)
        assert got.dtype == x.dtype
        assert contract.relative_error(got, want) <= contract.GRADIENT_TOLERANCE + rounding
    if kind == "plain":
        again = results(kind, forward + backward, tmp_path)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(found, again, strict=True))


def test_a_nan_is_seen(tmp_path: Path) -> None:
    x = draws.randn(1, 4, 5, 5)
    x[0, 1, 2, 2] = torch.nan
    (found,) = results("plain", [("gram", (strided(x), 1.0))], tmp_path)
    assert torch.equal(torch.from_numpy(found).isnan(), gram_matrix(x, 1.0).isnan())
