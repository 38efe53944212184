"""The invertible block: values, inverse, gradients, contract."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import contract
import draws
import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import (
    BFLOAT16_CAPABILITIES,
    CAPABILITIES,
    in_parent,
    run_file_under,
)
from torch import Tensor

from mghf_fast import functional, ops
from mghf_fast.backends import triton_is_interpreted
from mghf_fast.nn import InvertibleBlock
from mghf_fast.ops.vocabulary import ACTIVATIONS, SUBNETS, BlockWeights
from mghf_fast.reference import coupling as reference

VARIANTS = [
    (subnet, activation, clamp)
    for subnet in SUBNETS
    for activation in ACTIVATIONS
    for clamp in (None, 1.5)
]


def block_weights(
    channels: int = 6,
    subnet: str = "bottleneck",
    activation: str = "relu6",
    clamp: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> BlockWeights:
    options = {"subnet": subnet, "activation": activation, "clamp": clamp}
    block = draws.module(lambda: InvertibleBlock(channels, **options))
    weights = block.requires_grad_(False).to(dtype).weights()
    return weights


def as_dtype(weights: BlockWeights, dtype: torch.dtype) -> BlockWeights:
    return BlockWeights.from_tensors([w.to(dtype) for w in weights.tensors()], *weights[5:])


def with_tensors(weights: BlockWeights, tensors: tuple[Tensor, ...]) -> BlockWeights:
    """The weights, with their tensors replaced if others are given."""
    if not tensors:
        return weights
    return BlockWeights.from_tensors(list(tensors), *weights[5:])


def away_from_kinks(x: Tensor, weights: BlockWeights) -> Tensor:
    """(B, 1, H, W) in float64: 0 for pixels of the result that depend on an activation so near a
    kink that float32 may use the other slope, 1 for the rest. If upstream gradients are 0 at the
    former, float32 and float64 gradients differ only by rounding."""
    kinks = {"relu6": (0, 6), "leaky_relu": (0,), "softplus": ()}[weights.activation]
    activate, near = reference._activate, torch.zeros_like(x[:, :1], dtype=torch.float64)

    def watch(z: Tensor, activation: str) -> Tensor:
        for kink in kinks:  # a sum of zeros is exact
            close = ((z - kink).abs() <= 4e-6 * z.abs().max()) & (z != 0)
            near.logical_or_(close.any(1, keepdim=True))
        return activate(z, activation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_activate", watch)
        reference.invertible_block(x.double(), as_dtype(weights, torch.float64))
    # Two 3x3 convolutions lie between phi's activations and the result, by way of rho or eta.
    return 1 - torch.nn.functional.max_pool2d(near, 5, 1, 2)


def by_hand(x: Tensor, w: BlockWeights) -> Tensor:
    """One pixel at a time, straight from the definition (bottleneck, relu6, no clamp)."""
    channels, height, width = x.shape[1:]
    c = channels // 2
    mixed = torch.einsum("oi,bihw->bohw", w.mix_weight[:, :, 0, 0], x) + w.mix_bias.view(-1, 1, 1)
    z1, z2 = mixed[:, :c], mixed[:, c:]

    def mirrored(i: int, n: int) -> int:
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    def subnet(z: Tensor, kernels: tuple[Tensor, ...]) -> Tensor:
        expand, depthwise, project = kernels
        hidden = torch.einsum("oi,bihw->bohw", expand[:, :, 0, 0], z).clamp(0, 6)
        second = torch.zeros_like(hidden)
        for i in range(height):
            for j in range(width):
                for di in range(3):
                    for dj in range(3):
                        second[:, :, i, j] += (
                            depthwise[:, 0, di, dj]
                            * hidden[
                                :, :, mirrored(i + di - 1, height), mirrored(j + dj - 1, width)
                            ]
                        )
        return torch.einsum("oi,bihw->bohw", project[:, :, 0, 0], second.clamp(0, 6))

    z2 = z2 + subnet(z1, w.phi)
    z1 = z1 * subnet(z2, w.rho).exp() + subnet(z2, w.eta)
    return torch.cat((z1, z2), 1)


def test_definition() -> None:
    weights = block_weights(dtype=torch.float64)
    x = draws.randn(2, 6, 4, 5, dtype=torch.float64)
    expected = by_hand(x, weights)
    assert contract.relative_error(reference.invertible_block(x, weights), expected) < 1e-12


@pytest.mark.parametrize(("subnet", "activation", "clamp"), VARIANTS)
def test_reference_gradient_and_inverse(subnet: str, activation: str, clamp: float | None) -> None:
    for size in ((5, 4), (1, 1), (1, 3), (2, 2)):
        weights = block_weights(4, subnet, activation, clamp, torch.float64)
        x = draws.randn(2, 4, *size, dtype=torch.float64)
        y = reference.invertible_block(x, weights)
        assert contract.relative_error(reference.invertible_block_inverse(y, weights), x) < 1e-9

        leaves = [x.requires_grad_(), *(w.clone().requires_grad_() for w in weights.tensors())]
        y = reference.invertible_block(leaves[0], with_tensors(weights, tuple(leaves[1:])))
        upstream = draws.randn_like(y)
        expected = torch.autograd.grad(y, leaves, upstream)
        grad_x, grad_weights = reference.invertible_block_backward(
            upstream, x.detach(), weights, True
        )
        for got, want in zip((grad_x, *grad_weights), expected, strict=True):
            assert contract.relative_error(got, want) < 1e-9


def test_gradcheck() -> None:
    weights = block_weights(4, activation="softplus", dtype=torch.float64)
    x = draws.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.invertible_block(x, weights), x)


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (13, 9), (16, 16)])
def test_values_and_gradients(backend: str, size: tuple[int, int]) -> None:
    weights = block_weights(8)
    tensors = weights.tensors()

    def fn(x: Tensor, *w: Tensor) -> Tensor:
        return functional.invertible_block(x, with_tensors(weights, w), backend=backend)

    def exact(x: Tensor, *w: Tensor) -> Tensor:
        return reference.invertible_block(x, with_tensors(weights, w))

    x = draws.randn(2, 8, *size)
    contract.check_against_reference(fn, exact, [x, *tensors], among=away_from_kinks(x, weights))


def test_inverse(backend: str) -> None:
    weights = block_weights(8)
    exact = as_dtype(weights, torch.float64)
    contract.check_against_reference(
        lambda y: functional.invertible_block_inverse(y, weights, backend=backend),
        lambda y: reference.invertible_block_inverse(y, exact),
        [draws.randn(2, 8, 6, 5)],
    )


# Tiles are 128 rows by 64 columns; lanes 4, 8 or 16 channels.
@pytest.mark.parametrize("size", [(1, 1), (1, 130), (131, 1), (2, 66), (130, 67), (64, 64)])
@pytest.mark.parametrize("half", [1, 17, 32])
def test_across_tiles(backend: str, half: int, size: tuple[int, int]) -> None:
    weights = block_weights(2 * half)
    exact = as_dtype(weights, torch.float64)
    most = (4, 16) if half == 32 else (5, 18)  # one of Triton's tiles, and a little more
    image = draws.randn(1, 2 * half, *interpreter.fitted(backend, size, most))

    def inverse(y: Tensor) -> Tensor:
        return functional.invertible_block_inverse(y, weights, backend=backend)

    contract.check_against_reference(
        lambda x: functional.invertible_block(x, weights, backend=backend),
        lambda x: reference.invertible_block(x, exact),
        [image],
        among=away_from_kinks(image, weights),
    )
    contract.check_against_reference(
        inverse,
        lambda y: reference.invertible_block_inverse(y, exact),
        [image],
        differentiable=False,
    )


def with_3x3_mix(weights: BlockWeights, inputs: int) -> BlockWeights:
    mix = draws.randn(weights.mix_weight.shape[0], inputs, 3, 3, dtype=weights.mix_bias.dtype)
    return weights._replace(mix_weight=mix / (3 * inputs**0.5))


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 2), (7, 66), (130, 5), (67, 130)])
@pytest.mark.parametrize("inputs", [1, 3, 5])
def test_a_stem_drawn_into_the_mix(backend: str, inputs: int, size: tuple[int, int]) -> None:
    weights = with_3x3_mix(block_weights(10), inputs)

    def fn(x: Tensor, *w: Tensor) -> Tensor:
        return functional.invertible_block(x, with_tensors(weights, w), backend=backend)

    def exact(x: Tensor, *w: Tensor) -> Tensor:
        return reference.invertible_block(x, with_tensors(weights, w))

    most = (5, 18) if inputs == 3 else (3, 5)
    image = draws.randn(interpreter.fitted(backend, (2, inputs, *size), (1, inputs, *most)))
    inputs = [image, *weights.tensors()]
    contract.check_against_reference(fn, exact, inputs, among=away_from_kinks(image, weights))


# Triton's tiles have fewer rows then.
@pytest.mark.parametrize("channels", [140, 258])
def test_wide_blocks(backend: str, channels: int) -> None:
    if backend == "cuda" and channels > 256:
        pytest.skip("refused, see test_what_the_cuda_kernels_refuse")
    weights, x = block_weights(channels), draws.randn(1, channels, 3, 5)
    contract.check_against_reference(
        lambda x: functional.invertible_block(x, weights, backend=backend),
        lambda x: reference.invertible_block(x, as_dtype(weights, torch.float64)),
        [x],
        among=away_from_kinks(x, weights),
    )


def test_reference_gradient_with_a_3x3_mix() -> None:
    weights = with_3x3_mix(block_weights(4, activation="softplus", dtype=torch.float64), 3)
    x = draws.randn(2, 3, 5, 4, dtype=torch.float64)
    leaves = [x.requires_grad_(), *(w.clone().requires_grad_() for w in weights.tensors())]
    y = reference.invertible_block(leaves[0], with_tensors(weights, tuple(leaves[1:])))
    upstream = draws.randn_like(y)
    expected = torch.autograd.grad(y, leaves, upstream)
    got, more = reference.invertible_block_backward(upstream, x.detach(), weights, True)
    for g, want in zip((got, *more), expected, strict=True):
        assert contract.relative_error(g, want) < 1e-9


def large_weights(weights: BlockWeights, x: Tensor) -> BlockWeights:
    """Weights scaled by 3, so that the clamp and both sides of the activations matter for ``x``. An
    unclamped log scale is limited to 10: exp(89) overflows float32, and exp(r) has r times the
    rounding error of r."""
    large = BlockWeights.from_tensors([3 * w for w in weights.tensors()], *weights[5:])
    if weights.clamp is not None:
        return large
    exact = as_dtype(large, torch.float64)
    z2 = reference.invertible_block(x.double(), exact)[:, x.shape[1] // 2 :]
    scales = [
        reference._subnet(z.double(), exact.rho, weights.activation) for z in (z2, x.chunk(2, 1)[1])
    ]
    *first, project = large.rho
    most = max(float(r.abs().max()) for r in scales)
    return large._replace(rho=(*first, project * min(1.0, 10 / most)))


@pytest.mark.parametrize(("subnet", "activation", "clamp"), VARIANTS)
def test_every_option(backend: str, subnet: str, activation: str, clamp: float | None) -> None:
    if backend != "reference" and subnet != "bottleneck":
        with pytest.raises(RuntimeError, match="made for subnet 'bottleneck', and this block's is"):
            functional.invertible_block(
                draws.randn(1, 4, 3, 3), block_weights(4, subnet), backend=backend
            )
        return
    shape = interpreter.fitted(backend, (2, 8, 9, 11), (1, 8, 5, 11))
    image = draws.randn(shape)
    weights = large_weights(block_weights(8, subnet, activation, clamp), image)
    exact = as_dtype(weights, torch.float64)

    def fn(x: Tensor, *w: Tensor) -> Tensor:
        return functional.invertible_block(x, with_tensors(weights, w), backend=backend)

    def reference_fn(x: Tensor, *w: Tensor) -> Tensor:
        return reference.invertible_block(x, with_tensors(weights, w))

    inputs = [image, *weights.tensors()]
    # exp of an unclamped log scale, here at most 10, multiplies its rounding error by 10.
    tolerance = 2e-5 if clamp is None else 1e-5
    among = away_from_kinks(image, weights)
    contract.check_against_reference(
        fn, reference_fn, inputs, value_tolerance=tolerance, among=among
    )
    contract.check_against_reference(
        lambda y: functional.invertible_block_inverse(y, weights, backend=backend),
        lambda y: reference.invertible_block_inverse(y, exact),
        [image],
        differentiable=False,
        value_tolerance=tolerance,
    )


def same_precision(x: Tensor, weights: BlockWeights, upstream: Tensor) -> list[Tensor]:
    """PyTorch's value and gradient, with every step rounded to ``x.dtype``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "accumulation_dtype", lambda dtype: dtype)
        y = reference.invertible_block(x, weights)
        return [y, reference.invertible_block_backward(upstream, x, weights, False)[0]]


# 64 and 128 channels have products of bfloat16 where the CPU has instructions for them.
@pytest.mark.parametrize("channels", [34, 64, 128])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [(1, 1), (17, 70)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layers_in_half_precision(
    backend: str, dtype: torch.dtype, channels: int, activation: str, size: tuple[int, int]
) -> None:
    if channels == 128 and interpreter.interprets(backend):
        pytest.skip("for Triton 128 channels are as 64, but take longer")
    weights = as_dtype(block_weights(channels, activation=activation), dtype)
    exact = as_dtype(weights, torch.float64)
    shape = interpreter.fitted(backend, (2, channels, *size), (1, channels, 3, 5))
    x, upstream = draws.randn(2, *shape).to(dtype)
    roundoff = torch.finfo(dtype).eps

    def fn(x: Tensor) -> Tensor:
        return functional.invertible_block(x, weights, backend=backend)

    got = [fn(x), *contract.gradients(fn, [x], [upstream])]
    expected = [
        reference.invertible_block(x.double(), exact),
        reference.invertible_block_backward(upstream.double(), x.double(), exact, False)[0],
    ]
    for ours, torch_own, want in zip(
        got, same_precision(x, weights, upstream), expected, strict=True
    ):
        assert ours.dtype == dtype
        allowed = max(contract.relative_error(torch_own, want), roundoff / 4)
        assert contract.relative_error(ours, want) <= 2 * allowed
    back = functional.invertible_block_inverse(got[0], weights, backend=backend)
    assert contract.relative_error(back, x) <= 1.3 * roundoff


def test_threads_do_not_change_a_bit(backend: str) -> None:
    weights = block_weights(8)

    def fn(x: Tensor, *w: Tensor) -> Tensor:
        return functional.invertible_block(x, with_tensors(weights, w), backend=backend)

    image = draws.randn(interpreter.fitted(backend, (3, 8, 140, 150), (2, 8, 6, 23)))
    contract.check_deterministic(backend, fn, image, *weights.tensors())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    weights = block_weights(8)
    contract.check_half_precision(
        lambda x: functional.invertible_block(x, weights, backend=backend),
        lambda x: reference.invertible_block(x, as_dtype(weights, x.dtype)),
        [draws.randn(2, 8, 6, 5)],
        dtype,
    )


@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    shape = interpreter.fitted(backend, (2, 34, 19, 37), (2, 10, 3, 5))
    weights = block_weights(shape[1])
    x = draws.randn(shape).to(dtype)

    def fn(x: Tensor) -> Tensor:
        return functional.invertible_block(x, weights, backend=backend)

    for name, strided in contract.image_layouts(x):
        contract.check_layout(fn, x, strided)
        if name == "channels_last":
            assert fn(strided).is_contiguous(memory_format=torch.channels_last)
    if interpreter.interprets(backend) and dtype != torch.float32:
        return
    for _, strided in contract.expanded(x):
        contract.check_layout(fn, strided.contiguous(), strided)


def test_layouts_of_the_upstream_gradient(backend: str) -> None:
    weights = block_weights(6)
    x, upstream = draws.randn(2, 2, 6, 3, 5)
    options = (weights.tensors(), x.new_empty(0, dtype=torch.uint8), *weights[5:], False)
    for _, strided in (*contract.image_layouts(upstream), *contract.expanded(upstream)):
        (got,) = ops.coupling.coupling_backward(strided, x, *options, backend)
        (want,) = ops.coupling.coupling_backward(strided, x, *options, "reference")
        assert contract.relative_error(got, want) <= 1e-5


def test_contract(backend: str) -> None:
    weights = block_weights(4)
    x = draws.randn(interpreter.fitted(backend, (2, 4, 5, 6), (1, 4, 4, 6)))
    tensors = [w.clone().requires_grad_() for w in weights.tensors()]
    options = (*weights[5:], backend)
    for image in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        for keep in (False, True):
            leaf = image.detach().requires_grad_()
            contract.check_opcheck(
                ops.coupling.coupling, leaf, tensors, *weights[5:], keep, backend
            )
    contract.check_opcheck(ops.coupling.coupling_inverse, x, weights.tensors(), *options)
    contract.check_compiled(
        lambda x: functional.invertible_block(x, weights, backend=backend) * 2, x
    )
    contract.check_deterministic(
        backend, lambda x: functional.invertible_block(x, weights, backend=backend), x
    )


def test_second_derivative() -> None:
    weights = block_weights(2, activation="softplus", dtype=torch.float64)
    contract.check_second_derivative(
        lambda x: functional.invertible_block(x, weights), draws.randn(1, 2, 3, 2)
    )


def test_only_the_input_is_kept() -> None:
    weights = block_weights(8)
    kept: list[Tensor] = []
    x = draws.randn(1, 8, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        functional.invertible_block(x, weights)
    features = [t for t in kept if t.dim() == 4 and t.shape[2:] == (16, 16)]
    assert len(features) == 1


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 2),
    half=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    scale=st.floats(1e-3, 10),
    seed=st.integers(0, 10**6),
)
def test_any_shape(batch: int, half: int, height: int, width: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    weights = block_weights(2 * half)
    exact = as_dtype(weights, torch.float64)
    contract.check_against_reference(
        lambda x: functional.invertible_block(x, weights),
        lambda x: reference.invertible_block(x, exact),
        [scale * draws.randn(batch, 2 * half, height, width)],
    )


def test_nan_stays_nan(backend: str) -> None:
    x = draws.randn(1, 4, 6, 6)
    x[0, 0, 3, 3] = torch.nan
    y = functional.invertible_block(x, block_weights(4), backend=backend)
    assert y[:, :, 3, 3].isnan().all()


def test_bad_input() -> None:
    weights = block_weights(4)
    with pytest.raises(ValueError, match="x must have an even number of channels.*got 3"):
        functional.invertible_block(draws.randn(1, 3, 4, 4), weights)
    with pytest.raises(ValueError, match=r"x must have shape \(B, C, H, W\), got \(4, 4\)"):
        functional.invertible_block(draws.randn(4, 4), weights)
    with pytest.raises(ValueError, match="weights do not fit x with 6 channels"):
        functional.invertible_block(draws.randn(1, 6, 4, 4), weights)
    with pytest.raises(TypeError, match="x must be float16.*int64"):
        functional.invertible_block(torch.zeros(1, 4, 4, 4, dtype=torch.int64), weights)
    with pytest.raises(TypeError, match="weights must be BlockWeights"):
        functional.invertible_block(draws.randn(1, 4, 4, 4), [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x must not be empty"):
        functional.invertible_block(draws.randn(0, 4, 4, 4), weights)
    with pytest.raises(ValueError, match="backend is 'gpu'; allowed are"):
        functional.invertible_block(draws.randn(1, 4, 4, 4), weights, backend="gpu")


@in_parent
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_under_each_instruction_set(capability: str) -> None:
    selection = "across or drawn or option or layouts or threads or bfloat16"
    run_file_under(capability, __file__, "-k", selection, bfloat16=True)


@in_parent
@pytest.mark.parametrize("capability", BFLOAT16_CAPABILITIES)
def test_products_of_bfloat16(capability: str) -> None:
    run_file_under(capability, __file__, "-k", "bfloat16", bfloat16=True)


def test_more_tiles_than_partial_sums(backend: str) -> None:
    weights = block_weights()
    tensors = weights.tensors()
    contract.check_against_reference(
        lambda x, *w: functional.invertible_block(x, with_tensors(weights, w), backend=backend),
        lambda x, *w: reference.invertible_block(x, with_tensors(weights, w)),
        (draws.randn(*interpreter.fitted(backend, (37, 6, 2, 3), (5, 6, 2, 3))), *tensors),
    )


# A row at a time; two images of three, except for the weights' gradient, which needs more memory.
@pytest.mark.parametrize(("workspace", "batch", "height"), [(1, 1, 7), (10_000, 3, 3)])
def test_bands_of_triton(
    monkeypatch: pytest.MonkeyPatch, workspace: int, batch: int, height: int
) -> None:
    x = draws.randn(batch, 3, height, 3)
    if (reason := ops.coupling.OP.why_not("triton", x)) is not None:
        pytest.skip(reason)
    from mghf_fast.kernels import coupling as kernels

    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(kernels, "MOST_WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(kernels, "PIXELS_OF_A_PART", 4)
    # Larger weights, so that pixels several layers away matter.
    weights = with_3x3_mix(block_weights(8), 3)
    weights = with_tensors(weights, tuple(3 * w for w in weights.tensors()))
    contract.check_against_reference(
        lambda x, *w: functional.invertible_block(x, with_tensors(weights, w), backend="triton"),
        lambda x, *w: reference.invertible_block(x, with_tensors(weights, w)),
        (x, *weights.tensors()),
    )
    weights = block_weights(8)
    exact = as_dtype(weights, torch.float64)
    contract.check_against_reference(
        lambda y: functional.invertible_block_inverse(y, weights, backend="triton"),
        lambda y: reference.invertible_block_inverse(y, exact),
        [draws.randn(batch, 8, height, 3)],
        differentiable=False,
    )


def test_memory_of_triton() -> None:
    """A large stack of features may have as much again for the layers, a huge one no more than
    32-bit indices reach, and images are taken in groups of equal size."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from mghf_fast.kernels import coupling as kernels

    def room(*shape: int) -> int:
        return kernels.workspace_bytes(torch.empty(shape, device="meta"))

    assert room(1, 128, 64, 64) == kernels.WORKSPACE_BYTES
    assert room(2, 64, 1024, 1024) == 2 * 64 * 1024 * 1024 * 4
    assert room(64, 128, 1024, 1024) == kernels.MOST_WORKSPACE_BYTES
    cut = kernels.Cut.of(torch.Size((9, 3, 8, 8)), 2, 1, 4 * 64)
    found = [(band.first_image, band.images) for band in cut.bands()]
    assert found == [(0, 3), (3, 3), (6, 3)] and cut.number == 3
    cut = kernels.Cut.of(torch.Size((1, 3, 100, 8)), 2, 1, 30 * 8)
    assert cut.number == len(list(cut.bands())) > 1
    for band in cut.bands():
        assert band.rows <= cut.most_rows
        assert band.rows * 8 <= 30 * 8
        assert band.first_row <= max(0, band.own_begin - 2)
        assert band.first_row + band.rows >= min(100, band.own_end + 2)


def test_triton_refuses_more_channels_than_fit() -> None:
    x, weights = draws.randn(1, 514, 2, 2), block_weights(514)
    if (reason := ops.coupling.OP.why_not("triton", x)) is not None:
        pytest.skip(reason)
    with pytest.raises(RuntimeError, match="up to 512 channels, and this block has 514"):
        functional.invertible_block(x, weights, backend="triton")


def test_what_the_cuda_kernels_refuse() -> None:
    can_run = ops.coupling.OP.implementation("cuda").can_run
    tensors = block_weights(258).tensors()
    assert "up to 256 channels, and this block has 258" in str(can_run(*tensors))
    assert "made for subnet 'bottleneck'" in str(can_run(subnet="conv2"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_gradients_of_an_image_in_half_precision(backend: str, dtype: torch.dtype) -> None:
    weights = block_weights(64)
    x, upstream = draws.randn(2, 1, 64, 5, 6).to(dtype)
    leaves = [w.clone().requires_grad_() for w in weights.tensors()]
    y = functional.invertible_block(x, with_tensors(weights, tuple(leaves)), backend=backend)
    exact = as_dtype(weights, torch.float64)
    _, expected = reference.invertible_block_backward(upstream.double(), x.double(), exact, True)
    for got, want in zip(torch.autograd.grad(y, leaves, upstream), expected, strict=True):
        assert contract.relative_error(got, want) <= 1.3 * torch.finfo(dtype).eps


def test_autocast() -> None:
    x, weights = draws.randn(1, 6, 4, 5).bfloat16(), block_weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.invertible_block(x, weights).dtype == torch.float32
        assert functional.invertible_block_inverse(x, weights).dtype == torch.float32


def test_sums_over_pixels_of_triton_end_with_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers from which they are computed have more rows, those of a band's halo."""
    if not triton_is_interpreted():
        pytest.skip("it calls the kernel itself")
    from mghf_fast.kernels import coupling as kernels

    monkeypatch.setattr(kernels, "PIXELS_OF_A_PART", 4)
    a, b = draws.randn(2, 30, 8)
    shape = kernels.Shape(8, 8, 1, "relu6", 0.0, torch.float32)
    sums = kernels._Sums(SimpleNamespace(image=a, shape=shape))
    for rows in (slice(21), slice(21, 23)):  # six parts of four, then one of two
        sums.add_products("phi_expand", a[rows], b[rows])
    total = sums.found["phi_expand"].sum(0)
    torch.testing.assert_close(total, a[:23].T @ b[:23])
