"""The CUDA kernels of `monce` for maps that a cluster of blocks, or a block alone, solves by
products of warpgroups, on the host, against the float64 reference."""

from __future__ import annotations

from pathlib import Path

import contract
import numpy as np
import pytest
import torch
from emulated import KINDS, needs_modules
from test_cuda_monce import (
    H200,
    Gpu,
    check,
    compare,
    pair,
    problem,
    problems_that_hide_little,
    run,
)

from mghf_fast.reference import monce as reference

pytestmark = needs_modules

ONE_CLUSTER: Gpu = (227 << 10, True, 3)  # of two blocks at a time
ONE_MULTIPROCESSOR: Gpu = (227 << 10, True, 1)


@pytest.mark.parametrize(
    ("n", "depth", "options"),
    [
        (449, 64, (0.07, 1.0, 3)),  # a row and a column of a block's own
        (460, 17, (0.5, 0.05, 3, 0.5, "easy")),
        (897, 9, (0.07, 1.0, 2, 1.0, "hard", "detach")),  # three blocks
    ],
)
def test_values_and_gradients(
    n: int, depth: int, options: tuple[object, ...], tmp_path: Path
) -> None:
    torch.manual_seed(n)
    check("plain", H200, [problem(*pair(1, n, depth), *options)], tmp_path)


@pytest.mark.parametrize("n", [33, 64, 112, 113, 224, 225, 336, 337, 441, 448])
def test_maps_of_a_block(n: int, tmp_path: Path) -> None:
    """Every number of warpgroups, full and not."""
    torch.manual_seed(n)
    problems = [problem(*pair(1, n, 64), 0.07, 1.0, 3)]
    if n < 225:
        problems.append(problem(*pair(2, n, 17), 0.5, 0.05, 9, 0.5, "easy"))
        problems.append(problem(*pair(1, n, 5), 0.07, 0.5, 3, 1.0, "hard", "detach"))
    check("plain", H200, problems, tmp_path)


def test_entries_that_do_not_count_are_hidden(tmp_path: Path) -> None:
    check("plain", H200, problems_that_hide_little(), tmp_path)


def test_errors_of_a_block(tmp_path: Path) -> None:
    """Tensor cores truncate sums, and logits are divided by the temperature."""
    torch.manual_seed(0)
    upstream, query, key, options = given = problem(*pair(1, 100, 64), 0.07, 1.0)
    losses, grad = run("plain", H200, [given], tmp_path)
    exact = (query.double(), key.double(), *options)
    for got, want in (
        (losses, reference.monce(*exact)),
        (grad, reference.monce_backward(upstream.double(), *exact)),
    ):
        assert contract.relative_error(torch.from_numpy(got), want) <= 2e-6


def test_more_maps_than_blocks(tmp_path: Path) -> None:
    """Three blocks of a warpgroup share a multiprocessor; NaN stays in its map."""
    torch.manual_seed(0)
    query, key = pair(8, 35, 7)
    query[1, 34, 3], key[3, 0, 2] = torch.nan, -torch.inf
    upstream, _, _, options = given = problem(query, key, 0.07, 0.2, 9)
    losses, grad = run("plain", ONE_MULTIPROCESSOR, [given], tmp_path)
    whole, broken = [0, 2, 4, 5, 6, 7], [1, 3]
    assert np.isnan(losses[broken]).all() and np.isnan(grad[broken]).all()
    compare((upstream[whole], query[whole], key[whole], options), losses[whole], grad[whole])


def test_more_maps_than_clusters(tmp_path: Path) -> None:
    """NaN and infinities stay in their map."""
    torch.manual_seed(0)
    query, key = pair(4, 449, 7)
    query[1, 448, 3], key[3, 0, 2] = torch.nan, -torch.inf
    upstream, _, _, options = given = problem(query, key, 0.07, 1.0, 2)
    losses, grad = run("plain", ONE_CLUSTER, [given], tmp_path)
    whole, broken = [0, 2], [1, 3]
    assert np.isnan(losses[broken]).all() and np.isnan(grad[broken]).all()
    compare((upstream[whole], query[whole], key[whole], options), losses[whole], grad[whole])


@pytest.mark.parametrize("older", [False, True])
def test_the_other_kernels_state(older: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check("plain", H200, [problem(*pair(1, 449, 5), 0.07, 1.0, 2)], tmp_path, older, not older)


def test_iterations_that_are_not_in_the_state(tmp_path: Path) -> None:
    """The backward makes them again, and its recursion goes past those that were made."""
    torch.manual_seed(0)
    check("plain", H200, [problem(*pair(1, 450, 4), 0.3, 0.05, 9)], tmp_path)


def test_which_kernels_run(tmp_path: Path) -> None:
    """They round differently from the older ones, which solve what they do not: the cost "exp",
    and an epsilon below 0.05."""
    torch.manual_seed(0)
    problems = [
        problem(*pair(1, 449, 3), 0.07, epsilon, 1, 1.0, cost, "detach")
        for epsilon, cost in ((0.05, "hard"), (0.04, "hard"), (1.0, "exp"))
    ]
    newer, older = (run("plain", H200, problems, tmp_path, choice) for choice in (False, True))
    assert [(a == b).all() for a, b in zip(newer, older, strict=True)] == [False] * 2 + [True] * 4


def test_scales_of_numbers(tmp_path: Path) -> None:
    """Halves have a small range: small gradients, and rows that are not unit."""
    torch.manual_seed(0)
    upstream, query, key, options = problem(*pair(1, 449, 5), 0.07, 1.0, 2)
    problems = [(upstream * 1e-30, query, key, options)]
    problems += [(upstream, query * scale, key, options) for scale in (1e-12, 16.0)]
    check("plain", H200, problems, tmp_path)


def test_embeddings_far_from_unit_length(tmp_path: Path) -> None:
    """The older kernels solve maps whose sums leave float32's range, as with a key that all queries
    are far from, and no others."""
    torch.manual_seed(0)
    upstream, query, key, options = problem(*pair(2, 449, 3), 0.07, 1.0, 1)
    query[1], key[1] = 20 * query[1].abs(), 20 * key[1].abs()
    key[1, 5] *= -1
    problems = [(upstream, query, key, options)]
    found, older = (run("plain", H200, problems, tmp_path, choice) for choice in (False, True))
    compare(problems[0], *found)
    for got, same in zip(found, older, strict=True):
        assert (got[1] == same[1]).all() and not (got[0] == same[0]).all()


def test_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    query, key = (x.to(torch.bfloat16) for x in pair(1, 449, 12))
    upstream, _, _, options = given = problem(query, key, 0.07, 1.0, 2)
    losses, grad = run("plain", H200, [given], tmp_path)
    exact = (query.double(), key.double(), *options)
    want = reference.monce(*exact)
    assert contract.relative_error(torch.from_numpy(losses), want) <= 1e-5
    want = reference.monce_backward(upstream.double(), *exact)
    rounding = contract.relative_error(want.bfloat16(), want)
    got = torch.from_numpy(grad).view(torch.bfloat16)
    assert contract.relative_error(got, want) <= 1.01 * rounding + 1e-5


def test_one_product_in_place_of_three(tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = [problem(*pair(1, 449, 40), 0.07, 1.0, 2)]
    exact, tf32, bfloat16 = (
        [torch.from_numpy(x) for x in run("plain", H200, problems, tmp_path, precision=precision)]
        for precision in ("float32", "tf32", "bfloat16")
    )
    for got, same, close in zip(tf32, bfloat16, exact, strict=True):
        assert torch.equal(got, same)
        assert 3e-5 <= contract.relative_error(got, close) <= 3e-3


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "plain"])
def test_under_sanitizers(kind: str, tmp_path: Path) -> None:
    """One cluster and two maps."""
    torch.manual_seed(0)
    check(kind, ONE_CLUSTER, [problem(*pair(2, 449, 3), 0.07, 1.0, 1)], tmp_path)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "plain"])
def test_blocks_under_sanitizers(kind: str, tmp_path: Path) -> None:
    """Blocks of one to three warpgroups, some of which have several maps."""
    torch.manual_seed(0)
    problems = [
        problem(*pair(5, 66, 3), 0.07, 0.5, 7),
        problem(*pair(2, 130, 3), 0.07, 1.0, 2),
        problem(*pair(2, 226, 3), 0.07, 1.0, 1, 1.0, "easy", "detach"),
    ]
    check(kind, ONE_MULTIPROCESSOR, problems, tmp_path)


@pytest.mark.parametrize("kind", [k for k in KINDS if k == "thread"])
def test_clusters_have_their_own_memory(kind: str, tmp_path: Path) -> None:
    """Several at a time, whose maps make their iterations again."""
    torch.manual_seed(0)
    check(kind, H200, [problem(*pair(2, 34, 3), 0.07, 0.1, 7)], tmp_path)
