"""Steps of Triton kernels that are one launch."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import interpreter
import pytest
import torch

from mghf_fast.backends import triton_is_interpreted

pytest.importorskip("triton")
import triton
import triton.language as tl

from mghf_fast.kernels import turns
from mghf_fast.kernels.turns import draw, leave, wait

pytestmark = pytest.mark.skipif(
    not triton_is_interpreted() and not torch.cuda.is_available(),
    reason="there is no GPU, and TRITON_INTERPRET is not 1",
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILES, STEPS = 5, 3


@triton.jit
def _sums_kernel(counters: Any, x: Any, tiles: Any, BLOCK: tl.constexpr) -> None:
    """Row by row, x[step + 1] = the sum of x[step] plus the number of the element."""
    drawn = draw(counters)
    wait(counters, drawn // tiles * tiles)
    step = drawn // tiles
    i = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + step * tiles + i, mask=i < tiles, other=0.0), axis=0)
    tl.store(x + (step + 1) * tiles + drawn % tiles, total + drawn % tiles)
    leave(counters, x)


@triton.jit
def _wait_kernel(counters: Any, count: Any) -> None:
    wait(counters, count)


def sums(x: torch.Tensor, counters: torch.Tensor) -> list[float]:
    _sums_kernel[(STEPS * TILES,)](counters, x, TILES, BLOCK=8)
    return x[-1].tolist()


def start() -> torch.Tensor:
    x = torch.full((STEPS + 1, TILES), float("nan"), device=DEVICE)
    x[0] = 1.0
    return x


def test_triton_steps_follow_each_other() -> None:
    # 5 elements of 1; then 5 + i; then 5 * 5 + 10 + i; then 5 * 35 + 10 + i.
    expected = [185.0, 186.0, 187.0, 188.0, 189.0]
    counters = turns.counters_for(start())
    for _ in range(2):
        assert sums(start(), counters) == expected
        assert not counters.any()
    assert turns.counters_for(start()) is counters
    if triton_is_interpreted():
        with interpreter.another_order():
            assert sums(start(), counters) == expected


def test_triton_waits_for_programs_that_run_at_the_same_time() -> None:
    if not triton_is_interpreted():
        pytest.skip("on a GPU the other programs do it")
    counters = torch.zeros(turns.COUNTERS, dtype=torch.int32)
    counters[turns.LEFT.value] = TILES - 1
    last = threading.Timer(0.3, counters[turns.LEFT.value].add_, (1,))
    last.start()
    _wait_kernel[(1,)](counters, TILES)
    assert counters[turns.LEFT.value] == TILES and counters[turns.LOST.value] == 0
    last.join()


def test_triton_gives_up_rather_than_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton_is_interpreted():
        pytest.skip("it takes seconds of a GPU")
    monkeypatch.setattr(turns, "MOST_POLLS", tl.constexpr(3))
    x, counters = start(), torch.zeros(turns.COUNTERS, dtype=torch.int32)
    counters[turns.LEFT.value] = -1  # as if a program did not leave
    sums(x, counters)
    assert counters[turns.LOST.value] == 1
    counters.zero_()
    counters[turns.LOST.value] = 1
    sums(x, counters)
    assert x[0, 0].isnan()
    assert not counters.any()


def test_triton_counters_of_a_graph_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    x = SimpleNamespace(device=torch.device("cpu"), is_cuda=True)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)  # noqa: B023
        first, second = (turns.counters_for(x) for _ in range(2))
        assert (first is second) != capturing
    assert turns.counters_for(x) is not turns.counters_for(torch.zeros(1))
