"""The CUDA kernels of `monce` on the host, against the float64 reference."""

from __future__ import annotations

import pickle
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

from mghf_fast.ops.vocabulary import PLAN_GRADIENTS, kept_iterations
from mghf_fast.reference import monce as reference

pytestmark = needs_modules

H200 = (227 << 10, True)
CLUSTERS = (12 << 10, True)  # so little shared memory that small maps take several blocks
STREAMED = (20 << 10, False, 1)  # and these lie in the device's memory, one after the other
# Maps of 140 patches or more lie there too, and 2 clusters of 8 blocks solve them, 1 of 4, 1 of 2.
SHARED_STREAMS = (
    (24 << 10, True, 23),
    (24 << 10, True, 7),
    (24 << 10, True, 3),
)
Gpu = tuple[int, bool] | tuple[int, bool, int]
Options = tuple[float, float, int, float, str, str]
Problem = tuple[Tensor, Tensor, Tensor, Options]


def pair(b: int, n: int, d: int = 8) -> tuple[Tensor, Tensor]:
    key = F.normalize(draws.randn(b, n, d), dim=2)
    return F.normalize(key + 0.5 * draws.randn(b, n, d), dim=2), key


def problem(query: Tensor, key: Tensor, *options: Any) -> Problem:
    """A problem with a gradient of the losses; the other options have defaults."""
    defaults: Options = (0.07, 1.0, 50, 1.0, "hard", "exact")
    return draws.randn(query.shape[:2]), query, key, (*options, *defaults[len(options) :])


def small_problems() -> list[Problem]:
    """Every cost, both gradients of the plan, temperatures and epsilons that leave float32's range,
    tiny sizes, more depth than is staged at a time."""
    torch.manual_seed(0)
    return [
        *[problem(*pair(2, n)) for n in (2, 3, 17)],
        problem(*pair(1, 33, 65)),
        problem(*pair(2, 21, 3), 0.07, 0.1, 12, 0.5, "easy"),
        problem(*pair(1, 33, 3), 0.07, 0.1, 12, 1.0, "exp", "detach"),
        problem(*pair(1, 33, 3), 0.07, 0.02, 8, 1.0, "exp"),
        problem(*pair(1, 33, 3), 0.07, 0.005, 8),
        problem(*pair(1, 33, 2), 0.07, 0.005, 8, 1.0, "hard", "detach"),
        problem(*pair(2, 19), 1e-3, 1.0, 8),
        problem(*pair(1, 19), 1e4, 0.01, 8, 3.0),
    ]


def layouts() -> list[Problem]:
    query, key = pair(3, 11, 5)
    found = []
    for (_, q), (_, k) in zip(
        (*contract.batch_layouts(query), *contract.expanded(query)),
        (*contract.batch_layouts(key), *contract.expanded(key)),
        strict=True,
    ):
        found += [problem(q, key, 0.07, 0.5), problem(query, k, 0.07, 0.5)]
    upstream = draws.randn(3, 11)
    given = (*contract.batch_layouts(upstream), *contract.expanded(upstream))
    return found + [(x, query, key, problem(query, key)[3]) for _, x in given]


def run(
    kind: str, gpu: Gpu, problems: Sequence[Problem], folder: Path
) -> list[np.ndarray[Any, Any]]:
    """Losses and gradient of each problem, computed twice."""

    def twice(calls: list[Call]) -> list[Any]:
        found = results(kind, [("set_gpu", gpu), *calls, *calls], folder)[1:]
        assert pickle.dumps(found[: len(calls)]) == pickle.dumps(found[len(calls) :])
        return found[: len(calls)]

    given = [(strided(q), strided(k), *options) for _, q, k, options in problems]
    kept = [kept_iterations(options[2]) for *_, options in problems]
    forwards = twice([("monce", (*g, k)) for g, k in zip(given, kept, strict=True)])
    backwards = twice(
        [
            ("monce_backward", (strided(upstream), *g[:2], state, *g[2:]))
            for (upstream, *_), g, (_, state) in zip(problems, given, forwards, strict=True)
        ]
    )
    pairs = zip(forwards, backwards, strict=True)
    return [x for (losses, _), grad in pairs for x in (losses, grad)]


def check(kind: str, gpu: Gpu, problems: Sequence[Problem], folder: Path) -> None:
    found = run(kind, gpu, problems, folder)
    for given, losses, grad in zip(problems, found[::2], found[1::2], strict=True):
        compare(given, losses, grad)


def compare(given: Problem, losses: np.ndarray[Any, Any], grad: np.ndarray[Any, Any]) -> None:
    """Compares with the reference within the limits of float32 similarities: an error of 2e-7 in
    them changes logits by 2e-7 / t, and if the plan hardly depends on them, its gradient is mostly
    its rounding divided by epsilon."""
    upstream, query, key, options = given
    temperature, epsilon = options[:2]
    want = reference.monce(query.double(), key.double(), *options)
    error = contract.relative_error(torch.from_numpy(losses), want)
    assert error <= 1e-5 + 2e-7 / temperature
    row = (upstream * -torch.expm1(-want)).norm()
    want = reference.monce_backward(upstream.double(), query.double(), key.double(), *options)
    distance = (torch.from_numpy(grad).double() - want).norm()
    limit = (1e-4 + 2e-7 / temperature) * want.norm() + 3e-6 * row / epsilon
    assert distance <= limit


@pytest.mark.parametrize("gpu", [H200, CLUSTERS, STREAMED])
def test_values_and_gradients(gpu: Gpu, tmp_path: Path) -> None:
    check("plain", gpu, small_problems(), tmp_path)


def test_layouts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check("plain", H200, layouts(), tmp_path)


def test_larger_maps(tmp_path: Path) -> None:
    """Every number of columns per lane, and more than a lane can have."""
    torch.manual_seed(0)
    problems = [
        problem(*pair(1, 150, 33)),
        problem(*pair(1, 441, 24), 0.07, 1.0, 50, 1.0, "exp"),
        problem(*pair(1, 460, 5), 0.07, 1.0, 2),
        problem(*pair(1, 470, 5), 0.07, 0.005, 2),
    ]
    check("plain", H200, problems[:3], tmp_path)
    check("plain", STREAMED, problems[3:], tmp_path)


@pytest.mark.parametrize("gpu", SHARED_STREAMS)
def test_more_maps_than_the_grid_has_clusters(gpu: Gpu, tmp_path: Path) -> None:
    """Each cluster solves several maps in the same memory, and NaN stays in its map."""
    torch.manual_seed(0)
    query, key = pair(5, 140)
    query[1, 139, 3] = torch.nan
    problems = [
        problem(query, key),
        problem(*pair(3, 141, 5), 0.07, 0.005, 3),
        problem(*pair(3, 142, 5), 0.07, 0.1, 4, 1.0, "exp", "detach"),
    ]
    found = run("plain", gpu, problems, tmp_path)
    for given, losses, grad in zip(problems, found[::2], found[1::2], strict=True):
        whole = [b for b in range(len(losses)) if torch.isfinite(given[1][b]).all()]
        for b in set(range(len(losses))) - set(whole):
            assert np.isnan(losses[b]).all() and np.isnan(grad[b]).all()
        upstream, query, key, options = given
        compare((upstream[whole], query[whole], key[whole], options), losses[whole], grad[whole])


def test_more_columns_than_a_lane_takes_at_a_time(tmp_path: Path) -> None:
    """In the device's memory, shared by the blocks of a cluster; with one base of K and more."""
    torch.manual_seed(0)
    problems = [problem(*pair(2, 460, 5), 0.07, 1.0, 3), problem(*pair(1, 470, 3), 0.07, 0.005, 2)]
    check("plain", (28 << 10, True, 8), problems, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    query, key = (x.to(dtype) for x in pair(2, 12))
    upstream, _, _, options = given = problem(query, key)
    losses, grad = run("plain", H200, [given], tmp_path)
    exact = (query.double(), key.double(), *options)
    for got, want, own in (
        (
            torch.from_numpy(losses),
            reference.monce(*exact),
            reference.monce(query, key, *options),
        ),
        (
            torch.from_numpy(grad).view(dtype),
            reference.monce_backward(upstream.double(), *exact),
            reference.monce_backward(upstream, query, key, *options),
        ),
    ):
        floor = max(
            contract.relative_error(own, want), contract.relative_error(want.to(got.dtype), want)
        )
        assert contract.relative_error(got, want) <= 2 * floor + 1e-6


@pytest.mark.parametrize("gpu", [H200, CLUSTERS, STREAMED])
def test_broken_maps(gpu: Gpu, tmp_path: Path) -> None:
    """NaN and infinities stay in their map; a single patch has loss 0, similar patches are
    finite."""
    torch.manual_seed(0)
    for n in (1, 2, 20):
        query, key = pair(4, n)
        query[1, n - 1, 3], key[3, 0, 2] = torch.nan, torch.inf
        for mode in PLAN_GRADIENTS:
            options = (0.07, 1.0, 50, 1.0, "hard", mode)
            losses, grad = run("plain", gpu, [problem(query, key, *options)], tmp_path)
            for index in (0, 2):
                assert np.isfinite(losses[index]).all() and np.isfinite(grad[index]).all()
            assert np.isnan(losses[[1, 3]]).any(1).all()
            if n > 1:
                assert np.isnan(grad[[1, 3]]).any((1, 2)).all()
            else:
                assert (losses[[0, 2]] == 0).all() and (grad[[0, 2]] == 0).all()
    query, key = pair(3, 6)
    query[0], key[0] = query[0, :1], query[0, :1]
    query[1, 2], key[1, 3], query[2], key[2] = 0, 0, 0, 0
    for epsilon in (1.0, 0.005):
        for found in run("plain", gpu, [problem(query, key, 0.07, epsilon)], tmp_path):
            assert np.isfinite(found).all()


def test_small_losses_keep_their_digits(tmp_path: Path) -> None:
    key = torch.eye(6).unsqueeze(0)
    losses, _ = run("plain", H200, [problem(key, key, 0.05)], tmp_path)
    want = reference.monce(key.double(), key.double(), 0.05, 1.0, 50, 1.0, "hard", "exact")
    assert (want < 1e-7).all()
    assert contract.relative_error(torch.from_numpy(losses), want) < 1e-5


@pytest.mark.parametrize("gpu", [H200, CLUSTERS, STREAMED])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "plain"])
def test_under_sanitizers(kind: str, gpu: Gpu, tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = [
        problem(*pair(2, 21, 35), 0.07, 0.01, 5),
        problem(*pair(1, 17, 3), 0.07, 0.5, 6, 1.0, "exp"),
        problem(*pair(1, 18, 9), 0.07, 0.5, 4, 1.0, "easy", "detach"),
    ]
    check(kind, gpu, problems, tmp_path)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "plain"])
def test_shared_streams_under_sanitizers(kind: str, tmp_path: Path) -> None:
    """Two clusters of two blocks and three maps."""
    torch.manual_seed(0)
    gpu = (24 << 10, True, 5)
    check(kind, gpu, [problem(*pair(3, 140, 3), 0.07, 0.01, 2)], tmp_path)
