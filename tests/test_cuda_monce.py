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
CHIP = (227 << 10, False)  # without clusters every map that fits is the kernels' on chip
CLUSTERS = (12 << 10, True)  # so little shared memory that small maps take several blocks
STREAMED = (20 << 10, False, 1)  # and these lie in the device's memory, one after the other
# Maps of 140 patches or more lie there too, and 2 clusters of 8 blocks solve them, 1 of 4, 1 of 2.
SHARED_STREAMS = (
    (24 << 10, True, 23),
    (24 << 10, True, 7),
    (24 << 10, True, 3),
)
Gpu = tuple[int, bool] | tuple[int, bool, int]
# The kernels for maps that fit a block, which smaller GPUs do without, and the others.
KERNELS = [(CHIP, False), (H200, True), (CLUSTERS, False), (STREAMED, False)]
all_kernels = pytest.mark.parametrize(
    ("gpu", "older"), KERNELS, ids=["chip", "older", "clusters", "streamed"]
)
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
    kind: str,
    gpu: Gpu,
    problems: Sequence[Problem],
    folder: Path,
    older: bool = False,
    older_backward: bool | None = None,
    precision: str = "float32",
) -> list[np.ndarray[Any, Any]]:
    """Losses and gradient of each problem, computed twice; by the older kernels if wanted."""

    def twice(calls: list[Call], older: bool) -> list[Any]:
        setting: list[Call] = [("set_gpu", gpu), ("use_older", ("monce", older))]
        found = results(kind, [*setting, *calls, *calls], folder)[2:]
        assert pickle.dumps(found[: len(calls)]) == pickle.dumps(found[len(calls) :])
        return found[: len(calls)]

    given = [(strided(q), strided(k), *options) for _, q, k, options in problems]
    kept = [kept_iterations(options[2]) for *_, options in problems]
    forwards = twice(
        [("monce", (*g, k, precision)) for g, k in zip(given, kept, strict=True)], older
    )
    backwards = twice(
        [
            ("monce_backward", (strided(upstream), *g[:2], state, *g[2:], precision))
            for (upstream, *_), g, (_, state) in zip(problems, given, forwards, strict=True)
        ],
        older if older_backward is None else older_backward,
    )
    pairs = zip(forwards, backwards, strict=True)
    return [x for (losses, _), grad in pairs for x in (losses, grad)]


def check(kind: str, gpu: Gpu, problems: Sequence[Problem], folder: Path, *older: bool) -> None:
    found = run(kind, gpu, problems, folder, *older)
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


@all_kernels
def test_values_and_gradients(gpu: Gpu, older: bool, tmp_path: Path) -> None:
    check("plain", gpu, small_problems(), tmp_path, older)


@pytest.mark.parametrize("older", [False, True])
def test_layouts(older: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check("plain", H200, layouts(), tmp_path, older)


def test_larger_maps(tmp_path: Path) -> None:
    """Every number of columns per lane, and more than a lane can have."""
    torch.manual_seed(0)
    problems = [
        problem(*pair(1, 150, 33)),
        problem(*pair(1, 441, 24), 0.07, 1.0, 50, 1.0, "exp"),
        problem(*pair(1, 460, 5), 0.07, 1.0, 2),
        problem(*pair(1, 470, 5), 0.07, 0.005, 2),
    ]
    check("plain", H200, problems[:3], tmp_path, True)
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
    found = run("plain", gpu, problems, tmp_path, True)
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
    check("plain", (28 << 10, True, 8), problems, tmp_path, True)


@pytest.mark.parametrize("n", [1, 4, 5, 25, 32, 57, 100, 441, 448])
def test_maps_on_chip(n: int, tmp_path: Path) -> None:
    """Every number of warps' columns and of tiles of rows that matters, epsilons that need many
    iterations."""
    torch.manual_seed(n)
    large = n > 100
    problems = [problem(*pair(1, n, 16), 0.07, 1.0, 4 if large else 50, 1.0, "hard")]
    if n < 100:
        problems += [
            problem(*pair(2, n, d), 0.07, epsilon, 50, 1.0, cost)
            for d, epsilon, cost in ((64, 0.1, "easy"), (3, 0.05, "hard"), (17, 0.05, "exp"))
        ]
    check("plain", CHIP, problems, tmp_path)


def test_more_maps_than_blocks(tmp_path: Path) -> None:
    """Also more maps that make their iterations again than there is memory for at a time."""
    torch.manual_seed(0)
    problems = [problem(*pair(600, 3, 2), 0.07, 1.0, 2), problem(*pair(12, 7, 3), 0.07, 0.1, 2000)]
    check("plain", H200, problems, tmp_path)


@pytest.mark.parametrize("older", [False, True])
def test_the_other_kernels_state(older: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = [problem(*pair(2, 19)), problem(*pair(1, 40, 3), 0.07, 0.05)]
    check("plain", H200, problems, tmp_path, older, not older)


def test_which_kernels_run(tmp_path: Path) -> None:
    """Those on chip round differently; below an epsilon of 0.05 they are not used. From 33 patches
    on, clusters take the place of these."""
    torch.manual_seed(0)
    problems = [problem(*pair(1, 33), 0.07, epsilon, 3) for epsilon in (0.05, 0.04)]
    problems.append(problem(*pair(1, 33, 65), 0.07, 1.0, 3))
    newer, older = (run("plain", CHIP, problems, tmp_path, choice) for choice in (False, True))
    assert [(a == b).all() for a, b in zip(newer, older, strict=True)] == [False] * 2 + [True] * 4
    problems = [problem(*pair(1, n), 0.07, 1.0, 3) for n in (32, 33)]
    chip, clusters = (run("plain", gpu, problems, tmp_path) for gpu in (CHIP, H200))
    assert [(a == b).all() for a, b in zip(chip, clusters, strict=True)] == [True] * 2 + [False] * 2


def test_scales_of_numbers(tmp_path: Path) -> None:
    """Halves have a small range: small gradients, and rows that are not unit."""
    torch.manual_seed(0)
    upstream, query, key, options = problem(*pair(1, 33))
    problems = [(upstream * scale, query, key, options) for scale in (1e-12, 1e-30, 1e20)]
    problems += [(upstream, query * scale, key, options) for scale in (1e-12, 1e-3, 16.0)]
    check("plain", H200, problems, tmp_path)


SMALL = (163 << 10, False)  # compute capability 8.0


@pytest.mark.parametrize("gpu", [H200, CHIP, SMALL, (100 << 10, False, 2)], ids=str)
def test_embeddings_far_from_unit_length(gpu: Gpu, tmp_path: Path) -> None:
    """Sums leave float32's range on chip, in some maps only; the older kernels solve these."""
    torch.manual_seed(0)

    def some_far(b: int, n: int, *options: Any) -> Problem:
        upstream, query, key, all_options = problem(*pair(b, n), *options)
        far = torch.tensor([1.0, 20.0])[torch.arange(b) % 2].reshape(b, 1, 1)
        return upstream, query * far, key * far, all_options

    problems = [
        some_far(4, 20),
        some_far(5, 33, 0.07, 1.0, 50, 1.0, "easy"),
        some_far(3, 20, 0.07, 1.0, 50, 1.0, "hard", "detach"),
        some_far(2, 70, 0.07, 1.0, 3),
        some_far(70, 6, 0.07, 0.5, 3),  # of more clusters than solve them at a time
    ]
    for kernels in (False, True):
        check("plain", gpu, problems, tmp_path, kernels)
    on_chip = run("plain", gpu, problems[:1], tmp_path)
    older = run("plain", gpu, problems[:1], tmp_path, True)
    for found, same in zip(on_chip, older, strict=True):
        assert not (found[::2] == same[::2]).all() and (found[1::2] == same[1::2]).all()


def problems_that_hide_little() -> list[Problem]:
    """Similarity and contrast cancel in the weights; all similarities are tiny."""
    torch.manual_seed(0)
    query, key = pair(1, 40, 9)
    return [
        problem(query, key, 0.5, 0.5, 6, 1.0, "easy"),
        problem(1e-12 * query, 1e-12 * key, 0.07, 1.0, 3),
    ]


@all_kernels
def test_entries_that_do_not_count_are_hidden(gpu: Gpu, older: bool, tmp_path: Path) -> None:
    check("plain", gpu, problems_that_hide_little(), tmp_path, older)


@all_kernels
def test_costs_beyond_float32(gpu: Gpu, older: bool, tmp_path: Path) -> None:
    """Exponents of costs e^s that float32 cannot hold, in entries of the plan that are 0, and in
    some of the third problem that are not."""
    torch.manual_seed(0)
    problems = []
    for shift, length in ((0.0, 5.0), (0.0, 26.0), (0.7, 8.0)):
        query, key = (length * F.normalize(draws.randn(1, 20, 16) + shift, dim=2) for _ in range(2))
        problems.append(problem(query, key, 0.07, 1.0, 6 if shift == 0 else 12, 1.0, "exp"))
    problems.append(problem(*problems[0][1:3], 0.07, 1.0, 6, 1.0, "exp", "detach"))
    problems.append(problem(*problems[0][1:3], 0.07, 0.02, 6, 1.0, "exp"))
    check("plain", gpu, problems, tmp_path, older)


def test_rows_without_a_cost_that_float32_can_tell(tmp_path: Path) -> None:
    """NaN, and only in their map, where any number would be wrong: all costs are about e^100."""
    torch.manual_seed(0)
    query, key = (F.normalize(draws.randn(2, 20, 16) + 3.0, dim=2) for _ in range(2))
    query[1] *= 10.0
    key[1] *= 10.0
    given = problem(query, key, 0.07, 1.0, 4, 1.0, "exp")
    losses, grad = run("plain", H200, [given], tmp_path, True)
    assert np.isfinite(losses[0]).all() and np.isfinite(grad[0]).all()
    assert np.isnan(losses[1]).all() and np.isnan(grad[1]).all()


@all_kernels
def test_infinite_similarities_of_an_exponential_cost(
    gpu: Gpu, older: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    query, key = pair(2, 9)
    query[1, 2, 3] = torch.inf
    given = problem(query, key, 0.07, 1.0, 4, 1.0, "exp")
    losses, grad = run("plain", gpu, [given], tmp_path, older)
    assert np.isfinite(losses[0]).all() and np.isfinite(grad[0]).all()
    assert np.isnan(losses[1]).any() and np.isnan(grad[1]).any()


def test_few_far_embeddings_among_many_maps(tmp_path: Path) -> None:
    """More maps than the threads that look for such ones, of which the last have some."""
    torch.manual_seed(0)
    upstream, query, key, options = problem(*pair(1100, 3, 4), 0.07, 0.5, 2)
    far = torch.ones(1100, 1, 1)
    far[[1030, 1099]] = 20.0
    check("plain", H200, [(upstream, query * far, key * far, options)], tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_far_embeddings_of_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    query, key = ((20 * x).to(dtype) for x in pair(2, 20))
    upstream, _, _, options = given = problem(query, key)
    losses, grad = run("plain", H200, [given], tmp_path)
    exact = (query.double(), key.double(), *options)
    assert contract.relative_error(torch.from_numpy(losses), reference.monce(*exact)) <= 1e-5
    want = reference.monce_backward(upstream.double(), *exact)
    assert contract.relative_error(torch.from_numpy(grad).view(dtype), want) <= 1e-2


@pytest.mark.parametrize("older", [False, True])
def test_one_product_in_place_of_three(older: bool, tmp_path: Path) -> None:
    """The kernels make it for less precision than float32, if not for epsilons below 0.05."""
    torch.manual_seed(0)
    problems = [
        problem(*pair(2, 33, 17), 0.07, 0.5),
        problem(*pair(1, 58, 64), 0.1, 1.0, 6, 1.0, "easy", "detach"),
        problem(*pair(1, 25, 9), 0.07, 0.2, 50, 1.0, "exp"),
        problem(*pair(1, 25, 9), 0.07, 0.04, 5),
    ]
    exact, tf32, bfloat16 = (
        run("plain", CHIP, problems, tmp_path, older, precision=precision)
        for precision in ("float32", "tf32", "bfloat16")
    )
    for got, same, close in zip(tf32[:6], bfloat16, exact, strict=False):
        assert (got == same).all()
        error = contract.relative_error(torch.from_numpy(got), torch.from_numpy(close))
        assert 3e-5 <= error <= 3e-3
    assert all((a == b).all() for a, b in zip(tf32[6:], exact[6:], strict=True))


def test_float32_has_its_digits(tmp_path: Path) -> None:
    """Tensor cores truncate sums, and logits are divided by the temperature: errors of
    similarities below 1e-7."""
    torch.manual_seed(0)
    given = problem(*pair(2, 30, 64))
    upstream, query, key, options = given
    exact = (query.double(), key.double(), *options)
    losses, grad = run("plain", H200, [given], tmp_path)
    for got, want in (
        (losses, reference.monce(*exact)),
        (grad, reference.monce_backward(upstream.double(), *exact)),
    ):
        assert contract.relative_error(torch.from_numpy(got), want) <= 2e-6


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, older: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    query, key = (x.to(dtype) for x in pair(2, 12))
    upstream, _, _, options = given = problem(query, key)
    losses, grad = run("plain", H200, [given], tmp_path, older)
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


@all_kernels
def test_broken_maps(gpu: Gpu, older: bool, tmp_path: Path) -> None:
    """NaN and infinities stay in their map; a single patch has loss 0, similar patches are
    finite."""
    torch.manual_seed(0)
    for n in (1, 2, 20):
        query, key = pair(4, n)
        query[1, n - 1, 3], key[3, 0, 2] = torch.nan, torch.inf
        for mode in PLAN_GRADIENTS:
            options = (0.07, 1.0, 50, 1.0, "hard", mode)
            losses, grad = run("plain", gpu, [problem(query, key, *options)], tmp_path, older)
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
    for epsilon in (1.0, 0.05, 0.005):
        for found in run("plain", gpu, [problem(query, key, 0.07, epsilon)], tmp_path, older):
            assert np.isfinite(found).all()


@pytest.mark.parametrize("older", [False, True])
def test_small_losses_keep_their_digits(older: bool, tmp_path: Path) -> None:
    key = torch.eye(6).unsqueeze(0)
    losses, _ = run("plain", H200, [problem(key, key, 0.05)], tmp_path, older)
    want = reference.monce(key.double(), key.double(), 0.05, 1.0, 50, 1.0, "hard", "exact")
    assert (want < 1e-7).all()
    assert contract.relative_error(torch.from_numpy(losses), want) < 1e-5


@all_kernels
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "plain"])
def test_under_sanitizers(kind: str, gpu: Gpu, older: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = [
        problem(*pair(1, 59, 19), 0.07, 0.5, 7),
        problem(*pair(2, 7, 5), 0.07, 0.1, 9),
        problem(*pair(2, 21, 35), 0.07, 0.01, 5),
        problem(*pair(1, 17, 3), 0.07, 0.5, 6, 1.0, "exp"),
        problem(*pair(1, 18, 9), 0.07, 0.5, 4, 1.0, "easy", "detach"),
    ]
    check(kind, gpu, problems, tmp_path, older)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "plain"])
def test_shared_streams_under_sanitizers(kind: str, tmp_path: Path) -> None:
    """Two clusters of two blocks and three maps."""
    torch.manual_seed(0)
    gpu = (24 << 10, True, 5)
    check(kind, gpu, [problem(*pair(3, 140, 3), 0.07, 0.01, 2)], tmp_path, True)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "plain"])
def test_far_embeddings_under_sanitizers(kind: str, tmp_path: Path) -> None:
    """The kernels on chip, then the older ones in the same memory."""
    torch.manual_seed(0)
    query, key = (30 * x for x in pair(34, 4, 3))
    check(kind, H200, [problem(query, key, 0.07, 0.5, 2)], tmp_path)
