"""Tests that need a CUDA device, for every op and both losses: graphs, streams, a second device,
PyTorch's deterministic mode, and torch.compile's kernels for GPUs."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator

import contract
import draws
import pytest
import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Shape
from mghf_fast import MGHFLoss, functional, native, preferences, use_backend
from mghf_fast.backends import unavailable_reasons
from mghf_fast.ops import OPS

pytestmark = pytest.mark.gpu
SIZE = 80
TINY = Shape(2, 64)
CASES = sorted(cases.load_all())


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kind of kernels in turn; ops without a CUDA kernel use Triton's."""
    kind: str = request.param
    if kind == "cuda" and (reason := unavailable_reasons().get("cuda")) is not None:
        pytest.skip(reason)
    order = (kind, *(b for b in ("cuda", "triton") if b != kind))
    monkeypatch.setattr(preferences, "preferred_kernels", lambda *_: order)
    return kind


def images(device: str = "cuda") -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.rand(2, 1, 3, SIZE, SIZE, generator=generator, device="cpu").to(device)
    return x[0].clone().requires_grad_(), x[1]


def step(loss: MGHFLoss, sr: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(sr, gt)
    (gradient,) = torch.autograd.grad(value, sr)
    return value.detach(), gradient


class Problem:
    """An op, or a loss, on tiny inputs: its result, and the gradient of its first input."""

    def __init__(self, op: str) -> None:
        self.case = cases.CASES[op]
        with torch.device("cuda"):
            self.function = self.case.forms["mghf_fast"].make()
            self.leaf, *self.others = (x.detach() for x in self.case.inputs(TINY))
            output = () if self.case.output is None else self.case.output(TINY)
            self.upstream = draws.rand(output)

    def result(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(x, *self.others)
        return result

    def run(self) -> list[Tensor]:
        if "step" not in self.case.parts:
            return [self.result(self.leaf)]
        leaf = self.leaf.detach().requires_grad_()
        result = self.result(leaf)
        return [result.detach(), *torch.autograd.grad(result, leaf, self.upstream)]


@pytest.fixture(params=CASES)
def problem(request: pytest.FixtureRequest) -> Problem:
    if request.param in ("coupling", "patches") and torch.get_default_device().type != "cuda":
        pytest.skip("its weights are made at import: run with --device cuda")
    return Problem(request.param)


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ---- the whole loss ----


@pytest.mark.parametrize("variant", ["n", "c"])
def test_the_loss_on_the_device_is_that_of_the_cpu(variant: str) -> None:
    loss = MGHFLoss(variant)
    exact = copy.deepcopy(loss).cpu().double()
    with use_backend("reference"), torch.device("cpu"):
        expected = step(exact, *(x.detach().double().requires_grad_() for x in images("cpu")))
    got = step(loss.cuda(), *images())
    for a, b in zip(got, expected, strict=True):
        assert contract.relative_error(a.cpu(), b) <= 1e-3


@pytest.mark.parametrize("variant", ["n", "c"])
def test_the_loss_compiles_without_a_break(variant: str) -> None:
    loss = MGHFLoss(variant).cuda()
    compiled = torch.compile(loss, fullgraph=True)
    for got, expected in zip(step(compiled, *images()), step(loss, *images()), strict=True):
        assert contract.relative_error(got, expected) <= 1e-4


def test_bfloat16_and_channels_last() -> None:
    loss = MGHFLoss("c").cuda()
    value, _ = step(loss, *images())
    sr, gt = (x.contiguous(memory_format=torch.channels_last) for x in images())
    assert contract.relative_error(loss(sr, gt), value) <= 1e-4
    half, gradient = step(copy.deepcopy(loss).to(torch.bfloat16), *images())
    assert contract.relative_error(half, value) <= 5e-2
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()


# ---- every op ----


def test_capture_and_replay(problem: Problem) -> None:
    """A captured step, replayed on new values, gives the step's result; so nothing in it waits for
    the device or depends on values on the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            problem.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run()
    problem.leaf.copy_(problem.leaf.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, problem.run())


def test_another_stream(problem: Problem) -> None:
    """The inputs are written late on the stream on which the op is called; an op on another stream
    would read zeros."""
    expected = problem.run()
    late = problem.leaf.clone()
    problem.leaf.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        problem.leaf.copy_(late)
        got = problem.run()
    stream.synchronize()
    assert same(got, expected)


def test_deterministic_algorithms(problem: Problem) -> None:
    """The kernels use nothing that PyTorch refuses under this flag, and repeat bit by bit."""
    with insisting_on_deterministic_algorithms():
        assert same(problem.run(), problem.run())


@contextlib.contextmanager
def insisting_on_deterministic_algorithms() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_a_second_device() -> None:
    """Tensors on the second device are computed there while the first is the current one."""
    loss = MGHFLoss("c")
    got = step(copy.deepcopy(loss).to("cuda:1"), *images("cuda:1"))
    expected = step(loss.to("cuda:0"), *images("cuda:0"))
    for a, b in zip(got, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.cpu(), b.cpu())
    similarity = draws.rand(3, 20, 20).to("cuda:1")
    plan = functional.sinkhorn_plan(similarity)
    torch.testing.assert_close(plan, functional.sinkhorn_plan(similarity.to("cuda:0")).to("cuda:1"))
    images_there = draws.rand(2, 1, 3, 32, 32).to("cuda:1")
    assert functional.dec_loss(*images_there).device == torch.device("cuda:1")


@pytest.mark.parametrize("op", sorted(OPS))
def test_what_has_kernels(op: str, kernels: str) -> None:
    """All ops for Triton; for CUDA those that the library contains."""
    reason = OPS[op].why_not(kernels, torch.zeros(1, 2, 2, device="cuda"))
    built = native.build_facts(native.cuda_library())["cuda"]["ops"] if kernels == "cuda" else OPS
    assert (reason is None) == (op in built), reason


def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 values in one stack of features."""
    x = torch.zeros(1, 5, 16384, 32768, dtype=torch.float16, device="cuda")
    x[0, 4, -1, -8:] = 1
    assert functional.channel_entropy(x)[0, 4] > 0
