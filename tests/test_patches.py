"""Patch projection: values, gradients, contract."""

from __future__ import annotations

import contract
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mghf_fast import functional, ops
from mghf_fast.nn import PatchProjection
from mghf_fast.reference import patches as reference


def parameters(patch_size: int, hidden: int = 10, dimension: int = 6) -> list[Tensor]:
    projection = PatchProjection(patch_size, 1, hidden=hidden, dimension=dimension)
    torch.nn.init.normal_(projection.hidden.bias)
    torch.nn.init.normal_(projection.output.bias)
    layers = (projection.hidden, projection.output)
    return [p.detach() for layer in layers for p in (layer.weight, layer.bias)]


def by_hand(x: Tensor, w: list[Tensor], size: int, stride: int) -> Tensor:
    """Patches cut out one by one, in row-major order."""
    maps = x.flatten(0, 1)
    rows = range(0, x.shape[2] - size + 1, stride)
    columns = range(0, x.shape[3] - size + 1, stride)
    cut = [maps[:, i : i + size, j : j + size].flatten(1) for i in rows for j in columns]
    y = F.linear(F.relu(F.linear(torch.stack(cut, 1), w[0], w[1])), w[2], w[3])
    return y / (y.norm(dim=2, keepdim=True) + 1e-7)


GEOMETRIES = [(4, 3, 10, 13), (4, 4, 4, 4), (1, 1, 3, 2), (3, 5, 11, 4), (8, 6, 20, 21)]


@pytest.mark.parametrize(("size", "stride", "height", "width"), GEOMETRIES)
def test_definition(size: int, stride: int, height: int, width: int) -> None:
    w = [p.double() for p in parameters(size)]
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    got = functional.patch_projection(x, *w, patch_size=size, stride=stride)
    assert contract.relative_error(got, by_hand(x, w, size, stride)) < 1e-12


def test_paper_geometry() -> None:
    got = PatchProjection()(torch.rand(1, 2, 512, 512))
    assert got.shape == (2, 441, 64)
    assert sum(p.numel() for p in PatchProjection().parameters()) == 139_456
    torch.testing.assert_close(got.norm(dim=2), torch.ones(2, 441))


def test_gradcheck() -> None:
    leaves = [p.double().requires_grad_() for p in (torch.randn(1, 2, 5, 4), *parameters(3, 4, 3))]
    assert torch.autograd.gradcheck(
        lambda *t: reference.patch_projection(*t, patch_size=3, stride=2), leaves
    )


@pytest.mark.parametrize(("size", "stride", "height", "width"), GEOMETRIES)
def test_values_and_gradients(
    backend: str, size: int, stride: int, height: int, width: int
) -> None:
    contract.check_against_reference(
        lambda *t: functional.patch_projection(*t, patch_size=size, stride=stride, backend=backend),
        lambda *t: reference.patch_projection(*t, size, stride),
        [torch.randn(2, 3, height, width), *parameters(size)],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    contract.check_half_precision(
        lambda *t: functional.patch_projection(*t, patch_size=4, stride=3, backend=backend),
        lambda *t: reference.patch_projection(*t, 4, 3),
        [torch.randn(2, 3, 10, 13), *parameters(4)],
        dtype,
    )


def test_layouts(backend: str) -> None:
    w = parameters(4)
    x = torch.randn(2, 3, 11, 9)
    for _, strided in contract.image_layouts(x):
        contract.check_layout(
            lambda x: functional.patch_projection(x, *w, patch_size=4, stride=3, backend=backend),
            x,
            strided,
        )


def test_contract(backend: str) -> None:
    x, w = torch.randn(2, 3, 10, 9), parameters(4)
    grown = [p.clone().requires_grad_() for p in w]
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        contract.check_opcheck(
            ops.patches.patches, image.detach().requires_grad_(), *grown, 4, 3, backend
        )

    def fn(x: Tensor) -> Tensor:
        return functional.patch_projection(x, *w, patch_size=4, stride=3, backend=backend) * 2

    contract.check_compiled(fn, x)
    contract.check_deterministic(backend, fn, x)


def test_second_derivative() -> None:
    w = [p.double() for p in parameters(2, 4, 3)]
    contract.check_second_derivative(
        lambda x: functional.patch_projection(x, *w, patch_size=2, stride=2),
        torch.randn(1, 1, 4, 3),
    )


def test_zero_embeddings_are_finite(backend: str) -> None:
    w = parameters(4)
    w[2].zero_(), w[3].zero_()
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    got = functional.patch_projection(x, *w, patch_size=4, stride=4, backend=backend)
    assert (got == 0).all()
    got.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_pixels_without_a_patch_get_no_gradient(backend: str) -> None:
    x = torch.randn(1, 1, 9, 10, requires_grad=True)
    w = parameters(4)
    y = functional.patch_projection(x, *w, patch_size=4, stride=4, backend=backend)
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad is not None and (x.grad[:, :, 8:] == 0).all() and (x.grad[..., 8:] == 0).all()


def test_nan_stays_nan(backend: str) -> None:
    x = torch.randn(1, 1, 8, 8)
    x[0, 0, 5, 5] = torch.nan
    y = functional.patch_projection(x, *parameters(4), patch_size=4, stride=4, backend=backend)
    assert y[0, 3].isnan().all() and y[0, :3].isfinite().all()


@settings(max_examples=20, deadline=None)
@given(
    size=st.integers(1, 6),
    stride=st.integers(1, 8),
    extra=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    channels=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_any_geometry(
    size: int, stride: int, extra: tuple[int, int], channels: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(1, channels, size + extra[0], size + extra[1])
    w = parameters(size)
    got = functional.patch_projection(x, *w, patch_size=size, stride=stride)
    assert contract.relative_error(got, by_hand(x, w, size, stride)) < 1e-4


def test_bad_input() -> None:
    w = parameters(4)
    with pytest.raises(ValueError, match="x must be at least patch_size = 4 pixels.*got 3 x 9"):
        functional.patch_projection(torch.rand(1, 1, 3, 9), *w, patch_size=4, stride=2)
    with pytest.raises(ValueError, match="weight1, bias1, weight2, bias2 must have shapes"):
        functional.patch_projection(torch.rand(1, 1, 9, 9), *w, patch_size=5, stride=2)
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        functional.patch_projection(torch.rand(1, 1, 9, 9), *w, patch_size=4, stride=0)
    with pytest.raises(ValueError, match="same device"):
        functional.patch_projection(torch.rand(1, 1, 9, 9, device="meta"), *w, patch_size=4)
