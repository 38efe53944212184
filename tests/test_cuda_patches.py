"""The CUDA kernels of `patches` on the host: races and accesses out of bounds. test_patches.py
checks values, with the backend "cuda"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import draws
import numpy as np
import pytest
import torch
from contract import relative_error
from emulated import Call, needs_modules, results, strided
from torch import Tensor

from mghf_fast import native
from mghf_fast.ops import OPS
from mghf_fast.precision import PRECISIONS
from mghf_fast.reference import patches as reference

pytestmark = needs_modules

# batch, channels, height, width, patch size, stride, hidden, dimension, channels_last: cells with
# one to four patches, more units, dimensions, rows and pixels of a cell than a block has at a time,
# copies by 16 bytes and number by number; the last three as patches_rows.h takes them.
PROBLEMS = [
    (1, 5, 9, 11, 5, 3, 9, 5, False),
    (1, 8, 44, 44, 8, 4, 40, 16, True),
    (2, 1, 24, 40, 16, 12, 140, 70, False),
    (1, 3, 40, 56, 16, 12, 40, 20, False),
    (1, 3, 40, 56, 16, 8, 40, 20, False),
    (1, 2, 40, 72, 32, 24, 40, 20, False),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16) * 2


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


# batch, channels, height, width, patch size, stride, hidden, dimension: what patches_rows.h takes.
# Blocks with parts of rows of patches, with several maps, with one patch of each map; half a block.
ROWS = [
    (1, 2, 32, 64, 16, 8, 128, 64),
    (1, 3, 64, 64, 32, 24, 128, 64),
    (2, 3, 52, 100, 16, 12, 100, 50),
    (1, 130, 16, 20, 16, 8, 33, 3),
]
# Likewise with rows and strides of multiples of eight pixels, 16 bytes in half precision.
ROWS_OF_HALVES = [*ROWS[:2], (2, 3, 52, 104, 16, 8, 100, 50), (1, 130, 16, 24, 16, 8, 33, 3)]
HALVES = (torch.bfloat16, torch.float16)
ROWS_OF_TYPES = [
    *((case, torch.float32) for case in ROWS),
    *((case, torch.bfloat16) for case in ROWS_OF_HALVES),
    *((case, torch.float16) for case in ROWS_OF_HALVES[1:3]),
]


def of_rows(
    case: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor], tuple[int, int]]:
    *shape, size, stride, hidden, dimension = case
    shapes = [(hidden, size * size), (hidden,), (dimension, hidden), (dimension,)]
    weights = [draws.randn(s) / s[-1] ** 0.5 for s in shapes]
    return draws.rand(*shape).to(dtype), weights, (size, stride)


def tensor(array: Any, dtype: torch.dtype) -> Tensor:
    """A result that is an image of that type."""
    found = torch.from_numpy(np.asarray(array))
    return found.view(dtype) if dtype == torch.bfloat16 else found


def forward(
    x: Tensor, weights: list[Tensor], options: tuple[int, int], precision: str = "float32"
) -> Call:
    return "patches", (strided(x), *map(strided, weights), *options, precision)


OLDER: Call = ("use_older", ("patches", True))


@pytest.mark.parametrize(("case", "dtype"), ROWS_OF_TYPES)
def test_rows_of_pixels(case: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    """By newer and older kernels; the newer ones twice."""
    x, weights, options = of_rows(case, dtype)
    call = forward(x, weights, options)
    new, again, _, old = results("plain", [call, call, OLDER, call], tmp_path)
    for a, b in zip(new, again, strict=True):
        assert a.tobytes() == b.tobytes()
    assert not np.array_equal(new[0], old[0])  # they are different kernels
    exact = [w.double() for w in weights]
    expected = reference.patch_projection(x.double(), *exact, *options)
    assert relative_error(torch.from_numpy(new[0]), expected) <= 5e-7
    assert relative_error(torch.from_numpy(old[0]), expected) <= 5e-7
    # All bits but those of units within rounding of 0; and the norms.
    words = (new[1][:, 1:] ^ old[1][:, 1:]).view(np.uint32)
    assert np.bitwise_count(words).sum() <= 1
    norms = [torch.from_numpy(s[:, 0].view(np.float32)) for s in (new[1], old[1])]
    assert relative_error(norms[0], norms[1].double()) <= 5e-7


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("width", "stride"), [(64, 12), (60, 8)])
def test_rows_that_are_not_copied_whole(
    width: int, stride: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Pieces of rows that do not begin at multiples of 16 bytes: the older kernels take them."""
    x, weights, options = of_rows((1, 2, 32, width, 16, stride, 40, 20), dtype)
    call = forward(x, weights, options)
    new, _, old = results("plain", [call, OLDER, call], tmp_path)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(new, old, strict=True))


# Cells of one to four patches, with margins that no patch covers; two blocks of cells; cells that
# are patches; patches of 32 pixels.
CELLS = [
    (1, 2, 32, 64, 16, 8, 128, 64),
    (2, 3, 36, 62, 16, 12, 100, 50),
    (1, 3, 54, 70, 16, 16, 33, 3),
    (1, 1, 65, 66, 32, 24, 128, 64),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("case", CELLS)
def test_gradient_by_rows(case: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    """By newer and older kernels, the newer ones twice; a NaN stays in its patch."""
    x, weights, options = of_rows(case, dtype)
    ((embedding, state),) = results("plain", [forward(x, weights, options)], tmp_path)
    grad = draws.randn(embedding.shape)
    matrices = strided(weights[0]), strided(weights[2])
    saved = (grad.numpy(), embedding, state)
    back: Call = ("patches_backward", (*saved, strided(x), *matrices, *options))
    bad = grad.clone()
    bad[0, -1, 1] = float("nan")
    broken: Call = ("patches_backward", (bad.numpy(), *saved[1:], *back[1][3:]))
    given = [back, back, broken, OLDER, back]
    new, again, kept, _, old = (
        array if isinstance(array, int) else tensor(array, dtype)
        for array in results("plain", given, tmp_path)
    )
    assert torch.equal(new, again) and not torch.equal(new, old)
    exact = [w.double() for w in weights]
    expected, _ = reference.patch_projection_backward(
        grad.double(), x.double(), *exact, *options, False
    )
    rounded = 1.001 * relative_error(expected.to(dtype), expected)
    assert relative_error(new, expected) <= 2e-6 + rounded
    assert relative_error(old, expected) <= 2e-5 + rounded
    columns = (x.shape[3] - options[0]) // options[1] + 1
    of_patch = torch.zeros(new.shape, dtype=torch.bool)
    top, left = (n * options[1] for n in divmod(embedding.shape[1] - 1, columns))
    of_patch[0, 0, top : top + options[0], left : left + options[0]] = True
    assert torch.equal(kept.isnan(), of_patch)
    assert torch.equal(kept[~of_patch], new[~of_patch])


@pytest.mark.parametrize("dtype", HALVES)
def test_gradient_by_rows_is_added(dtype: torch.dtype) -> None:
    """In float32, and rounded once."""
    x, weights, options = of_rows(CELLS[1], dtype)
    run = OPS["patches"].implementation("cuda")
    embedding, state = run.forward(x, *weights, *options)
    grad, found = draws.randn(embedding.shape), draws.randn(x.shape).to(dtype)
    exact = [w.double() for w in weights]
    expected, _ = reference.patch_projection_backward(
        grad.double(), x.double(), *exact, *options, False
    )
    expected += found.double()
    run.add_backward(found, grad, embedding, state, x, *weights, *options)
    rounded = 1.001 * relative_error(expected.to(dtype), expected)
    assert relative_error(found, expected) <= 2e-6 + rounded


LESS_PRECISE = [
    *((case, torch.float32) for case in (ROWS[2], *CELLS)),
    *((case, dtype) for dtype in HALVES for case in (ROWS_OF_HALVES[1], CELLS[0])),
]


@pytest.mark.parametrize(("case", "dtype"), LESS_PRECISE)
def test_rows_of_less_precision(case: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    """Products are one of halves, for TF32 and bfloat16 alike, whose results are what float32's are
    but for the rounding of factors. The gradients are of one state."""
    x, weights, options = of_rows(case, dtype)
    given = [forward(x, weights, options, precision) for precision in PRECISIONS]
    (embedding, state), *less = results("plain", given, tmp_path)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*less, strict=True))
    exact = [w.double() for w in weights]
    expected = reference.patch_projection(x.double(), *exact, *options)
    assert 3e-5 <= relative_error(torch.from_numpy(less[0][0]), expected) <= 1e-3

    grad = draws.randn(embedding.shape)
    saved = (grad.numpy(), embedding, state, strided(x), strided(weights[0]), strided(weights[2]))
    calls = [("patches_backward", (*saved, *options, precision)) for precision in PRECISIONS]
    _, *less = results("plain", calls, tmp_path)
    assert less[0].tobytes() == less[1].tobytes()
    expected, _ = reference.patch_projection_backward(
        grad.double(), x.double(), *exact, *options, False
    )
    rounded = relative_error(expected.to(dtype), expected)
    assert 3e-5 <= relative_error(tensor(less[0], dtype), expected) <= 1e-3 + rounded


@pytest.mark.parametrize(("precision", "most"), [("float32", 5e-7), ("tf32", 1e-3)])
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        *((scale, dtype) for scale in (1e-25, 1e25) for dtype in (torch.float32, torch.bfloat16)),
        *((scale, torch.float16) for scale in (2.0**-14, 6e4)),
    ],
)
def test_rows_of_pixels_of_any_size(
    scale: float, dtype: torch.dtype, precision: str, most: float, tmp_path: Path
) -> None:
    """Numbers that no half can hold, or only just; the lower half of the image is smaller by 2^20,
    or in float16, which has fewer exponents, by 2^8."""
    x, weights, options = of_rows(ROWS[0])
    x[:, :, 16:] *= 2.0 ** (-8 if dtype == torch.float16 else -20)
    x = (x * scale).to(dtype)
    weights[1] *= scale
    weights[2] /= scale
    call = forward(x, weights, options, precision)
    ((embedding, _),) = results("plain", [call], tmp_path)
    exact = [w.double() for w in weights]
    expected = reference.patch_projection(x.double(), *exact, *options)
    assert relative_error(torch.from_numpy(embedding), expected) <= most


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "float32"), (torch.float32, "tf32"), *((dtype, "tf32") for dtype in HALVES)],
)
def test_what_is_not_finite_stays_in_its_patches(
    dtype: torch.dtype, value: float, precision: str, tmp_path: Path
) -> None:
    x, weights, options = of_rows(ROWS[0], dtype)
    bad = x.clone()
    bad[0, 1, 17, 10] = value  # in patches of three rows of patches
    calls = [forward(image, weights, options, precision) for image in (x, bad)]
    (good, _), (found, _) = results("plain", calls, tmp_path)
    expected = reference.patch_projection(bad.float(), *weights, *options)
    assert np.array_equal(np.isnan(found), expected.isnan().numpy()) and np.isnan(found).any()
    assert np.array_equal(found[~np.isnan(found)], good[~np.isnan(found)])


@pytest.mark.parametrize("number", [0, 3])
def test_frozen_weights_are_packed_once(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same results, to the last bit, by both of the forward's kernels."""
    x, w, *options = problem(number, torch.float32)
    plain, called = OPS["patches"].implementation("cuda"), []
    frozen, ops = plain.for_frozen_weights(), torch.ops.mghf_cuda_host

    class Ops:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(ops, name)

    monkeypatch.setattr(native, "cuda_ops", Ops)
    found = []
    for run in (plain, frozen, frozen):
        embedding, state = run.forward(x, *w, *options)
        grad, grad_x = torch.ones_like(embedding), x.clone()
        run.add_backward(grad_x, grad, embedding, state, x, *w, *options)
        found.append((embedding, state, grad_x))
    for results_ in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results_, found[0], strict=True))
    packed = ["patches_packed", "patches_packed_backward_add_"]
    assert called == ["patches", "patches_backward_add_", "patches_pack", *packed, *packed]


@pytest.mark.parametrize("kind", ["thread", "address"])
@pytest.mark.parametrize("number", range(len(PROBLEMS)))
def test_patches(kind: str, number: int, tmp_path: Path) -> None:
    x, w, size, stride = problem(number, DTYPES[number])
    options, parameters = (size, stride), [strided(p) for p in w]
    ((embedding, state),) = results(kind, [forward(x, w, options)], tmp_path)
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
    got = tensor(found, x.dtype)
    assert relative_error(got, grad_x) <= 2 * relative_error(grad_x.to(x.dtype), grad_x) + 1e-5
    for array, want in zip(weights, grad_weights, strict=True):
        assert relative_error(torch.from_numpy(array), want) <= 1e-5
