"""The CUDA kernels of `coupling` on the host, against the float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import draws
import numpy as np
import pytest
import torch
from emulated import KINDS, Call, needs_modules, results, strided
from torch import Tensor

from mghf_fast.nn import InvertibleBlock
from mghf_fast.ops.vocabulary import ACTIVATIONS, BlockWeights
from mghf_fast.reference import coupling as reference

pytestmark = needs_modules

SMALL_GPU = (99 << 10, False)


class Problem(NamedTuple):
    x: Tensor
    grad: Tensor
    weights: BlockWeights

    def calls(self) -> list[Call]:
        w = self.weights
        flat = torch.cat([t.float().flatten() for t in w.tensors()]).numpy()
        channels, _, kernel, _ = w.mix_weight.shape
        options = (flat, channels, kernel, w.activation, w.clamp or 0.0)
        return [
            ("coupling", (strided(self.x), *options)),
            ("coupling_backward", (strided(self.grad), strided(self.x), *options, False)),
        ]

    def as_dtype(self, dtype: torch.dtype) -> Problem:
        tensors = [t.to(dtype) for t in self.weights.tensors()]
        weights = BlockWeights.from_tensors(tensors, *self.weights[5:])
        return Problem(self.x.to(dtype), self.grad.to(dtype), weights)

    def expected(self) -> list[Tensor]:
        """Value and gradient, with every step rounded to the type of x."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "accumulation_dtype", lambda dtype: dtype)
            y = reference.invertible_block(self.x, self.weights)
            grad, _ = reference.invertible_block_backward(self.grad, self.x, self.weights, False)
            return [y, grad]


def problem(
    channels: int,
    size: tuple[int, int, int],
    inputs: int | None = None,
    kernel: int = 1,
    scale: float = 1.0,
    **options: Any,
) -> Problem:
    """A block with random weights, times ``scale``, and a batch of images for it."""
    block = InvertibleBlock(channels, **options).requires_grad_(False).weights()
    batch, height, width = size
    count = inputs or channels
    if inputs is not None or kernel == 3:
        mix = draws.randn(channels, count, kernel, kernel) / (kernel * count**0.5)
        block = block._replace(mix_weight=mix)
    block = BlockWeights.from_tensors([scale * t for t in block.tensors()], *block[5:])
    x, grad = draws.randn(batch, count, height, width), draws.randn(batch, channels, height, width)
    return Problem(x, grad, block)


def types() -> list[Problem]:
    small = problem(10, (2, 9, 11))
    wide = problem(128, (1, 9, 18), inputs=3, kernel=3)
    halves = (torch.float16, torch.bfloat16)
    return [small, *(p.as_dtype(dtype) for p in (small, wide) for dtype in halves)]


def layouts() -> list[Problem]:
    p = problem(8, (2, 7, 9))
    last = torch.channels_last
    both = Problem(p.x.to(memory_format=last), p.grad.to(memory_format=last), p.weights)
    odd = problem(6, (1, 5, 6)).as_dtype(torch.bfloat16)
    large = draws.randn(2, 2, 16, 12, 21)
    sliced, transposed = large[:, :, ::2, 1::2, ::3], large[:, :, ::2, :7, :9].transpose(3, 4)
    padded = draws.randn(2, 1, 6, 7, 12)[:, :, :, :, :8].permute(0, 1, 4, 2, 3)
    return [
        both,
        Problem(both.x, p.grad, p.weights),
        Problem(p.x, both.grad, p.weights),
        both.as_dtype(torch.float16),
        Problem(odd.x.to(memory_format=last), odd.grad.to(memory_format=last), odd.weights),
        *(Problem(*images, p.weights) for images in (sliced, transposed, padded)),
        Problem(
            p.x[:1].expand(3, -1, -1, -1),
            p.grad[:, :, :1, :1].expand(-1, -1, 7, 9)[:1].expand(3, -1, -1, -1),
            p.weights,
        ),
    ]


def sizes() -> list[Problem]:
    """Tiles are 8 by 16 pixels, or 4 by 16 in the gradient of wide blocks; a side of one pixel has
    no reflection, with a side of two both reflections meet."""
    every = [(1, 1), (1, 3), (4, 1), (2, 2), (3, 17), (18, 2), (9, 33), (17, 16)]
    return [
        *(problem(4, (1, *size)) for size in every),
        *(problem(6, (2, *size), inputs=3, kernel=3) for size in ((1, 1), (1, 2), (9, 19))),
        problem(2, (1, 4, 5), inputs=1, kernel=3),
        problem(8, (1, 4, 5), inputs=20, kernel=3),
        problem(12, (1, 4, 5), inputs=5),
        problem(66, (1, 9, 4)),
        problem(130, (1, 5, 3), inputs=3),
    ]


def options() -> list[Problem]:
    """With larger weights, so that the clamp and both sides of the activations matter."""
    return [
        problem(8, (1, 9, 11), scale=scale, activation=activation, clamp=clamp)
        for activation in ACTIVATIONS
        for scale, clamp in ((1.5, None), (3.0, 1.5))
    ]


def broken() -> list[Problem]:
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        for value in (torch.nan, torch.inf):
            p = problem(6, (1, 14, 24)).as_dtype(dtype)
            p.x[0, 1, 2, 3] = value
            q = problem(6, (1, 14, 24)).as_dtype(dtype)
            q.grad[0, 4, 11, 20] = value
            made += [p, q]
    return made


def inverse_call(p: Problem) -> Call:
    """The call of the inverse, with ``x`` as the block's output."""
    w = p.weights
    inverse = torch.linalg.inv(w.mix_weight.double().flatten(1))
    tensors = [inverse, -inverse @ w.mix_bias.double(), *w.tensors()[2:]]
    flat = torch.cat([t.float().flatten() for t in tensors]).numpy()
    return "coupling_inverse", (strided(p.x), flat, p.x.shape[1], w.activation, w.clamp or 0.0)


def tensor_of(array: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor


def run(kind: str, problems: list[Problem], folder: Path, *before: Call) -> list[list[Tensor]]:
    """Values and gradients; those of the first problems are bitwise the same in a second run."""
    calls = [call for p in problems for call in p.calls()]
    repeated = calls[:4] if kind == "plain" else []
    found = results(kind, [*before, *calls, *repeated], folder)[len(before) :]
    arrays = [f[0] if isinstance(f, tuple) else f for f in found]
    for one, other in zip(arrays, arrays[len(calls) :], strict=False):
        assert np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()
    both = zip(arrays[: len(calls) : 2], arrays[1 : len(calls) : 2], problems, strict=True)
    return [[tensor_of(a, p.x.dtype) for a in pair] for *pair, p in both]


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check(kind: str, problems: list[Problem], folder: Path, *before: Call) -> None:
    for p, found in zip(problems, run(kind, problems, folder, *before), strict=True):
        exact, roundoff = p.as_dtype(torch.float64).expected(), torch.finfo(p.x.dtype).eps
        allowed = [1e-5, 1e-4]
        if p.x.dtype != torch.float32:
            own = [relative_error(a, b) for a, b in zip(p.expected(), exact, strict=True)]
            allowed = [2 * max(error, roundoff / 4) for error in own]
        for got, want, tolerance in zip(found, exact, allowed, strict=True):
            assert got.dtype == p.x.dtype and got.shape == want.shape
            assert relative_error(got, want) <= tolerance, (p.x.shape, p.weights.activation)


@pytest.mark.parametrize("problems", [types, layouts, sizes, options])
def test_coupling(problems: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check("plain", problems(), tmp_path)


def test_coupling_on_a_small_gpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = [problem(66, (1, 5, 4), inputs=3), problem(130, (1, 2, 3), inputs=3)]
    check("plain", problems, tmp_path, ("set_gpu", SMALL_GPU))


BANDS: Call = ("set_coupling_feature_bytes", (1,))  # of 8 rows, the fewest


def banded() -> list[Problem]:
    torch.manual_seed(0)
    return [
        problem(10, (2, 27, 5)),
        problem(6, (1, 18, 19), inputs=3, kernel=3),
        problem(4, (1, 9, 3)),  # the last band has one row
        problem(6, (1, 17, 4), inputs=3, kernel=3).as_dtype(torch.bfloat16),
    ]


def test_rows_in_bands(tmp_path: Path) -> None:
    problems = banded()
    check("plain", problems, tmp_path, BANDS)
    whole, some = (run("plain", problems, tmp_path, *before) for before in ((), (BANDS,)))
    for p, one, other in zip(problems, whole, some, strict=True):
        for a, b in zip(one, other, strict=True):
            tolerance = 1e-5 if p.x.dtype == torch.float32 else torch.finfo(p.x.dtype).eps
            assert relative_error(a, b.double()) <= tolerance
    calls = [inverse_call(p) for p in problems if p.x.shape[1] == len(p.weights.mix_bias)]
    found = [
        results("plain", [*before, *calls], tmp_path)[-len(calls) :] for before in ([], [BANDS])
    ]
    for of_whole, of_some in zip(*found, strict=True):
        assert (np.asarray(of_whole) == np.asarray(of_some)).all()


@pytest.mark.parametrize("kind", ["thread", "address"])
def test_rows_in_bands_under_a_sanitizer(kind: str, tmp_path: Path) -> None:
    check(kind, banded()[:2], tmp_path, BANDS)


def test_no_wrong_number_comes_of_nan_or_infinity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = broken()
    for p, found in zip(problems, run("plain", problems, tmp_path), strict=True):
        for got, want in zip(found, p.as_dtype(torch.float64).expected(), strict=True):
            assert got[want.isnan()].isnan().all()
            finite = got.isfinite()
            assert finite.any() and want[finite].isfinite().all()
            tolerance = 1e-4 if got.dtype == torch.float32 else 0.1
            torch.testing.assert_close(
                got[finite].double(), want[finite], rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("kind", KINDS)
def test_inverse(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = problem(10, (1, 4, 5), activation="softplus", clamp=1.5)
    problems = [small, *(small.as_dtype(dtype) for dtype in (torch.float16, torch.bfloat16))]
    if kind == "plain":
        image = draws.randn(1, 5, 7, 66).permute(0, 3, 1, 2)
        problems += [problem(8, (2, 9, 18)), problem(66, (1, 1, 1))._replace(x=image)]
    calls = [inverse_call(p) for p in problems]
    for p, array in zip(problems, results(kind, calls, tmp_path), strict=True):
        got = tensor_of(array, p.x.dtype)
        exact = p.as_dtype(torch.float64)
        want = reference.invertible_block_inverse(exact.x, exact.weights)
        # Only the weights and the result are rounded, whatever the image is.
        tolerance = 1e-5 if p.x.dtype == torch.float32 else torch.finfo(p.x.dtype).eps
        assert relative_error(got, want) <= tolerance


@pytest.mark.parametrize("kind", KINDS[1:])
def test_coupling_under_a_sanitizer(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    p = problem(6, (1, 9, 17), inputs=3, kernel=3)
    last = problem(34, (1, 3, 4)).as_dtype(torch.bfloat16)
    last = Problem(last.x.to(memory_format=torch.channels_last), last.grad, last.weights)
    check(kind, [p, last, problem(34, (1, 2, 3), inputs=5)], tmp_path)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_wide_coupling_under_a_sanitizer(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = [problem(130, (1, 2, 3), inputs=3), problem(66, (1, 3, 2), inputs=3)]
    check(kind, [p.as_dtype(torch.float16) for p in problems], tmp_path)
    check(kind, problems[1:], tmp_path, ("set_gpu", SMALL_GPU))
