"""The CUDA kernels of `content_style` on the host, against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import contract
import draws
import numpy as np
import pytest
import torch
from emulated import KINDS, Call, needs_modules, results, strided
from torch import Tensor

from mghf_fast.reference import content_style as reference

pytestmark = needs_modules

LAST = torch.channels_last


class Problem(NamedTuple):
    gt: Tensor
    sr: Tensor
    top_m: int
    bins: int = 32

    @property
    def options(self) -> tuple[int, float, float, int]:
        return self.top_m, 1.1, 2**0.5, self.bins


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return draws.randn(shape), 2 * draws.randn(shape)


def layouts() -> Iterator[Problem]:
    """Every type and layout, also two at once, also such that four pixels are read at once."""
    for size in ((6, 9), (5, 8)):
        gt, sr = pair(2, 7, *size)
        for dtype in contract.DTYPES:
            g, s = gt.to(dtype), sr.to(dtype)
            yield Problem(g, s, 3)
            yield Problem(g.contiguous(memory_format=LAST), s.contiguous(memory_format=LAST), 3)
            if size != (6, 9) and dtype != torch.float32:
                continue  # at other strides their pixels are read one by one, as those before were
            for _, other in contract.image_layouts(s):
                yield Problem(g, other, 3)
                yield Problem(other, g, 3)


def sizes() -> Iterator[Problem]:
    """One map, more maps and bins than a block holds, several runs."""
    yield Problem(*pair(1, 5, 1, 9), 5)
    yield Problem(*pair(2, 3, 9, 1), 1)
    yield Problem(*pair(1, 1, 100, 100), 1)
    yield Problem(*pair(2, 2, 40, 41), 2)
    yield Problem(*pair(1, 3, 5, 5), 0)
    yield Problem(*pair(1, 100, 3, 8), 40)
    gt, sr = pair(1, 140, 5, 13)
    yield Problem(gt, sr, 67)
    last = [x.contiguous(memory_format=LAST) for x in (gt, sr)]
    yield Problem(*last, 67, 300)
    yield Problem(*(x.bfloat16() for x in last), 100, 10000)
    yield Problem(*(x.half() for x in (gt, sr)), 70, 10000)
    gt, sr = pair(1, 34, 31, 40)
    yield Problem(gt, sr, 34, 256)
    yield Problem(*(x.contiguous(memory_format=LAST) for x in (gt, sr)), 34, 256)


def near(memory_format: torch.memory_format) -> Iterator[Problem]:
    """Maps for which sums of squares and differences of Gram matrices would lose digits."""
    gt = draws.randn(1, 10, 20, 21)
    noise = draws.randn_like(gt)
    for sr in (gt + noise + 30, noise + 30 - gt, gt + 1e-3 * noise, 1e-3 * (gt + noise) + 2):
        yield Problem(*(x.contiguous(memory_format=memory_format) for x in (gt, sr)), 5)
    gt = gt + 100 * draws.randn(1, 10, 1, 1)
    sr = gt + 0.1 * noise
    yield Problem(*(x.contiguous(memory_format=memory_format) for x in (gt, sr)), 5)


def problems(kind: str) -> list[Problem]:
    torch.manual_seed(0)
    every = list(layouts())
    if kind == "plain":
        return [*every, *sizes(), *near(torch.contiguous_format), *near(LAST)]
    large = list(sizes())
    return [every[0], every[1], every[18], every[-4], *every[5:8], *large[4:8]]


def forward_calls(of: list[Problem]) -> list[tuple[str, tuple[object, ...]]]:
    return [("content_style", (strided(p.gt), strided(p.sr), *p.options)) for p in of]


def upstream(batch: int, term: int) -> list[Tensor]:
    """A random gradient for one of the terms, with a stride that is not 1, as autograd's may be."""
    return [draws.randn(batch, 2)[:, 0] * (i == term) for i in range(4)]


def check_values(p: Problem, found: tuple[np.ndarray, ...]) -> None:
    got = [torch.from_numpy(x) for x in found]
    want = reference.content_style(p.gt.double(), p.sr.double(), *p.options, "channel")
    assert torch.equal(got[4], want[4])
    for i in (0, 1, 2, 3, 5, 7):
        assert got[i].shape == want[i].shape
        assert contract.relative_error(got[i], want[i]) <= contract.VALUE_TOLERANCE, i


def check_gradient(p: Problem, grads: list[Tensor], found: np.ndarray) -> None:
    got = torch.from_numpy(found)
    if p.sr.dtype == torch.bfloat16:
        got = got.view(torch.bfloat16)
    exact = reference.content_style(p.gt.double(), p.sr.double(), *p.options, "channel")
    want = reference.content_style_backward(
        *(g.double() for g in grads), p.gt.double(), p.sr.double(), *exact[4:6], "channel"
    )
    rounding = contract.relative_error(want.to(p.sr.dtype), want)
    assert got.dtype == p.sr.dtype
    assert contract.relative_error(got, want) <= contract.GRADIENT_TOLERANCE + 2 * rounding


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, tmp_path: Path) -> None:
    of = problems(kind)
    found = results(kind, forward_calls(of), tmp_path)
    assert len(found) == len(of)
    calls, upstreams = [], []
    for i, (p, result) in enumerate(zip(of, found, strict=True)):
        check_values(p, result)
        for term in range(4) if kind == "plain" and i % 5 == 0 else (i % 4,):
            grads = upstream(p.gt.shape[0], term)
            upstreams.append((p, grads))
            given = [strided(x) for x in (*grads, p.gt, p.sr)]
            calls.append(("content_style_backward", (*given, *result[4:])))
    gradients = results(kind, calls, tmp_path)
    for (p, grads), gradient in zip(upstreams, gradients, strict=True):
        check_gradient(p, grads, gradient)
    if kind == "plain":
        again = results(kind, [*forward_calls(of[:8]), *calls[:8]], tmp_path)
        for first, second in zip([*found[:8], *gradients[:8]], again, strict=True):
            for a, b in zip(first, second, strict=True):
                assert a.tobytes() == b.tobytes()


ONE_MULTIPROCESSOR: Call = ("set_gpu", (227 << 10, True, 1))  # so that a block has many tiles
OLDER: Call = ("use_older", ("content_style", True))


def streamed() -> Iterator[Problem]:
    """Up to 64 kept maps, of which a block goes through tiles of pixels."""
    for shape, top_m in (
        ((2, 7, 5, 8), 3),
        ((3, 20, 20, 21), 0),
        ((1, 100, 12, 20), 64),
        ((2, 70, 18, 22), 33),
        ((1, 9, 40, 52), 9),
    ):
        gt, sr = pair(*shape)
        sr[0, 1, 2, 3] = torch.inf
        for layout in (torch.contiguous_format, LAST):
            yield Problem(*(x.contiguous(memory_format=layout) for x in (gt, sr)), top_m)
    for dtype in (torch.float16, torch.bfloat16):
        gt, sr = pair(1, 70, 18, 22)
        yield Problem(gt.to(dtype), sr.to(dtype), 40)
        yield Problem(*(x.to(dtype).contiguous(memory_format=LAST) for x in (gt, sr)), 40)


@pytest.mark.parametrize("kind", ["plain", "thread"])
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_newer_and_older_kernels_give_the_same_bits(
    kind: str, precision: str, tmp_path: Path
) -> None:
    """The products are the same, in the same order; of few and of many tiles a block."""
    torch.manual_seed(0)
    of = list(streamed())
    if kind == "thread":
        of = of[4:8]
    statistics = results("plain", forward_calls(of), tmp_path)
    calls: list[Call] = []
    for p, found in zip(of, statistics, strict=True):
        grads = [draws.randn(p.gt.shape[0]) for _ in range(4)]
        given = [strided(x) for x in (*grads, p.gt, p.sr)]
        calls.append(("content_style_backward", (*given, *found[4:], precision)))
    if kind == "thread":
        results(kind, [ONE_MULTIPROCESSOR, *calls], tmp_path)
        return
    new = results(kind, calls, tmp_path)
    long = results(kind, [ONE_MULTIPROCESSOR, *calls], tmp_path)[1:]
    old = results(kind, [OLDER, *calls], tmp_path)[1:]
    small = results(kind, [("set_gpu", (64 << 10, False)), *calls], tmp_path)[1:]
    for a, *others in zip(new, long, old, small, strict=True):
        is_nan = np.isnan(a)  # of either sign
        for b in others:
            assert np.array_equal(is_nan, np.isnan(b))
            assert a[~is_nan].tobytes() == b[~is_nan].tobytes()


def test_ties_go_to_the_lower_channel_and_nan_comes_first(tmp_path: Path) -> None:
    x = draws.rand(1, 1, 6, 6).expand(2, 8, 6, 6).clone()
    x[1, 5, 2, 2] = torch.nan
    found = results("plain", forward_calls([Problem(x, x, 4)]), tmp_path)[0]
    assert found[4].tolist() == [[0, 1, 2, 3], [5, 0, 1, 2]]
    for term in found[:4]:
        assert np.isfinite(term[0]) and np.isnan(term[1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_a_nan_does_not_spread_to_maps_that_are_not_kept(
    layout: torch.memory_format, tmp_path: Path
) -> None:
    gt, sr = (x.contiguous(memory_format=layout) for x in pair(1, 4, 6, 6))
    sr[0, 1, 2, 2] = sr[0, 3, 4, 5] = torch.nan
    problem = Problem(gt, sr, 1)  # keeps map 1
    found = results("plain", forward_calls([problem]), tmp_path)[0]
    given = [strided(x) for x in (*[torch.ones(1)] * 4, gt, sr)]
    call = ("content_style_backward", (*given, *found[4:]))
    grad = torch.from_numpy(results("plain", [call], tmp_path)[0])
    assert grad[0, 1].isnan().all() and grad[0, [0, 2]].isfinite().all()
    assert grad[0, 3, 4, 5].isnan() and grad[0, 3].isnan().sum() == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_input_is_seen(bad: float, tmp_path: Path) -> None:
    of = []
    for layout in (torch.contiguous_format, LAST):
        for which in range(2):
            images = [x.contiguous(memory_format=layout) for x in pair(2, 4, 6, 6)]
            images[which][1, 3, 2, 2] = bad
            of.append(Problem(*images, 1))
    for found in results("plain", forward_calls(of), tmp_path):
        for term in found[:4]:
            assert np.isfinite(term[0]) and not np.isfinite(term[1])


def test_constant_and_equal_maps(tmp_path: Path) -> None:
    zeros, ones = torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
    x = draws.randn(1, 4, 9, 9)
    of = [Problem(zeros, ones, 2), Problem(x, x, 2)]
    constant, equal = results("plain", forward_calls(of), tmp_path)
    assert constant[2] == pytest.approx(1)  # Pearson 0
    assert equal[0] == equal[1] == 0 and abs(equal[2]) < 1e-5 and equal[3] < 1e-12
    given = [strided(t) for t in (*[torch.ones(1)] * 4, zeros, ones)]
    call = ("content_style_backward", (*given, *constant[4:]))
    assert np.isfinite(results("plain", [call], tmp_path)[0]).all()
