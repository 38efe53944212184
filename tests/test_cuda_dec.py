"""The CUDA kernels of `dec` on the host, against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contract
import draws
import pytest
import torch
from emulated import KINDS, Call, needs_modules, results, strided
from torch import Tensor

from mghf_fast.reference import dec as reference

pytestmark = needs_modules

GRAD = torch.tensor(0.7)
OPTIONS = (34.0, 0.5, 1.5, "inside", "rmse", 1.0, 1e-8)
OUTSIDE = (30.0, 0.5, 1.5, "outside", "l2", 1.0, 2.0)
Problem = tuple[Tensor, Tensor, tuple[Any, ...]]


def patches(count: int, depth: int) -> tuple[Tensor, Tensor]:
    """SR and GT patches, a third of the latter nearly equal to the ones before."""
    gt = draws.rand(count, depth)
    gt[2::3] = gt[1:-1:3][: len(gt[2::3])] + 0.01 * draws.randn(len(gt[2::3]), depth)
    return gt + 0.1 * draws.randn(count, depth), gt


def problems() -> Iterator[Problem]:
    """Every type and layout, one patch, one value, several tiles, chunks and slices of values."""
    sr, gt = patches(70, 20)
    for dtype in contract.DTYPES:
        yield sr.to(dtype), gt.to(dtype), OPTIONS
        for _, other in contract.batch_layouts(sr.to(dtype)):
            yield other, gt.to(dtype), OUTSIDE
    yield sr, gt.t().contiguous().t(), OUTSIDE
    yield sr[:1].expand(70, 20), gt, OPTIONS
    for count, depth in ((1, 1), (2, 5), (17, 1), (33, 33), (66, 70)):
        yield *patches(count, depth), OPTIONS
    yield *patches(9, 200), OUTSIDE
    yield *patches(5, 450), OPTIONS


def exact(problem: Problem) -> tuple[Tensor, Tensor]:
    sr, gt, options = problem
    wide, truth = sr.double(), gt.double()
    return reference.dec(wide, truth, *options), reference.dec_backward(
        GRAD.double(), wide, truth, *options
    )


def forward(problem: Problem) -> Call:
    sr, gt, options = problem
    return "dec", (strided(sr), strided(gt), *options)


def backward(problem: Problem, statistics: Any) -> Call:
    sr, gt, options = problem
    return "dec_backward", (GRAD.numpy(), strided(sr), strided(gt), statistics, *options)


def check(kind: str, of: list[Problem], folder: Path, before: tuple[Call, ...] = ()) -> list[Any]:
    """Compares losses and gradients with the reference and returns them."""
    first = len(before)
    losses = results(kind, [*before, *map(forward, of)], folder)[first:]
    calls = [backward(p, statistics) for p, (_, statistics) in zip(of, losses, strict=True)]
    grads = results(kind, [*before, *calls], folder)[first:]
    for problem, (loss, _), gradient in zip(of, losses, grads, strict=True):
        want, want_gradient = exact(problem)
        assert abs(float(loss) - want) <= 1e-5 * abs(want)
        got, dtype = torch.from_numpy(gradient), problem[0].dtype
        got = got.view(torch.bfloat16) if dtype == torch.bfloat16 else got
        rounding = contract.relative_error(want_gradient.to(dtype), want_gradient)
        assert got.dtype == dtype and got.shape == problem[0].shape
        error = contract.relative_error(got, want_gradient)
        assert error <= contract.GRADIENT_TOLERANCE + rounding or want_gradient.norm() < 1e-12
    return [*losses, *grads]


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, tmp_path: Path) -> None:
    of = list(problems())
    if kind != "plain":
        of = [of[0], of[2], of[4], of[-3], of[-1]]
    found = check(kind, of, tmp_path)
    if kind == "plain":
        again = check(kind, of, tmp_path)
        for one, other in zip(found, again, strict=True):
            pairs = zip(one, other, strict=True) if isinstance(one, tuple) else ((one, other),)
            assert all(a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize("kind", ["plain", "thread"])
@pytest.mark.parametrize("blocks", [1, 12])
def test_long_runs(kind: str, blocks: int, tmp_path: Path) -> None:
    """One run of all columns, and a last run that is shorter."""
    check(kind, [(*patches(200, 3), OPTIONS)], tmp_path, (("set_dec_blocks", (blocks,)),))


def test_distances_decide_near_the_threshold(tmp_path: Path) -> None:
    """Bright patches, whose products leave every pair undecided, in every type."""
    _, gt = patches(40, 12)
    sr = draws.rand(40, 12)
    for dtype, brightness in ((torch.float32, 300.0), (torch.float16, 4.0), (torch.bfloat16, 2.0)):
        truth = (gt + brightness).to(dtype)
        assert 40 < reference.positive_pairs(truth.float(), 34.0, "rmse", 1.0).sum() < 1600
        check("plain", [(sr.to(dtype), truth, OPTIONS)], tmp_path)


def test_numbers_beyond_the_squares_of_float32(tmp_path: Path) -> None:
    """Norms are summed in float64, so patches of 1e25 and of 1e-25 have cosines."""
    sr, gt = patches(20, 6)
    for scale in (1e25, 1e-25):
        options = (34.0, 0.5, 1.5, "inside", "rmse", 1.0, 1e-30)
        (one, other) = results(
            "plain", [forward((sr * scale, gt, options)), forward((sr, gt, options))], tmp_path
        )
        assert float(one[0]) == pytest.approx(float(other[0]), rel=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["sr", "gt"])
def test_a_nan_is_seen(which: str, bad: float, tmp_path: Path) -> None:
    sr, gt = patches(70, 20)
    (sr if which == "sr" else gt)[66, 7] = bad
    ((loss, statistics),) = results("plain", [forward((sr, gt, OPTIONS))], tmp_path)
    (gradient,) = results("plain", [backward((sr, gt, OPTIONS), statistics)], tmp_path)
    assert torch.from_numpy(loss).isnan()
    want = reference.dec_backward(GRAD, sr, gt, *OPTIONS)
    assert torch.equal(torch.from_numpy(gradient).isnan(), want.isnan())
