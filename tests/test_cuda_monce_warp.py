"""The CUDA kernels of `monce` for maps that one warp solves, on the host, against the float64
reference."""

from __future__ import annotations

from pathlib import Path

import contract
import numpy as np
import pytest
import torch
from emulated import KINDS, needs_modules
from test_cuda_monce import (
    CHIP,
    H200,
    SMALL,
    Gpu,
    Options,
    Problem,
    check,
    compare,
    layouts,
    pair,
    problem,
    run,
)

from mghf_fast.reference import monce as reference

pytestmark = needs_modules

ONE_MULTIPROCESSOR: Gpu = (163 << 10, False, 1)


def test_values_and_gradients(tmp_path: Path) -> None:
    """Every size: tiles that are full and not, rows that several lanes have."""
    torch.manual_seed(0)
    depths = (64, 5, 17, 32, 1, 48)
    problems = [problem(*pair(2, n, depths[n % 6])) for n in range(2, 33)]
    check("plain", H200, problems, tmp_path)


OPTIONS: list[Options] = [
    (0.07, 1.0, 50, 1.0, "hard", "exact"),
    (0.07, 1.0, 50, 1.0, "easy", "detach"),
    (0.5, 0.05, 12, 0.5, "easy", "exact"),
    (0.3, 0.05, 9, 2.0, "hard", "exact"),
    (0.07, 0.5, 1, 1.0, "hard", "exact"),
    (0.02, 1.0, 8, 1.0, "hard", "detach"),
    (1e4, 0.05, 8, 3.0, "hard", "exact"),
    # Here the temperature and the plan cancel, so that all weights are equal: nothing of what does
    # not count may get one.
    (0.1, 0.1, 8, 1.0, "easy", "exact"),
]


def test_options(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = (2, 4, 8, 9, 16, 25, 32)
    problems = [problem(*pair(2, n, 12), *options) for n in sizes for options in OPTIONS]
    check("plain", H200, problems, tmp_path)


def test_errors(tmp_path: Path) -> None:
    """Tensor cores truncate sums, and logits are divided by the temperature."""
    torch.manual_seed(0)
    problems = [problem(*pair(8, n, 64)) for n in (4, 16, 25)]
    found = run("plain", H200, problems, tmp_path)
    for given, losses, grad in zip(problems, found[::2], found[1::2], strict=True):
        upstream, query, key, options = given
        exact = (query.double(), key.double(), *options)
        for got, want in (
            (losses, reference.monce(*exact)),
            (grad, reference.monce_backward(upstream.double(), *exact)),
        ):
            assert contract.relative_error(torch.from_numpy(got), want) <= 1.5e-6


def test_layouts_of_other_types(tmp_path: Path) -> None:
    """Rows whose fours are one access, and others, of every type."""
    torch.manual_seed(0)
    check("plain", H200, layouts(), tmp_path)
    query, key = pair(3, 11, 20)
    problems: list[Problem] = []
    for dtype in (torch.float16, torch.bfloat16):
        q, k = query.to(dtype), key.to(dtype)
        given = ((q, k), (q[:, :, :18], k[:, :, :18]), (q.mT.contiguous().mT, k))
        problems += [problem(*each) for each in given]
    found = run("plain", H200, problems, tmp_path)
    for (upstream, q, k, options), losses, grad in zip(
        problems, found[::2], found[1::2], strict=True
    ):
        exact = (q.double(), k.double(), *options)
        assert contract.relative_error(torch.from_numpy(losses), reference.monce(*exact)) <= 1e-5
        want = reference.monce_backward(upstream.double(), *exact)
        rounding = contract.relative_error(want.to(q.dtype), want)
        got = torch.from_numpy(grad).view(q.dtype)
        assert contract.relative_error(got, want) <= 1.01 * rounding + 1e-5


def test_nan_stays_in_its_map(tmp_path: Path) -> None:
    """Also in the last number of a patch, and an infinity. The maps do not fill their blocks."""
    torch.manual_seed(0)
    problems = []
    for n in (3, 12, 25):
        query, key = pair(7, n, 7)
        query[1, n - 1, 6], key[3, 0, 2], query[6, 1, 0] = torch.nan, -torch.inf, torch.inf
        problems.append(problem(query, key, 0.07, 0.2, 9))
    found = run("plain", H200, problems, tmp_path)
    whole, broken = [0, 2, 4, 5], [1, 3, 6]
    for given, losses, grad in zip(problems, found[::2], found[1::2], strict=True):
        upstream, query, key, options = given
        assert np.isnan(losses[broken]).all() and np.isnan(grad[broken]).all()
        compare((upstream[whole], query[whole], key[whole], options), losses[whole], grad[whole])


def test_a_map_does_not_depend_on_others(tmp_path: Path) -> None:
    """Nor on the warp that solves it: its numbers are the same, bit for bit."""
    torch.manual_seed(0)
    problems = []
    for n in (4, 25):
        upstream, query, key, options = problem(*pair(9, n, 16))
        problems += [(upstream[b:], query[b:], key[b:], options) for b in (0, 3, 8)]
    found = run("plain", H200, problems, tmp_path)
    for whole in (0, 6):
        for k, first in ((2, 3), (4, 8)):
            for part in (0, 1):
                assert (found[whole + part][first:] == found[whole + k + part]).all()


def test_more_maps_than_repeat_iterations(tmp_path: Path) -> None:
    """Two warps have the memory for so many iterations, and only some maps need it."""
    torch.manual_seed(0)
    query, key = pair(7, 31, 3)
    query[::2], key[::2] = query[::2, :1], key[::2, :1]  # settle at once
    check("plain", H200, [problem(query, key, 0.07, 0.05, 20000)], tmp_path)


@pytest.mark.parametrize("older", [False, True])
def test_the_other_kernels_state(older: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = [problem(*pair(3, n)) for n in (5, 14, 32)]
    problems += [problem(*pair(2, n, 3), 0.07, 0.05) for n in (5, 14, 32)]
    check("plain", H200, problems, tmp_path, older, not older)


def test_which_kernels_run(tmp_path: Path) -> None:
    """They round differently from those on chip, to which the cost "exp" is left, and from the
    older ones, which have what is below an epsilon of 0.05. They need no new GPU."""
    torch.manual_seed(0)
    problems = [
        problem(*pair(1, 32, 3), 0.07, epsilon, 3, 1.0, cost)
        for epsilon, cost in ((0.05, "hard"), (0.05, "exp"), (0.04, "hard"))
    ]
    new, old = (run("plain", H200, problems, tmp_path, older) for older in (False, True))
    assert [(a == b).all() for a, b in zip(new, old, strict=True)] == [False] * 4 + [True] * 2
    for gpu in (CHIP, SMALL, ONE_MULTIPROCESSOR):
        same = run("plain", gpu, problems[:1], tmp_path)
        assert all((a == b).all() for a, b in zip(new[:2], same, strict=True))


def test_scales_of_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = []
    for n in (6, 25):
        upstream, query, key, options = problem(*pair(2, n))
        problems += [(upstream * scale, query, key, options) for scale in (1e-12, 1e-30, 1e20)]
        problems += [(upstream, query * scale, key, options) for scale in (1e-12, 1e-3, 16.0)]
        problems += [(upstream, query * scale, key / scale, options) for scale in (1e-12, 1e12)]
    check("plain", H200, problems, tmp_path)


@pytest.mark.parametrize("cost", ["hard", "easy"])
def test_embeddings_far_from_unit_length(cost: str, tmp_path: Path) -> None:
    """The older kernels solve maps whose sums leave float32's range, as with a key that all queries
    are far from, and no others."""
    torch.manual_seed(0)
    upstream, query, key, options = problem(*pair(5, 21, 3), 0.07, 1.0, 5, 1.0, cost)
    query[1::2], key[1::2] = 20 * query[1::2].abs(), 20 * key[1::2].abs()
    key[1::2, 5] *= -1
    problems = [(upstream, query, key, options)]
    found, older = (run("plain", H200, problems, tmp_path, choice) for choice in (False, True))
    compare(problems[0], *found)
    for got, same in zip(found, older, strict=True):
        assert (got[1::2] == same[1::2]).all()
        assert not any((got[b] == same[b]).all() for b in (0, 2, 4))


def test_one_product_in_place_of_three(tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = [problem(*pair(4, n, 40)) for n in (4, 25)]
    exact, tf32, bfloat16 = (
        [torch.from_numpy(x) for x in run("plain", H200, problems, tmp_path, precision=precision)]
        for precision in ("float32", "tf32", "bfloat16")
    )
    for got, same, close in zip(tf32, bfloat16, exact, strict=True):
        assert torch.equal(got, same)
        assert 3e-5 <= contract.relative_error(got, close) <= 3e-3


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "plain"])
def test_under_sanitizers(kind: str, tmp_path: Path) -> None:
    """All sizes of tiles; iterations that several lanes read, and that are made again for some of
    several maps of a warp; patches that are read one number at a time."""
    torch.manual_seed(0)
    query, key = pair(5, 3, 5)
    problems = [
        problem(*pair(5, 4, 8), 0.07, 0.05, 7),
        problem(query.mT.contiguous().mT, key, 0.07, 0.05, 9),
        problem(*pair(2, 12, 6), 0.07, 1.0, 2, 1.0, "easy", "detach"),
        problem(*pair(2, 11, 4), 0.07, 0.05, 9),
        problem(*pair(3, 25, 4), 0.07, 0.05, 60000),
    ]
    check(kind, ONE_MULTIPROCESSOR, problems, tmp_path)
