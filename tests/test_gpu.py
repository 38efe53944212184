"""What only a CUDA device can show: graphs, streams, a second device, the whole loss on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mghf_fast import MGHFLoss, functional, use_backend
from mghf_fast.ops import OPS

pytestmark = pytest.mark.gpu
SIZE = 40


@pytest.fixture(autouse=True)
def triton_kernels() -> Iterator[None]:
    with use_backend("triton"):
        yield


def images(device: str = "cuda") -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.rand(2, 1, 3, SIZE, SIZE, generator=generator, device="cpu").to(device)
    return x[0].clone().requires_grad_(), x[1]


def step(loss: MGHFLoss, sr: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(sr, gt)
    (gradient,) = torch.autograd.grad(value, sr)
    return value.detach(), gradient


@pytest.mark.parametrize("variant", ["n", "c"])
def test_the_loss_on_the_device_is_that_of_the_cpu(variant: str) -> None:
    loss = MGHFLoss(variant)
    exact = copy.deepcopy(loss).cpu().double()
    with use_backend("reference"):
        expected = step(exact, *(x.detach().double().requires_grad_() for x in images("cpu")))
    got = step(loss.cuda(), *images())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("variant", ["n", "c"])
def test_capture_and_replay(variant: str) -> None:
    """A captured step, replayed on new images, gives what the step gives; so nothing in it waits
    for the device or depends on values on the host."""
    loss = MGHFLoss(variant).cuda()
    sr, gt = images()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(loss, sr, gt)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(loss, sr, gt)
    with torch.no_grad():
        sr.copy_(sr.flip(3))
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, step(loss, sr, gt), strict=True):
        assert torch.equal(got, expected)


def test_another_stream() -> None:
    loss, (sr, gt) = MGHFLoss("c").cuda(), images()
    expected = step(loss, sr, gt)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = step(loss, sr, gt)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_a_second_device() -> None:
    """Its tensors are worked on there while the first is the current one."""
    loss = MGHFLoss("c")
    got = step(copy.deepcopy(loss).to("cuda:1"), *images("cuda:1"))
    expected = step(loss.to("cuda:0"), *images("cuda:0"))
    for a, b in zip(got, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_deterministic_algorithms() -> None:
    """The kernels need nothing that PyTorch refuses under this flag, and repeat bit by bit."""
    torch.use_deterministic_algorithms(True)
    try:
        loss, (sr, gt) = MGHFLoss("c").cuda(), images()
        first, second = step(loss, sr, gt), step(loss, sr, gt)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op_has_triton_kernels(op: str) -> None:
    assert OPS[op].why_not("triton", torch.zeros(1, 2, 2, device="cuda")) is None


def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 values in one stack of features."""
    x = torch.zeros(1, 5, 16384, 32768, dtype=torch.float16, device="cuda")
    x[0, 4, -1, -8:] = 1
    assert functional.channel_entropy(x)[0, 4] > 0
