"""Gram matrices: values, gradients, contract."""

from __future__ import annotations

import contract
import draws
import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import CAPABILITIES, in_parent, run_file_under

from mghf_fast import functional, ops
from mghf_fast.reference import gram as reference


def test_definition() -> None:
    x = draws.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = torch.einsum("bihw,bjhw->bij", x, x)
    assert contract.relative_error(functional.gram_matrix(x, normalize=False), expected) < 1e-12
    assert contract.relative_error(functional.gram_matrix(x), expected / (3 * 4 * 5)) < 1e-12


def test_gradcheck() -> None:
    x = draws.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(functional.gram_matrix, x)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 7), (1, 17, 13, 5), (2, 32, 16, 16)])
def test_values_and_gradients(backend: str, shape: tuple[int, ...], normalize: bool) -> None:
    scale = 1 / (shape[1] * shape[2] * shape[3]) if normalize else 1.0
    contract.check_against_reference(
        lambda x: functional.gram_matrix(x, normalize, backend=backend),
        lambda x: reference.gram_matrix(x, scale),
        [draws.randn(shape)],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    x = 100 * draws.randn(1, 4, 32, 32)  # sums beyond float16's range
    contract.check_half_precision(
        lambda x: functional.gram_matrix(x, False, backend=backend),
        lambda x: reference.gram_matrix(x, 1.0),
        [x],
        dtype,
    )


@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return functional.gram_matrix(x, backend=backend)

    x = draws.randn(2, 5, 6, 7).to(dtype)
    for _, strided in contract.image_layouts(x):
        contract.check_layout(fn, x, strided)
    for _, strided in contract.expanded(x):
        contract.check_layout(fn, strided.contiguous(), strided)


def test_contract(backend: str) -> None:
    x = draws.randn(2, 3, 4, 5, requires_grad=True)
    contract.check_opcheck(ops.gram.gram, x, 0.1, backend)
    contract.check_opcheck(ops.gram.gram, x.detach().transpose(2, 3).requires_grad_(), 0.1, backend)
    contract.check_compiled(lambda x: functional.gram_matrix(x, backend=backend) * 2, x.detach())
    contract.check_deterministic(
        backend, lambda x: functional.gram_matrix(x, backend=backend), x.detach()
    )


def test_second_derivative() -> None:
    contract.check_second_derivative(functional.gram_matrix, draws.randn(1, 2, 2, 2))


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 10**6),
)
def test_any_shape(shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    contract.check_against_reference(
        lambda x: functional.gram_matrix(x, False),
        lambda x: reference.gram_matrix(x, 1.0),
        [draws.randn(shape)],
    )


@pytest.mark.parametrize(
    "shape", [(1, 16, 1, 1), (2, 33, 9, 1), (1, 112, 7, 13), (3, 1, 67, 65), (1, 5, 130, 191)]
)
def test_sizes_that_fill_no_tile(backend: str, shape: tuple[int, ...]) -> None:
    if backend == "reference":
        pytest.skip("it has no tiles")
    x = draws.randn(interpreter.fitted(backend, shape, (2, 70, 40, 41)))
    contract.check_against_reference(
        lambda x: functional.gram_matrix(x, backend=backend), functional.gram_matrix, [x]
    )
    for _, strided in contract.image_layouts(x):
        contract.check_layout(lambda x: functional.gram_matrix(x, backend=backend), x, strided)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_the_gradient_has_the_layout_and_type_of_its_image(
    backend: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x = draws.randn(2, 20, 9, 11).to(dtype, memory_format=layout)
    got = ops.gram.gram_backward(draws.randn(2, 20, 20), x, 0.1, backend)
    assert got.dtype == dtype and got.is_contiguous(memory_format=layout)


def test_the_matrix_is_symmetric_to_the_last_bit(backend: str) -> None:
    if backend == "reference":
        pytest.skip("PyTorch's product computes both halves")
    got = functional.gram_matrix(draws.randn(1, 50, 30, 31), backend=backend)
    assert torch.equal(got, got.mT)


def test_threads_do_not_change_a_bit(backend: str) -> None:
    shape = interpreter.fitted(backend, (2, 20, 130, 190), (2, 20, 23, 30))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = draws.randn(shape).contiguous(memory_format=layout)
        contract.check_deterministic(
            backend, lambda x: functional.gram_matrix(x, backend=backend), x
        )


@in_parent
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_under_each_instruction_set(capability: str) -> None:
    run_file_under(capability, __file__, "-k", "cpu")


def test_nan_stays_nan(backend: str) -> None:
    x = draws.randn(1, 2, 3, 3)
    x[0, 1, 1, 1] = torch.nan
    got = functional.gram_matrix(x, backend=backend)
    assert got[0, 1, 1].isnan() and got[0, 0, 1].isnan() and not got[0, 0, 0].isnan()
    grad = ops.gram.gram_backward(torch.ones(1, 2, 2), x, 1.0, backend)
    assert torch.equal(grad.isnan(), x.isnan().any(1, keepdim=True).expand_as(x))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="x must have shape"):
        functional.gram_matrix(draws.rand(3, 3))
    with pytest.raises(TypeError, match="x must be a tensor"):
        functional.gram_matrix([1.0])  # type: ignore[arg-type]
