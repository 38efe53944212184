"""Patch projection: values, gradients, contract."""

from __future__ import annotations

import contract
import draws
import interpreter
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import BFLOAT16_CAPABILITIES, CAPABILITIES, in_parent, run_file_under
from torch import Tensor

from mghf_fast import functional, native, ops
from mghf_fast.nn import PatchProjection
from mghf_fast.reference import patches as reference


def parameters(patch_size: int, hidden: int = 10, dimension: int = 6) -> list[Tensor]:
    def make() -> PatchProjection:
        projection = PatchProjection(patch_size, 1, hidden=hidden, dimension=dimension)
        torch.nn.init.normal_(projection.hidden.bias)
        torch.nn.init.normal_(projection.output.bias)
        return projection

    projection = draws.module(make)
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
    x = draws.randn(2, 3, height, width, dtype=torch.float64)
    got = functional.patch_projection(x, *w, patch_size=size, stride=stride)
    assert contract.relative_error(got, by_hand(x, w, size, stride)) < 1e-12


def test_paper_geometry() -> None:
    got = PatchProjection()(draws.rand(1, 2, 512, 512))
    assert got.shape == (2, 441, 64)
    assert sum(p.numel() for p in PatchProjection().parameters()) == 139_456
    torch.testing.assert_close(got.norm(dim=2), torch.ones(2, 441))


def test_gradcheck() -> None:
    leaves = [p.double().requires_grad_() for p in (draws.randn(1, 2, 5, 4), *parameters(3, 4, 3))]
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
        [draws.randn(2, 3, height, width), *parameters(size)],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    contract.check_half_precision(
        lambda *t: functional.patch_projection(*t, patch_size=4, stride=3, backend=backend),
        lambda *t: reference.patch_projection(*t, 4, 3),
        [draws.randn(2, 3, 10, 13), *parameters(4)],
        dtype,
    )


@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    w = parameters(4)
    x = draws.randn(2, 3, 11, 9).to(dtype)

    def fn(x: Tensor) -> Tensor:
        return functional.patch_projection(x, *w, patch_size=4, stride=3, backend=backend)

    for _, strided in contract.image_layouts(x):
        contract.check_layout(fn, x, strided)
    for _, strided in contract.expanded(x):
        contract.check_layout(fn, strided.contiguous(), strided)


def test_layouts_of_the_upstream_gradient(backend: str) -> None:
    x, w = draws.randn(2, 3, 11, 9), parameters(4)
    embedding, state = ops.patches.patches(x, *w, 4, 3, backend)
    upstream = draws.randn_like(embedding)
    for _, strided in (*contract.batch_layouts(upstream), *contract.expanded(upstream)):
        options = (strided, embedding, state, x, *w, 4, 3, True)
        expected = ops.patches.patches_backward(*options, "reference")
        for got, want in zip(
            ops.patches.patches_backward(*options, backend), expected, strict=True
        ):
            assert contract.relative_error(got, want) <= 1e-5


def test_contract(backend: str) -> None:
    x, w = draws.randn(2, 3, 10, 9), parameters(4)
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
        draws.randn(1, 1, 4, 3),
    )


def test_zero_embeddings_are_finite(backend: str) -> None:
    w = parameters(4)
    w[2].zero_(), w[3].zero_()
    x = draws.randn(1, 1, 8, 8, requires_grad=True)
    got = functional.patch_projection(x, *w, patch_size=4, stride=4, backend=backend)
    assert (got == 0).all()
    got.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_gradient_of_tiny_embeddings(backend: str) -> None:
    """|y| is about as small as the floor of the norm."""
    w = parameters(3, 5, 4)
    w[2], w[3] = 1e-8 * draws.randn(4, 5), torch.zeros(4)
    contract.check_against_reference(
        lambda x: functional.patch_projection(x, *w, patch_size=3, stride=2, backend=backend),
        lambda x: reference.patch_projection(x, *(p.double() for p in w), 3, 2),
        [draws.randn(1, 3, 6, 6)],
    )


def test_pixels_without_a_patch_get_no_gradient(backend: str) -> None:
    x = draws.randn(1, 1, 9, 10, requires_grad=True)
    w = parameters(4)
    y = functional.patch_projection(x, *w, patch_size=4, stride=4, backend=backend)
    (y * draws.randn_like(y)).sum().backward()
    assert x.grad is not None and (x.grad[:, :, 8:] == 0).all() and (x.grad[..., 8:] == 0).all()


def test_nan_stays_nan(backend: str) -> None:
    x = draws.randn(1, 1, 8, 8)
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
    x = draws.randn(1, channels, size + extra[0], size + extra[1])
    w = parameters(size)
    got = functional.patch_projection(x, *w, patch_size=size, stride=stride)
    assert contract.relative_error(got, by_hand(x, w, size, stride)) < 1e-4


def test_bad_input() -> None:
    w = parameters(4)
    with pytest.raises(ValueError, match="x must be at least patch_size = 4 pixels.*got 3 x 9"):
        functional.patch_projection(draws.rand(1, 1, 3, 9), *w, patch_size=4, stride=2)
    with pytest.raises(ValueError, match="weight1, bias1, weight2, bias2 must have shapes"):
        functional.patch_projection(draws.rand(1, 1, 9, 9), *w, patch_size=5, stride=2)
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        functional.patch_projection(draws.rand(1, 1, 9, 9), *w, patch_size=4, stride=0)
    with pytest.raises(ValueError, match="same device"):
        functional.patch_projection(torch.empty(1, 1, 9, 9, device="meta"), *w, patch_size=4)


# ---- the compiled kernels; tests named test_kernel_* run under every instruction set ----

kernel = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)

# batch, channels, height, width, patch size, stride, hidden, dimension: no multiples of a vector,
# a register block or a cell; up to seven patches over a pixel; gaps between patches.
SIZES = [
    (1, 1, 1, 1, 1, 1, 1, 2),
    (1, 37, 19, 30, 7, 5, 33, 17),
    (2, 17, 23, 40, 9, 3, 40, 9),
    (3, 11, 13, 14, 7, 1, 8, 8),
    (1, 16, 64, 70, 32, 24, 65, 20),
    (2, 3, 30, 41, 2, 11, 13, 3),
    (1, 20, 9, 33, 1, 40, 31, 5),
]


def image(batch: int, channels: int, height: int, width: int, layout: str) -> Tensor:
    x = draws.randn(batch, channels, height, width)
    return x if layout == "contiguous" else dict(contract.image_layouts(x))[layout]


@kernel
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_kernel_sizes(size: tuple[int, ...], layout: str) -> None:
    batch, channels, height, width, patch_size, stride, hidden, dimension = size
    contract.check_against_reference(
        lambda *t: functional.patch_projection(
            *t, patch_size=patch_size, stride=stride, backend="cpu"
        ),
        lambda *t: reference.patch_projection(*t, patch_size, stride),
        [image(batch, channels, height, width, layout), *parameters(patch_size, hidden, dimension)],
    )


@kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_kernel_gradients_in_half_precision(layout: str, dtype: torch.dtype) -> None:
    """Embeddings equal those of float32; gradients too, rounded once."""
    half = image(2, 18, 12, 23, layout).to(dtype)
    w = parameters(5, 12, 9)

    def fn(x: Tensor) -> Tensor:
        return functional.patch_projection(x, *w, patch_size=5, stride=3, backend="cpu")

    assert torch.equal(fn(half), fn(half.float()))
    upstream = draws.randn(36, 21, 9)
    (got,) = contract.gradients(fn, [half], [upstream])
    (exact,) = contract.gradients(fn, [half.float()], [upstream])
    assert got.dtype == dtype and torch.equal(got, exact.to(dtype))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_sizes_that_fit_no_block(backend: str, size: tuple[int, ...], layout: str) -> None:
    *shape, patch_size, stride, hidden, dimension = size
    x = image(*interpreter.fitted(backend, tuple(shape), (1, 20, 64, 70)), layout)
    contract.check_against_reference(
        lambda *t: functional.patch_projection(
            *t, patch_size=patch_size, stride=stride, backend=backend
        ),
        lambda *t: reference.patch_projection(*t, patch_size, stride),
        [x, *parameters(patch_size, hidden, dimension)],
    )


def test_more_hidden_units_than_a_block(backend: str) -> None:
    contract.check_against_reference(
        lambda *t: functional.patch_projection(*t, patch_size=5, stride=4, backend=backend),
        lambda *t: reference.patch_projection(*t, 5, 4),
        [draws.randn(1, 3, 9, 13), *parameters(5, 150, 70)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_adds_to_a_gradient(backend: str, layout: str, dtype: torch.dtype) -> None:
    x, w = image(2, 5, 21, 25, layout).to(dtype), parameters(6, 12, 5)
    embedding, state = ops.patches.patches(x, *w, 6, 4, backend)
    grad, total = draws.randn_like(embedding), image(2, 5, 21, 25, layout).to(dtype)
    exact, _ = reference.patch_projection_backward(
        grad.double(), *(t.double() for t in (x, *w)), 6, 4, False
    )
    expected = total.double() + exact
    add_backward = ops.OPS["patches"].choose(backend, x, *w).add_backward
    add_backward(total, grad, embedding, state, x, *w, 6, 4)
    rounding = contract.relative_error(expected.to(dtype), expected)
    # The added gradient has its own error, and the sum is rounded.
    allowed = (2 * rounding + 1e-6) * expected.norm() + 1e-5 * exact.norm()
    assert (total.double() - expected).norm() <= allowed


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_of_some_maps_of_a_batch(backend: str, layout: str) -> None:
    x, w = image(3, 5, 21, 25, layout), parameters(6, 40, 5)
    run = ops.OPS["patches"].choose(backend, x, *w)
    embedding, state = run.forward(x, *w, 6, 4)
    own, *_ = run.forward(x[:2], *w, 6, 4)
    # Not bit by bit: the maps of a tile of Triton's interpreter decide how NumPy multiplies.
    assert contract.relative_error(embedding[:10], own) <= 1e-6
    grad, total = draws.randn_like(own), torch.zeros_like(x[:2])
    run.add_backward(total, grad, embedding[:10], state[:, :, :10], x[:2], *w, 6, 4)
    expected, _ = reference.patch_projection_backward(grad, x[:2], *w, 6, 4, False)
    assert contract.relative_error(total, expected) <= 1e-5


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_is_not_finite_stays_in_its_patches(backend: str, layout: str, value: float) -> None:
    x, w = image(2, 9, 21, 25, layout), parameters(6, 12, 5)
    x[1, 3, 9, 10] = value
    expected = reference.patch_projection(x, *w, 6, 4)
    grad = draws.randn_like(expected)
    embedding, state = ops.patches.patches(x, *w, 6, 4, backend)
    assert torch.equal(embedding.isnan(), expected.isnan()) and expected.isnan().any()
    got = ops.patches.patches_backward(grad, embedding, state, x, *w, 6, 4, True, backend)
    grad_x, weights = reference.patch_projection_backward(grad, x, *w, 6, 4, True)
    for result, want in zip(got, [grad_x, *weights], strict=True):
        assert torch.equal(result.isnan(), want.isnan()) and want.isnan().any()


# Patch sizes for which products of bfloat16 are used, by vectors or (32 and 64 wide) AMX tiles.
BFLOAT16_SIZES = [
    (2, 5, 9, 11, 2, 5, 3, 4),
    (1, 40, 33, 41, 8, 3, 33, 9),
    (1, 18, 75, 86, 32, 24, 64, 20),
    (2, 19, 64, 99, 32, 35, 32, 6),
    (1, 17, 66, 130, 64, 64, 96, 8),
]


@kernel
@pytest.mark.parametrize("size", BFLOAT16_SIZES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_kernel_products_of_bfloat16(size: tuple[int, ...], layout: str) -> None:
    """Products of the image and the weights are exact, so embeddings equal those of float32; the
    gradient has the rounding of one hidden layer besides its own."""
    batch, channels, height, width, patch_size, stride, hidden, dimension = size
    x = image(batch, channels, height, width, layout).bfloat16()
    w = [p.bfloat16() for p in parameters(patch_size, hidden, dimension)]

    def fn(x: Tensor) -> Tensor:
        options = {"patch_size": patch_size, "stride": stride, "backend": "cpu"}
        return functional.patch_projection(x, *w, **options)

    def plain(x: Tensor) -> Tensor:
        return by_hand(x, [p.to(x.dtype) for p in w], patch_size, stride)

    embedding = fn(x)
    assert contract.relative_error(embedding, plain(x.double())) < 1e-5
    upstream = [draws.randn_like(embedding)]
    (got,) = contract.gradients(fn, [x], upstream)
    (own,) = contract.gradients(plain, [x], [upstream[0].bfloat16()])
    (want,) = contract.gradients(plain, [x.double()], [upstream[0].double()])
    assert contract.relative_error(got, want) <= contract.relative_error(own, want)


@kernel
@pytest.mark.parametrize("patch_size", [8, 32])
def test_kernel_products_of_bfloat16_keep_nan_in_its_patches(patch_size: int) -> None:
    x = draws.randn(1, 17, patch_size, 3 * patch_size).bfloat16()
    w = [p.bfloat16().float() for p in parameters(patch_size, 32, 5)]
    for column in (patch_size, 2 * patch_size - 1):
        x[0, 4, 1, column] = torch.nan
        embedding, _, grad_x, *_ = raw(x, w, patch_size, patch_size, draws.randn(17, 3, 5))
        damaged = torch.zeros(17, 3, dtype=torch.bool)
        damaged[4, 1] = True
        assert torch.equal(embedding.isnan().all(2), damaged)
        assert torch.equal(embedding.isnan().any(2), damaged)
        inside = damaged[None, :, None].repeat_interleave(patch_size, 3)
        assert torch.equal(grad_x.isnan(), inside.expand_as(grad_x))
        x[0, 4, 1, column] = 0


@kernel
def test_kernel_parameters_of_any_type() -> None:
    x, w = draws.randn(1, 3, 9, 9), [p.to(torch.bfloat16) for p in parameters(4)]
    w[0] = w[0].T.contiguous().T

    def fn(*t: Tensor) -> Tensor:
        return functional.patch_projection(*t, patch_size=4, stride=3, backend="cpu")

    def exact(*t: Tensor) -> Tensor:
        return reference.patch_projection(*t, 4, 3)

    upstream = [draws.randn(3, 4, 6)]
    got = contract.gradients(fn, [x, *w], upstream)
    want = contract.gradients(exact, [t.double() for t in (x, *w)], upstream)
    assert got[0].dtype == torch.float32 and contract.relative_error(got[0], want[0]) < 1e-5
    for g, e in zip(got[1:], want[1:], strict=True):
        assert g.dtype == torch.bfloat16 and contract.relative_error(g, e) < 4e-3


def raw(x: Tensor, w: list[Tensor], size: int, stride: int, grad: Tensor) -> list[Tensor]:
    """Every result of the raw ops."""
    native_ops = torch.ops.mghf_native
    embedding, state = native_ops.patches(x, *w, size, stride)
    saved = (grad, embedding, state)
    grad_x = native_ops.patches_backward(*saved, x, w[0], w[2], size, stride)
    weights = native_ops.patches_backward_weights(*saved, x, *w[:3], size, stride)
    return [embedding, state, grad_x, *weights]


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    x = image(2, 40, 42, 38, "channels_last").to(dtype)
    w = [p.to(dtype).float() for p in parameters(10, 20, 11)]
    grad = draws.randn(80, 25, 11)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(raw(x, w, 10, 7, grad))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_kernel_adds_to_a_gradient(layout: str, dtype: torch.dtype) -> None:
    x, w = image(2, 19, 21, 25, layout).to(dtype), parameters(6, 12, 5)
    native_ops = torch.ops.mghf_native
    embedding, state = native_ops.patches(x, *w, 6, 4)
    saved = (draws.randn_like(embedding), embedding, state)
    grad_x = native_ops.patches_backward(*saved, x, w[0], w[2], 6, 4)
    assert grad_x.is_contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    exact = native_ops.patches_backward(*saved, x.float(), w[0], w[2], 6, 4)
    total = image(2, 19, 21, 25, layout).to(dtype)
    expected = (total.float() + exact).to(dtype)
    native_ops.patches_backward_add_(total, *saved, w[0], w[2], 6, 4)
    assert torch.equal(total, expected)


@kernel
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_kernel_what_is_not_finite(value: float) -> None:
    x, w = draws.randn(2, 9, 21, 25), parameters(6, 12, 5)
    x[1, 3, 9, 10] = value
    grad = draws.randn(18, 20, 5)
    got = raw(x, w, 6, 4, grad)
    embedding = reference.patch_projection(x, *w, 6, 4)
    grad_x, weights = reference.patch_projection_backward(grad, x, *w, 6, 4, True)
    assert torch.equal(got[0].isnan(), embedding.isnan()) and embedding.isnan().any()
    assert torch.equal(got[2].isnan(), grad_x.isnan()) and grad_x.isnan().any()
    for result, expected in zip(got[3:], weights, strict=True):
        assert torch.equal(result.isnan(), expected.isnan())


@kernel
def test_kernel_nothing_to_do() -> None:
    for shape, hidden in (((0, 3, 9, 9), 10), ((2, 0, 9, 9), 10), ((1, 2, 9, 9), 0)):
        x, w = draws.randn(shape), parameters(4, max(hidden, 1), 5)
        w = [w[0][:hidden], w[1][:hidden], w[2][:, :hidden].contiguous(), w[3]]
        maps = shape[0] * shape[1]
        embedding, state, grad_x, *weights = raw(x, w, 4, 5, draws.randn(maps, 4, 5))
        assert embedding.shape == (maps, 4, 5) and state.shape[2] == maps
        assert grad_x.shape == x.shape and (grad_x == 0).all()
        assert [g.shape for g in weights] == [p.shape for p in w]


@kernel
@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": torch.zeros(2, 9, 9)}),
        ("x", {"x": torch.zeros(1, 2, 9, 9, dtype=torch.float64)}),
        ("patch_size", {"patch_size": 10}),
        ("stride", {"stride": 0}),
        ("weight1", {"weight1": torch.zeros(10, 9)}),
        ("bias1", {"bias1": torch.zeros(9)}),
        ("weight2", {"weight2": torch.zeros(6, 9)}),
        ("weight2", {"weight2": torch.zeros(10, 6).T}),
        ("bias2", {"bias2": torch.zeros(6, 1)}),
        ("embedding", {"embedding": torch.zeros(2, 4, 7)}),
        ("state", {"state": torch.zeros(4, 2, 2)}),
        ("grad", {"grad": torch.zeros(2, 4, 7)}),
    ],
)
def test_kernel_bad_arguments_are_named(argument: str, change: dict[str, object]) -> None:
    forward: dict[str, object] = {
        **dict(zip(("weight1", "bias1", "weight2", "bias2"), parameters(4), strict=True)),
        "x": torch.zeros(1, 2, 9, 9),
        "patch_size": 4,
        "stride": 5,
    }
    saved: dict[str, object] = {
        "grad": torch.zeros(2, 4, 6),
        "embedding": torch.zeros(2, 4, 6),
        "state": torch.zeros(4, 2, 2, dtype=torch.int32),
    }
    backward = {k: v for k, v in (saved | forward).items() if k != "bias2"}
    for op, arguments in (
        (torch.ops.mghf_native.patches, forward),
        (torch.ops.mghf_native.patches_backward_weights, backward),
    ):
        op(**arguments)
        if not arguments.keys() >= change.keys():
            continue
        with pytest.raises(RuntimeError, match=f"{argument} (is|has)"):
            op(**(arguments | change))


@in_parent
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_under_each_instruction_set(capability: str) -> None:
    run_file_under(capability, __file__, "-k", "kernel")


@in_parent
@pytest.mark.parametrize("capability", BFLOAT16_CAPABILITIES)
def test_under_each_set_with_products_of_bfloat16(capability: str) -> None:
    run_file_under(capability, __file__, "-k", "kernel and bfloat16", bfloat16=True)
