"""The emulator and the sanitizers find the faults that CUDA kernels may have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from emulated import needs_modules, results, run

pytestmark = needs_modules
EXIT_CODES = {"data": 66, "heap-buffer-overflow": 67}  # the sanitizers'; Python's own is 1


@pytest.mark.parametrize(
    ("kind", "kernel", "fault", "found"),
    [
        ("thread", "planted_barrier", 1, "data race"),
        ("thread", "planted_cluster", 1, "data race"),
        ("thread", "planted_copy", 2, "data race"),
        ("thread", "planted_ring", 2, "data race"),
        ("thread", "planted_workspace", 1, "data race"),
        ("thread", "planted_workspaces", 1, "data race"),
        ("plain", "planted_ring", 3, "a barrier that others never reach"),
        ("address", "planted_index", 1, "heap-buffer-overflow"),
        ("address", "planted_index", -1, "heap-buffer-overflow"),
        ("plain", "planted_barrier", 2, "a barrier that others never reach"),
        ("address", "planted_barrier", 2, "a barrier that others never reach"),
    ],
)
def test_planted_faults_are_found(
    kind: str, kernel: str, fault: int, found: str, tmp_path: Path
) -> None:
    x = np.arange(64, dtype=np.int32)
    (result,) = results(kind, [(kernel, (x, 0))], tmp_path)
    assert (result == (x if kernel == "planted_index" else x[::-1])).all()
    status, errors = run(kind, [(kernel, (x, fault))], tmp_path)
    assert status == EXIT_CODES.get(found.split()[0], 1) and found in errors


@pytest.mark.parametrize("kernel", ["planted_copy", "planted_ring"])
def test_copies_are_not_there_before_they_are_waited_for(kernel: str, tmp_path: Path) -> None:
    x = np.arange(1, 65, dtype=np.int32)
    (result,) = results("plain", [(kernel, (x, 1))], tmp_path)
    assert not (result == x[::-1]).all()


def test_a_kernel_is_allowed_its_shared_memory_once(tmp_path: Path) -> None:
    calls = [
        (1, 0, 100, True, None),  # not allowed, so it is requested again
        (1, 0, 100, False, True),
        (1, 0, 100, False, False),
        (1, 0, 50, False, False),
        (1, 0, 101, False, True),
        (1, 1, 100, False, True),
        (2, 0, 100, False, True),
    ]
    found = results("plain", [("allow_once", call[:4]) for call in calls], tmp_path)
    assert list(found) == [call[4] for call in calls]


def test_tensor_cores_cut_off_what_an_addition_rounds(tmp_path: Path) -> None:
    last = 2.0**-23  # the last place of 1
    sums = [
        ((1.0, [0.75 * last]), 1.0),  # to nearest it would be 1 + last
        ((-1.0, [-0.75 * last]), -1.0),
        ((1.0, [0.5 * last, 0.5 * last]), 1 + last),  # one place more is kept of each
        ((1.0, [0.25 * last] * 4), 1.0),
        ((0.0, [3.0, -1.0]), 2.0),
        ((0.0, [0.0]), 0.0),
        ((1.0, [float("inf")]), float("inf")),
    ]
    found = results("plain", [("tensor_core_sum", arguments) for arguments, _ in sums], tmp_path)
    assert list(found) == [want for _, want in sums]


def _factors(depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Halves whose products have exact sums, as bits, and their product."""
    random = np.random.default_rng(0)
    a, b = random.integers(-8, 8, (64, depth)), random.integers(-8, 8, (depth, 32))
    return *(x.astype(np.float16).view(np.uint16) for x in (a, b)), (a @ b).astype(np.float32)


@pytest.mark.parametrize("depth", [16, 32, 80])
def test_products_of_a_warpgroup(depth: int, tmp_path: Path) -> None:
    a, b, want = _factors(depth)
    (found,) = results("plain", [("planted_product", (a, b, 0))], tmp_path)
    assert (found == want).all()


@pytest.mark.parametrize(
    ("kind", "fault", "found"),
    [
        ("plain", 1, "a product without begin_products"),
        ("plain", 3, "a product's factor or sum changes"),
        ("plain", 5, "a product's factor or sum changes"),
        ("thread", 0, ""),
        ("thread", 6, "data race"),
        ("thread", 7, "data race"),
    ],
)
def test_faults_in_products_are_found(kind: str, fault: int, found: str, tmp_path: Path) -> None:
    a, b, _ = _factors(80)
    status, errors = run(kind, [("planted_product", (a, b, fault))], tmp_path)
    code = EXIT_CODES["data"] if found == "data race" else 1
    assert status == (code if fault else 0) and found in errors


@pytest.mark.parametrize("fault", [2, 4])
def test_wrong_distances_and_early_reads_give_wrong_products(fault: int, tmp_path: Path) -> None:
    a, b, want = _factors(80)
    (found,) = results("plain", [("planted_product", (a, b, fault))], tmp_path)
    assert not np.allclose(found, want)


def test_two_halves_are_a_float32(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ones = rng.uniform(0.5, 1, 200) * rng.choice([-1, 1], 200)
    exponents = np.array([-126, -100, -1, 0, 1, 30, 127])
    series = [np.append(ones * 2.0 ** (e - rng.integers(0, 20, 200)), 2.0**e) for e in exponents]
    calls = [
        ("split_halves", (s.astype(np.float32).tolist(), 2.0**e))
        for e, s in zip(exponents, series, strict=True)
    ]
    for (_, (x, largest)), found in zip(calls, results("plain", calls, tmp_path), strict=True):
        big, small, by, back = found
        assert by * back == 1 and np.log2(by) % 1 == 0
        assert largest < 2.0**-112 or 2**13 <= largest * by < 2**14
        error = np.abs(np.array(big, float) + small - np.array(x, float) * by) * back
        assert (error <= np.maximum(2.0**-23 * np.abs(x), 2.0**-38 * largest)).all()
    values, odd = [1.0, np.inf, np.nan], [("split_halves", ([1.0, np.inf, np.nan], np.inf))]
    ((big, small, by, back),) = results("plain", odd, tmp_path)
    assert by == back == 1 and big[:2] == values[:2]
    assert small[0] == 0 and np.isnan([big[2], *small[1:]]).all()
