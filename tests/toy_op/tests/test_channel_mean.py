"""Means of feature maps: values, gradients, contract."""

from __future__ import annotations

import contract
import draws
import pytest
import torch

from mghf_fast import functional, ops, use_backend
from mghf_fast.reference import channel_mean as reference


def test_definition() -> None:
    x = draws.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = torch.einsum("bchw->bc", x) / 20
    assert contract.relative_error(functional.channel_mean(x), expected) < 1e-12


def test_gradcheck() -> None:
    x = draws.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(functional.channel_mean, x)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 7), (1, 17, 13, 5), (1, 2, 70, 71)])
def test_values_and_gradients(backend: str, shape: tuple[int, ...]) -> None:
    contract.check_against_reference(
        lambda x: functional.channel_mean(x, backend=backend),
        reference.channel_mean,
        [draws.randn(shape)],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    contract.check_half_precision(
        lambda x: functional.channel_mean(x, backend=backend),
        reference.channel_mean,
        [draws.randn(1, 4, 32, 32)],
        dtype,
    )


@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return functional.channel_mean(x, backend=backend)

    x = draws.randn(2, 5, 6, 7).to(dtype)
    for _, strided in contract.image_layouts(x):
        contract.check_layout(fn, x, strided)


def test_contract(backend: str) -> None:
    x = draws.randn(2, 3, 4, 5, requires_grad=True)
    contract.check_opcheck(ops.channel_mean.channel_mean, x, backend)
    contract.check_compiled(lambda x: functional.channel_mean(x, backend=backend) * 2, x.detach())
    contract.check_deterministic(
        backend, lambda x: functional.channel_mean(x, backend=backend), x.detach()
    )


def test_second_derivative() -> None:
    contract.check_second_derivative(
        lambda x: functional.channel_mean(x) ** 2, draws.randn(1, 2, 2, 2)
    )


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    x = draws.rand(1, 2, 3, 3)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run channel_mean: "):
        functional.channel_mean(x, backend="triton")
    with use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' cannot run channel_mean: "):
        functional.channel_mean(x.double())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="x must have shape"):
        functional.channel_mean(draws.rand(3, 3))
