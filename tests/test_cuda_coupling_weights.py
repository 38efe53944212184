"""The gradients of a block's weights by the CUDA kernels on the host, against the float64
reference."""

from __future__ import annotations

from pathlib import Path

import draws
import numpy as np
import pytest
import torch
from emulated import KINDS, Call, needs_modules, results, strided
from test_cuda_coupling import Problem, problem, relative_error
from torch import Tensor

from mghf_fast.ops.vocabulary import ACTIVATIONS
from mghf_fast.reference import coupling as reference

pytestmark = needs_modules

BANDS: Call = ("set_coupling_layer_bytes", (1,))  # of 8 rows, the fewest


def call(p: Problem) -> Call:
    w = p.weights
    flat = torch.cat([t.float().flatten() for t in w.tensors()]).numpy()
    channels, _, kernel, _ = w.mix_weight.shape
    options = (flat, channels, kernel, w.activation, w.clamp or 0.0, True)
    return "coupling_backward", (strided(p.grad), strided(p.x), *options)


def gradients(kind: str, of: list[Problem], folder: Path, *before: Call) -> list[list[Tensor]]:
    """The gradients of each problem's weights."""
    found = results(kind, [*before, *map(call, of)], folder)[len(before) :]
    return [
        [
            part.view(w.shape)
            for part, w in zip(
                torch.from_numpy(flat).split([w.numel() for w in p.weights.tensors()]),
                p.weights.tensors(),
                strict=True,
            )
        ]
        for p, (_, flat) in zip(of, found, strict=True)
    ]


def check(of: list[Problem], found: list[list[Tensor]], tolerance: float = 1e-4) -> None:
    for p, own in zip(of, found, strict=True):
        exact = p.as_dtype(torch.float64)
        _, want = reference.invertible_block_backward(exact.grad, exact.x, exact.weights, True)
        for number, (a, b) in enumerate(zip(own, want, strict=True)):
            size = (p.x.shape, p.weights.activation, number)
            assert relative_error(a, b) <= tolerance or b.norm() < 1e-12, size


def problems() -> list[Problem]:
    """Every activation, clamps, sides of one and two pixels, tiles that are not full, a 3x3 mix,
    layouts and types. Slopes are the same in float32 and float64 as long as no activation is next
    to a kink, which is likely for few pixels."""
    last, small = torch.channels_last, problem(8, (2, 5, 4))
    halves = [small.as_dtype(dtype) for dtype in (torch.float16, torch.bfloat16)]
    return [
        *(problem(6, (1, *size)) for size in ((1, 1), (1, 3), (4, 1), (2, 2), (9, 8))),
        *(
            problem(4, (1, 4, 5), activation=activation, clamp=clamp)
            for activation in ACTIVATIONS
            for clamp in (None, 1.5)
        ),
        problem(6, (2, 4, 5), inputs=3, kernel=3),
        problem(10, (1, 2, 1), inputs=5),
        problem(66, (1, 3, 4), inputs=1, kernel=3),
        Problem(small.x.to(memory_format=last), small.grad, small.weights),
        Problem(small.x, small.grad.transpose(2, 3).contiguous().transpose(2, 3), small.weights),
        *halves,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    of = problems() if kind == "plain" else [problem(10, (1, 4, 5), inputs=3, kernel=3)]
    found = gradients(kind, of, tmp_path)
    check(of, found)
    if kind == "plain":
        for one, other in zip(found, gradients(kind, of, tmp_path), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["plain", "thread"])
def test_bands_of_rows_and_parts(kind: str, tmp_path: Path) -> None:
    """Bands with halos, and sums in several parts."""
    torch.manual_seed(0)
    of = [
        problem(4, (2, 27, 3), activation="softplus"),
        problem(4, (1, 17, 70), inputs=2, kernel=3, activation="softplus"),
        problem(4, (1, 9, 3), activation="softplus"),  # the last band has one row
    ]
    of = of if kind == "plain" else of[2:]
    found = gradients(kind, of, tmp_path, BANDS)
    check(of, found, 2e-6)
    check(of, gradients(kind, of, tmp_path), 2e-6)


def test_the_image_gradient_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name, arguments = call(problem(6, (1, 4, 5)))
    calls = [(name, arguments), (name, (*arguments[:-1], False))]
    (with_weights, _), (without, none) = results("plain", calls, tmp_path)
    assert none.size == 0 and (np.asarray(with_weights) == np.asarray(without)).all()


def test_no_image(tmp_path: Path) -> None:
    p = problem(4, (1, 3, 3))
    empty = Problem(draws.randn(0, 4, 3, 3), draws.randn(0, 4, 3, 3), p.weights)
    assert all((g == 0).all() for g in gradients("plain", [empty], tmp_path)[0])


def test_a_nan_is_seen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    p = problem(6, (1, 4, 5))
    p.x[0, 1, 2, 3] = torch.nan
    _, want = reference.invertible_block_backward(p.grad, p.x, p.weights, True)
    (found,) = gradients("plain", [p], tmp_path)
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(found, want, strict=True))
