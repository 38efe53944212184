"""The CUDA kernels of `sinkhorn` on the host, against the float64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contract
import draws
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulated import KINDS, Call, needs_modules, results, strided
from torch import Tensor

from mghf_fast.reference import sinkhorn as reference

pytestmark = needs_modules

H200 = (227 << 10, True)
CLUSTERS = (12 << 10, True)  # so little shared memory that small matrices take several blocks
STREAMED = (20 << 10, False, 1)  # and these lie in the device's memory, one after the other
# Matrices of 140 rows or more lie there too, and 2 clusters of 8 blocks solve them, 1 of 4, 1 of 2.
SHARED_STREAMS = (
    (24 << 10, True, 23),
    (24 << 10, True, 7),
    (24 << 10, True, 3),
)
Gpu = tuple[int, bool] | tuple[int, bool, int]
Options = tuple[str, float, int, float | None]
Problem = tuple[Tensor, Tensor, Options]


def cosines(b: int, n: int, d: int = 8) -> Tensor:
    q, k = (F.normalize(draws.randn(b, n, d), dim=2) for _ in range(2))
    return q @ k.mT


def problem(similarity: Tensor, *options: Any) -> Problem:
    """A problem with a gradient of the plan; the other options have defaults."""
    defaults: Options = ("hard", 1.0, 50, None)
    upstream = draws.randn(similarity.shape).to(similarity.dtype)
    return upstream, similarity, (*options, *defaults[len(options) :])


def small_problems() -> list[Problem]:
    """Every cost, sums that leave float32's range, a stop at a tolerance, tiny sizes."""
    torch.manual_seed(0)
    return [
        *[problem(cosines(2, n)) for n in (3, 5, 17)],
        problem(cosines(2, 33), "easy", 0.1, 12),
        problem(cosines(1, 33, 3), "exp", 0.02, 10),
        problem(cosines(1, 33, 3), "hard", 0.005, 10),
        problem(cosines(3, 19), "hard", 0.1, 50, 1e-2),
        problem(cosines(1, 21, 2), "hard", 0.01, 50, 1e-2),
        problem(cosines(1, 17), "hard", 0.5, 1),
    ]


def layouts() -> list[Problem]:
    similarity = cosines(3, 11)
    found = [problem(x, "hard", 0.3) for _, x in contract.batch_layouts(similarity)]
    found += [problem(x, "hard", 0.3) for _, x in contract.expanded(similarity)]
    upstream = draws.randn(3, 11, 11)
    given = [x for _, x in (*contract.batch_layouts(upstream), *contract.expanded(upstream))]
    return found + [(x, similarity, ("easy", 0.5, 20, None)) for x in given]


def calls_of(problems: Sequence[Problem]) -> list[Call]:
    calls: list[Call] = []
    for upstream, similarity, options in problems:
        calls.append(("sinkhorn", (strided(similarity), *options)))
        given = (strided(upstream), strided(similarity), *options)
        calls.append(("sinkhorn_backward", given))
    return calls


def run(
    kind: str, gpu: Gpu, problems: Sequence[Problem], folder: Path
) -> list[np.ndarray[Any, Any]]:
    """Plan and gradient of each problem, computed twice."""
    calls = calls_of(problems)
    found = results(kind, [("set_gpu", gpu), *calls, *calls], folder)[1:]
    for first, second in zip(found[: len(calls)], found[len(calls) :], strict=True):
        assert first.tobytes() == second.tobytes()
    return found[: len(calls)]


def as_tensor(array: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(array).view(dtype)


def check(kind: str, gpu: Gpu, problems: Sequence[Problem], folder: Path) -> None:
    found = run(kind, gpu, problems, folder)
    for given, plan, grad in zip(problems, found[::2], found[1::2], strict=True):
        compare(given, plan, grad)


def compare(given: Problem, plan: np.ndarray[Any, Any], grad: np.ndarray[Any, Any]) -> None:
    upstream, similarity, options = given
    exact, up = similarity.double(), upstream.double()
    want = reference.sinkhorn_plan(exact, *options)
    assert contract.relative_error(as_tensor(plan, similarity.dtype), want) <= 1e-5
    want = reference.sinkhorn_plan_backward(up, exact, *options)
    got = as_tensor(grad, similarity.dtype).double()
    # Equal gradients along a row or column cancel, because the marginals are fixed.
    assert (got - want).norm() <= 1e-4 * want.norm() + 1e-6 * up.norm() / options[1]


@pytest.mark.parametrize("gpu", [H200, CLUSTERS, STREAMED])
def test_values_and_gradients(gpu: Gpu, tmp_path: Path) -> None:
    check("plain", gpu, small_problems(), tmp_path)


@pytest.mark.parametrize("gpu", [H200, STREAMED])
def test_costs_beyond_float32(gpu: Gpu, tmp_path: Path) -> None:
    """Exponents of costs e^s that float32 cannot hold, in entries that are 0."""
    torch.manual_seed(0)
    problems = [problem(x * cosines(1, 20, 16), "exp", 1.0, 6) for x in (25.0, 100.0, 400.0)]
    check("plain", gpu, problems, tmp_path)


@pytest.mark.parametrize("gpu", [H200, CLUSTERS])
def test_layouts(gpu: Gpu, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check("plain", gpu, layouts(), tmp_path)


def test_larger_matrices(tmp_path: Path) -> None:
    """Every number of columns per lane, and more than a lane can have."""
    torch.manual_seed(0)
    problems = [
        problem(cosines(1, 150, 2), "hard", 0.02, 4),
        problem(cosines(1, 260, 2), "hard", 0.02, 3),
        problem(cosines(1, 441, 64)),
        problem(cosines(1, 460, 2), "hard", 0.02, 2),
        problem(cosines(1, 650, 2), "hard", 0.01, 2),
        problem(cosines(1, 1800, 4), "hard", 0.5, 1),  # more than come from memory once
    ]
    check("plain", H200, problems, tmp_path)


@pytest.mark.parametrize("gpu", SHARED_STREAMS)
def test_more_matrices_than_the_grid_has_clusters(gpu: Gpu, tmp_path: Path) -> None:
    """Each cluster solves several matrices in the same memory, and NaN stays in its matrix."""
    torch.manual_seed(0)
    similarity = cosines(5, 140)
    similarity[1, 139, 3] = torch.nan
    problems = [
        problem(similarity, "hard", 1.0, 4),
        problem(cosines(3, 141, 2), "hard", 0.01, 3),
        problem(cosines(3, 142).mT, "exp", 0.1, 12, 1e-2),
    ]
    found = run("plain", gpu, problems, tmp_path)
    for given, plan, grad in zip(problems, found[::2], found[1::2], strict=True):
        whole = [b for b in range(len(plan)) if torch.isfinite(given[1][b]).all()]
        for b in set(range(len(plan))) - set(whole):
            assert np.isnan(plan[b]).all() and np.isnan(grad[b]).all()
        upstream, similarity, options = given
        compare((upstream[whole], similarity[whole], options), plan[whole], grad[whole])


def test_more_columns_than_a_lane_takes_at_a_time(tmp_path: Path) -> None:
    """In the device's memory, shared by the blocks of a cluster; with one base of K and more."""
    torch.manual_seed(0)
    problems = [
        problem(cosines(2, 460, 64), "hard", 1.0, 3),
        problem(cosines(1, 470, 2), "hard", 0.01, 2),
    ]
    check("plain", (28 << 10, True, 8), problems, tmp_path)


def test_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = [problem(cosines(2, 12).to(t)) for t in (torch.float16, torch.bfloat16)]
    found = run("plain", H200, problems, tmp_path)
    for index, (upstream, similarity, options) in enumerate(problems):
        exact, up = similarity.double(), upstream.double()
        for result, want, own in (
            (
                found[2 * index],
                reference.sinkhorn_plan(exact, *options),
                reference.sinkhorn_plan(similarity, *options),
            ),
            (
                found[2 * index + 1],
                reference.sinkhorn_plan_backward(up, exact, *options),
                reference.sinkhorn_plan_backward(upstream, similarity, *options),
            ),
        ):
            got = as_tensor(result, similarity.dtype)
            floor = contract.relative_error(own, want)
            assert contract.relative_error(got, want) <= 2 * floor + 1e-6


@pytest.mark.parametrize("gpu", [H200, CLUSTERS, STREAMED])
def test_broken_matrices(gpu: Gpu, tmp_path: Path) -> None:
    """NaN and infinities stay in their matrix; for one or two patches there is only one plan."""
    torch.manual_seed(0)
    for n in (2, 20):
        similarity = cosines(4, n)
        similarity[1, 0, n - 1], similarity[3, n - 1, 0] = torch.nan, torch.inf
        upstream = draws.randn(4, n, n)
        upstream[2, 0, 1] = torch.nan
        plan, grad = run("plain", gpu, [(upstream, similarity, ("hard", 1.0, 50, None))], tmp_path)
        assert np.isfinite(plan[[0, 2]]).all() and np.isnan(plan[[1, 3]]).all()
        assert np.isfinite(grad[0]).all() and np.isnan(grad[[1, 3]]).all()
        assert np.isnan(grad[2]).any()
        if n == 2:
            assert np.allclose(plan[0], [[0, 1], [1, 0]]) and np.abs(grad[0]).max() < 1e-6
    one = torch.tensor([1.0, torch.nan, -3.0]).view(3, 1, 1)
    plan, grad = run("plain", gpu, [(one, one, ("exp", 1.0, 50, None))], tmp_path)
    for found in (plan, grad):
        assert (found[[0, 2]] == 0).all() and np.isnan(found[1]).all()


@pytest.mark.parametrize("gpu", [H200, CLUSTERS, STREAMED])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "plain"])
def test_under_sanitizers(kind: str, gpu: Gpu, tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = [
        problem(cosines(1, 21, 3), "hard", 0.01, 5),
        problem(cosines(2, 17).mT, "exp", 0.5, 6, 1e-2),
    ]
    if gpu == STREAMED and kind == "address":
        problems.append(problem(cosines(1, 650, 2), "hard", 0.01, 1))
    check(kind, gpu, problems, tmp_path)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "plain"])
def test_shared_streams_under_sanitizers(kind: str, tmp_path: Path) -> None:
    """Two clusters of two blocks and three matrices."""
    torch.manual_seed(0)
    check(kind, (24 << 10, True, 5), [problem(cosines(3, 140, 3), "hard", 0.01, 2)], tmp_path)
