"""Derivatives of every public function in autograd's various ways: through inputs with a history,
second derivatives, many at once, forward mode."""

from __future__ import annotations

from collections.abc import Callable

import draws
import pytest
import torch
from torch import Tensor

from mghf_fast import (
    ContentStyleLoss,
    DECLoss,
    DetailFeatureExtractor,
    HFDiffLoss,
    LocalInformationLoss,
    MGHFLoss,
    functional,
    use_backend,
)
from mghf_fast.nn import InvertibleBlock, PatchProjection
from mghf_fast.reference import coupling, monce

F = functional
Function = Callable[[Tensor], Tensor]


def smooth_block(dtype: torch.dtype = torch.float64) -> InvertibleBlock:
    torch.manual_seed(0)
    block = InvertibleBlock(4, activation="softplus", clamp=1.5).to(dtype)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.orthogonal_(block.mix.weight)
    return block


def unit(x: Tensor) -> Tensor:
    """Four images of (4, 16, 16) as embeddings, (4, 8, 128)."""
    return torch.nn.functional.normalize(x.reshape(4, 8, 128) - 0.5, dim=2)


def functions(dtype: torch.dtype = torch.float64) -> dict[str, Function]:
    """Public name -> the function of a (4, 4, 16, 16) tensor, differentiable in it. Public
    functions that are not named here are called with the tensor alone."""
    torch.manual_seed(1)
    block, gt = smooth_block(dtype), draws.rand(4, 4, 16, 16, dtype=dtype)
    projection = PatchProjection(8, 8, hidden=6, dimension=5).to(dtype)
    weights = block.weights()
    layers = (projection.hidden, projection.output)
    parameters = tuple(t for layer in layers for t in (layer.weight, layer.bias))
    return {name: getattr(F, name) for name in NAMES} | {
        "invertible_block": lambda x: F.invertible_block(x, weights),
        "invertible_block_inverse": lambda x: F.invertible_block_inverse(x, weights),
        # The entropy weights, constants by contract, are 1 and keep every map.
        "content_style_terms": lambda x: torch.cat(
            F.content_style_terms(gt=gt, sr=x, top_m=4, alpha=0.0)
        ),
        "naive_term": lambda x: F.naive_term(gt=gt, sr=x),
        "patch_projection": lambda x: F.patch_projection(x, *parameters, patch_size=8, stride=8),
        "sinkhorn_plan": lambda x: F.sinkhorn_plan(x[0], iterations=4),
        "marginal_error": lambda x: F.marginal_error(x[0]),
        "monce_loss": lambda x: F.monce_loss(unit(x), unit(gt), iterations=4),
        "patch_nce_loss": lambda x: F.patch_nce_loss(unit(x), unit(gt)),
        "dec_loss": lambda x: F.dec_loss(x, gt),
        "js_divergence_loss": lambda x: F.js_divergence_loss(x.flatten(1), gt.flatten(1)),
    }


WITHOUT_GRADIENT = {"BlockWeights", "ContentStyleTerms", "channel_entropy"}
NAMES = sorted(set(functional.__all__) - WITHOUT_GRADIENT)


def sample(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(2)
    return draws.rand(4, 4, 16, 16, dtype=dtype)


def test_every_public_function_is_here() -> None:
    assert set(functions()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name: str) -> None:
    """The Hessian times a vector, by central differences of the gradient."""
    function, x = functions()[name], sample()
    upstream = draws.randn_like(function(x))
    direction = draws.randn_like(x)

    def gradient(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad((function(leaf) * upstream).sum(), leaf)
        return grad

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad((function(leaf) * upstream).sum(), leaf, create_graph=True)
    if not grad.requires_grad:  # piecewise linear
        got = torch.zeros_like(x)
    else:
        (got,) = torch.autograd.grad(grad, leaf, direction)
    step = 1e-5
    expected = (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)
    scale = expected.abs().max().clamp_min(1e-12)
    assert float((got - expected).abs().max() / scale) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_inputs_with_a_history(name: str) -> None:
    """The function composed with others that share its input."""
    function, x = functions()[name], sample()
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y = x.tanh() * scale  # the function's input, not a leaf
    out = function(y)
    upstream = draws.randn_like(out)
    ((out * upstream).sum() + (y**2).sum()).backward()

    leaf = (x.tanh() * 0.5).requires_grad_()
    ((function(leaf) * upstream).sum() + (leaf**2).sum()).backward()
    assert scale.grad is not None and leaf.grad is not None
    torch.testing.assert_close(scale.grad, (leaf.grad * x.tanh()).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chain", ["inverse of block", "block of inverse", "twice", "three"])
def test_block_and_inverse_share_weights(chain: str, dtype: torch.dtype) -> None:
    """Training through both directions, as with reconstruction and cycle losses."""

    def run(forward: Callable[..., Tensor], inverse: Callable[..., Tensor]) -> list[Tensor]:
        block = smooth_block(dtype)
        x = sample(dtype).requires_grad_()
        y = forward(x, block.weights()) * 1.1
        if chain == "inverse of block":
            out = inverse(y, block.weights())
        elif chain == "block of inverse":
            out = forward(inverse(x, block.weights()) * 0.9, block.weights())
        elif chain == "twice":
            out = inverse(inverse(y, block.weights()), block.weights())
        else:
            out = inverse(y, block.weights()) * y + forward(y, block.weights())
        out.pow(3).sum().backward()
        assert x.grad is not None
        return [x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]

    got = run(F.invertible_block, F.invertible_block_inverse)
    expected = run(coupling.invertible_block, coupling.invertible_block_inverse)
    assert len(got) == len(expected) == 12
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    scale = max(float(b.norm()) for b in expected)  # some are 0 up to rounding
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm()) < tolerance * scale


def test_second_derivative_takes_a_detached_plan_as_a_constant() -> None:
    """The same as autograd through the reference."""
    query, key, v = (unit(draws.rand(4, 4, 16, 16, dtype=torch.float64)) for _ in range(3))
    options = (0.07, 1.0, 7, 1.0, "hard")

    def product(loss: Function) -> Tensor:
        q = query.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(q), q, create_graph=True)
        return torch.autograd.grad((gradient * v).sum(), q)[0]

    def reference(q: Tensor) -> Tensor:
        return monce.monce(q, key, *options, "detach").mean()

    def ours(q: Tensor) -> Tensor:
        return F.monce_loss(q, key, iterations=7, plan_gradient="detach")

    torch.testing.assert_close(product(ours), product(reference), rtol=1e-9, atol=1e-12)


def test_second_derivative_of_the_inverse_reaches_the_weights() -> None:
    block, y = smooth_block(), sample()[:1, :, :5, :5].requires_grad_()
    leaves = [y, *block.parameters()]

    def product(inverse: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(
            inverse(y * 1.5, block.weights()).pow(2).sum(), leaves, create_graph=True
        )
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), leaves)  # type: ignore[arg-type]

    got, expected = product(F.invertible_block_inverse), product(coupling.invertible_block_inverse)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


# ---- many gradients at once ----


def losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    def small(**options: object) -> DetailFeatureExtractor:
        torch.manual_seed(0)
        return DetailFeatureExtractor(3, 8, **options)  # type: ignore[arg-type]

    whole = MGHFLoss(extractor=small())
    trained = LocalInformationLoss(8, 8, reduction="none", trainable_projection=True)
    return {
        "MGHF-c": MGHFLoss(extractor=small(), reduction="none"),
        "MGHF-n": MGHFLoss("n", extractor=small(blocks=2), reduction="none"),
        "terms": lambda sr, gt: torch.stack(list(whole.terms(sr, gt).values())),
        "HFDiffLoss": HFDiffLoss(small(), lambda x: x.flatten(1), reduction="none"),
        "ContentStyleLoss": ContentStyleLoss(reduction="none"),
        "LocalInformationLoss": trained,
        "DECLoss": lambda sr, gt: DECLoss()(sr, gt)[None],
    }


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", losses())
def test_batched_gradients(name: str, kernels: str) -> None:
    """As in `jacobian(vectorize=True)` and in optimisers of several losses."""
    torch.manual_seed(3)
    loss, (sr, gt) = losses()[name], draws.rand(2, 2, 3, 48, 48)
    sr.requires_grad_()
    with use_backend(kernels):
        each = loss(sr, gt)
        one_hot = torch.eye(len(each))
        expected = [torch.autograd.grad(each, sr, v, retain_graph=True)[0] for v in one_hot]
        (got,) = torch.autograd.grad(each, sr, one_hot, is_grads_batched=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_batched_gradients_of_functions(name: str) -> None:
    function, x = functions()[name], sample()
    x.requires_grad_()
    out = function(x)
    upstream = draws.randn(3, *out.shape, dtype=out.dtype)
    expected = [torch.autograd.grad(out, x, v, retain_graph=True)[0] for v in upstream]
    (got,) = torch.autograd.grad(out, x, upstream, is_grads_batched=True)
    torch.testing.assert_close(got, torch.stack(expected))


# ---- forwards ----


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_right_or_refused(name: str) -> None:
    function, x = functions()[name], sample()
    direction = draws.randn_like(x)
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    upstream = draws.randn_like(out)
    (grad,) = torch.autograd.grad(out, leaf, upstream)
    expected = (grad * direction).sum()
    try:
        _, tangent = torch.func.jvp(function, (x,), (direction,))
    except NotImplementedError as error:
        assert "reverse mode" in str(error)
        return
    assert name in ("marginal_error", "patch_nce_loss", "js_divergence_loss")
    torch.testing.assert_close((tangent * upstream).sum(), expected)


@pytest.mark.parametrize("name", losses())
def test_forward_mode_of_losses_is_refused(name: str) -> None:
    loss, (sr, gt) = losses()[name], draws.rand(2, 2, 3, 48, 48)
    with pytest.raises(NotImplementedError, match="carries a tangent"):
        torch.func.jvp(lambda x: loss(x, gt), (sr,), (torch.ones_like(sr),))


def test_forward_mode_in_the_weights_is_refused() -> None:
    block, x = smooth_block(), sample()
    names, values = zip(*block.named_parameters(), strict=True)

    def run(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, tensors, strict=True)), (x,))

    with pytest.raises(NotImplementedError, match="weights carries a tangent"):
        torch.func.jvp(run, values, tuple(map(torch.ones_like, values)))


# ---- transforms of torch.func ----


@pytest.mark.parametrize("name", NAMES)
def test_transforms_of_functions(name: str) -> None:
    function, x = functions()[name], sample()
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    upstream, direction = draws.randn_like(out), draws.randn_like(x)
    (expected,) = torch.autograd.grad(out, leaf, upstream, create_graph=True)
    (second,) = torch.autograd.grad(expected, leaf, direction)

    def gradient(x: Tensor) -> Tensor:
        result: Tensor = torch.func.vjp(function, x)[1](upstream)[0]
        return result

    torch.testing.assert_close(gradient(x), expected.detach())
    torch.testing.assert_close(torch.func.vjp(gradient, x)[1](direction)[0], second)


@pytest.mark.parametrize("name", losses())
def test_transforms_of_losses(name: str) -> None:
    loss, (sr, gt) = losses()[name], draws.rand(2, 2, 3, 48, 48)

    def run(x: Tensor) -> Tensor:
        return loss(x, gt).sum()

    leaf = sr.clone().requires_grad_()
    (expected,) = torch.autograd.grad(run(leaf), leaf)
    gradient, value = torch.func.grad_and_value(run)(sr)
    torch.testing.assert_close(
        gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )
    torch.testing.assert_close(value, run(sr))


def test_transforms_in_the_weights() -> None:
    block, x = smooth_block(), sample()
    parameters: dict[str, Tensor] = dict(block.named_parameters())

    def run(parameters: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(block, parameters, (x,)).square().sum()
        return result

    expected = torch.autograd.grad(run(parameters), list(parameters.values()))
    for got, wanted in zip(torch.func.grad(run)(parameters).values(), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_tangent_behind_another_transform_is_refused() -> None:
    """Its derivative of the value would be 0."""
    query, key = torch.nn.functional.normalize(draws.randn(2, 1, 4, 8), dim=3)

    def run(x: Tensor) -> Tensor:
        return F.monce_loss(x, key)

    for function in (torch.func.grad_and_value(run), torch.func.grad(run)):
        with pytest.raises(NotImplementedError, match="query carries a tangent"):
            torch.func.jvp(function, (query,), (query,))
    with pytest.raises(NotImplementedError, match="query carries a tangent"):
        torch.func.hessian(run)(query)
    # A constant has no tangent, whatever is around it.
    torch.func.jvp(lambda x: x.sum() * F.monce_loss(query, key), (query,), (query,))
    hessian = torch.func.jacrev(torch.func.jacrev(run))(query)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(run, query))


# ---- any number of threads ----


@pytest.mark.parametrize("size", [48, 90, 128])
def test_bits_of_whole_losses_for_any_number_of_threads(size: int) -> None:
    torch.manual_seed(4)
    sr, gt = draws.rand(2, 2, 3, size, size)
    whole = [MGHFLoss(), MGHFLoss("n"), HFDiffLoss()] + [DECLoss()] * (size % 8 == 0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4, 5, 8):
            torch.set_num_threads(threads)
            result = []
            for loss in whole:
                leaf = sr.clone().requires_grad_()
                value = loss(leaf, gt)
                result += [value.detach(), *torch.autograd.grad(value, leaf)]
            results.append(result)
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
