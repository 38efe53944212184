"""The two nodes of a step, compared with the same loss composed of operators."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import draws
import pytest
import torch
from torch import Tensor, nn

import mghf_fast
from mghf_fast import DetailFeatureExtractor, MGHFLoss, preferences
from mghf_fast.losses import Preset, step

Pair = tuple[Tensor, Tensor]


def pair(b: int = 2, height: int = 56, width: int = 60, dtype: torch.dtype = torch.float32) -> Pair:
    gt = draws.rand(b, 3, height, width)
    return (gt + 0.1 * draws.randn_like(gt)).to(dtype).requires_grad_(), gt.to(dtype)


def squeezed(**options: Any) -> DetailFeatureExtractor:
    torch.manual_seed(3)
    return DetailFeatureExtractor(3, 16, 2, "squeeze", squeeze=2, **options)


def convolved(**options: Any) -> DetailFeatureExtractor:
    torch.manual_seed(4)
    return DetailFeatureExtractor(3, 8, 2, **options)


def foreign() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Softplus())


class Unfused:
    """A context in which losses are composed of operators."""

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(step, "applies", lambda sr, gt: False)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def calls(monkeypatch: pytest.MonkeyPatch, node: Any) -> list[int]:
    """A list that grows by one entry for every call of a node."""
    made: list[int] = []
    apply = node.apply
    monkeypatch.setattr(node, "apply", lambda *a: (made.append(1), apply(*a))[1])
    return made


def both(loss: MGHFLoss, use: Callable[[MGHFLoss, Tensor, Tensor], Any], *images: Any) -> Any:
    fused = use(loss, *images)
    with Unfused():
        return fused, use(loss, *images)


def value_and_gradient(loss: MGHFLoss, sr: Tensor, gt: Tensor) -> Pair:
    total = loss(sr, gt)
    grad = draws.rand(total.shape, generator=torch.Generator().manual_seed(1), dtype=total.dtype)
    return total.detach(), torch.autograd.grad(total, sr, grad)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("variant", ["n", "c"])
@pytest.mark.parametrize("make", [squeezed, convolved, foreign])
def test_equals_the_operators(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], nn.Module],
    variant: str,
    reduction: str,
    dtype: torch.dtype,
) -> None:
    made = calls(monkeypatch, step._Compare)
    loss = MGHFLoss(variant, extractor=make(), reduction=reduction, input_range="0,1")
    if dtype == torch.float64:
        loss = loss.double()
    got, expected = both(loss, value_and_gradient, *pair(dtype=dtype))
    assert len(made) == 1
    assert got[1].dtype == dtype and got[1].shape == expected[1].shape
    tight = 1e-12 if dtype == torch.float64 else 1e-6
    if make is squeezed and dtype != torch.float64:
        # The stem is folded into the first block, so features differ in their last bits: the
        # gradient of a small S - G by ten times as much, and where a value crosses the edge of a
        # bin, an entropy and the weight of its map. In float64 bins are the same.
        tight = 4e-5 if variant == "c" else 4e-6
    torch.testing.assert_close(got[0], expected[0], rtol=tight, atol=0)
    error = (got[1] - expected[1]).double().norm() / expected[1].double().norm()
    assert error <= (2e-3 if dtype == torch.bfloat16 else tight)


@pytest.mark.parametrize("together", [0, 1 << 22])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_one_batch_or_two(monkeypatch: pytest.MonkeyPatch, together: int, layout: str) -> None:
    monkeypatch.setattr(step, "TOGETHER", together)
    sr, gt = pair(height=57, width=63)  # not multiples of the squeeze
    if layout == "channels_last":
        sr, gt = (x.contiguous(memory_format=torch.channels_last) for x in (sr, gt))
    if layout == "sliced":
        sr, gt = (draws.rand(2, 3, 57, 80)[..., 3:66] for _ in range(2))
    sr = sr.detach().requires_grad_()
    got, expected = both(MGHFLoss(extractor=squeezed()), value_and_gradient, sr, gt)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_term_has_its_gradient(dtype: torch.dtype) -> None:
    loss = MGHFLoss(extractor=squeezed()).to(dtype)
    sr, gt = pair(dtype=dtype)
    # In float32 the folded stem changes last bits, see test_equals_the_operators.
    most = 1e-4 if dtype == torch.float32 else 1e-10

    def check(got: Tensor, expected: Tensor, name: str) -> None:
        error = (got - expected).double().norm() / expected.double().norm()
        assert error <= most, f"{name}: {error:g}"

    def gradients(loss: MGHFLoss, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        names = loss.terms(sr, gt)
        return {name: torch.autograd.grad(loss.terms(sr, gt)[name], sr)[0] for name in names}

    got, expected = both(loss, gradients, sr, gt)
    assert got.keys() == expected.keys() and len(got) == 7
    for name, grad in expected.items():
        check(got[name], grad, name)

    def mixed(loss: MGHFLoss, sr: Tensor, gt: Tensor) -> Tensor:
        terms = loss.terms(sr, gt)
        return torch.autograd.grad(terms["total"] + 3 * terms["lip"] + terms["csc"], sr)[0]

    check(*both(loss, mixed, sr, gt), "mixed")


@pytest.mark.parametrize(
    ("gammas", "betas"),
    [
        ((1.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ((0.0, 1.0, 0.0), (0.0, 0.1, 0.0)),
        ((1.0, 0.0, 0.1), (1.0, 1.0, 1.0)),
        ((0.0, 0.0, 1.0), (1.0, 1.0, 1.0)),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
    ],
)
def test_terms_without_a_weight(gammas: Any, betas: Any) -> None:
    loss = MGHFLoss(preset=Preset(gammas, betas, 1.1, 2**0.5, 24), extractor=convolved())
    (total, grad), (want, want_grad) = both(loss, value_and_gradient, *pair())
    torch.testing.assert_close(total, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-9)
    assert both(loss, lambda loss, *images: set(loss.terms(*images)), *pair())[0] == both(
        loss, lambda loss, *images: set(loss.terms(*images)), *pair()
    )[1]  # fmt: skip


def test_gammas_between_forward_and_backward() -> None:
    loss, (sr, gt) = MGHFLoss(extractor=convolved()), pair()
    expected = torch.autograd.grad(loss(sr, gt), sr)[0]
    total = loss(sr, gt)
    loss.gammas = (1, 2, 3)
    assert torch.equal(torch.autograd.grad(total, sr)[0], expected)
    got, want = both(loss, value_and_gradient, sr, gt)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def test_second_derivative_and_batched_gradients() -> None:
    loss = MGHFLoss(extractor=squeezed(activation="softplus"), reduction="none")
    sr, gt = pair(height=40, width=40)

    def second(loss: MGHFLoss, sr: Tensor, gt: Tensor) -> Tensor:
        grad = torch.autograd.grad(loss(sr, gt).sum(), sr, create_graph=True)[0]
        return torch.autograd.grad(grad.square().sum(), sr)[0]

    def batched(loss: MGHFLoss, sr: Tensor, gt: Tensor) -> Tensor:
        total = loss(sr, gt)
        return torch.autograd.grad(total, sr, torch.eye(2), is_grads_batched=True)[0]

    torch.testing.assert_close(*both(loss, second, sr, gt), rtol=1e-4, atol=1e-9)
    got, expected = both(loss, batched, sr, gt)
    assert got.shape == (2, *sr.shape)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-9)


def test_what_looks_on_sees_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, (sr, gt) = MGHFLoss("n", extractor=convolved()), pair()
    made = calls(monkeypatch, step._Extract)
    seen = []

    class Look(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Look():
        loss(sr, gt)
    assert "mghf_fast::coupling" in seen
    with torch.device("meta"):
        assert MGHFLoss("n", extractor=convolved())(*pair()).device.type == "meta"
    assert not made


def test_backward_twice_and_two_losses_of_one_pair() -> None:
    loss, (sr, gt) = MGHFLoss(extractor=squeezed()), pair()
    total = loss(sr, gt)
    first = torch.autograd.grad(total, sr, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(total, sr, retain_graph=True)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, sr)
        torch.autograd.grad(total, sr)
    (loss(sr, gt) + loss(sr, gt)).backward()
    torch.testing.assert_close(sr.grad, 2 * first)


def test_frozen_weights_that_change() -> None:
    loss, (sr, gt) = MGHFLoss(extractor=squeezed(), save_weights=True), pair()
    before = loss(sr, gt).detach()
    other = MGHFLoss(extractor=squeezed(init="linear"), save_weights=True)
    loss.load_state_dict(other.state_dict())
    assert torch.equal(loss(sr, gt), other(sr, gt)) and not torch.equal(loss(sr, gt), before)
    loss.load_state_dict(
        MGHFLoss(extractor=squeezed(), save_weights=True).state_dict(), assign=True
    )
    assert torch.equal(loss(sr, gt), before)
    with torch.no_grad():
        for weight in loss.local_information.projections.buffers():
            weight.add_(0.3 * draws.randn_like(weight))
    got, expected = both(loss, value_and_gradient, sr, gt)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
    assert not torch.equal(got[0], before)
    assert loss.double()(sr, gt).dtype == torch.float64
    assert loss.float()(sr, gt).dtype == torch.float32


def test_copies_and_pickles_hold_no_plans() -> None:
    loss, images = MGHFLoss(extractor=squeezed()), pair()
    expected = loss(*images)
    assert loss._steps._plans
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), copy.copy(loss)):
        assert torch.equal(other(*images), expected)
    assert not copy.deepcopy(loss)._steps._plans
    replica = loss._replicate_for_data_parallel()
    replica.extractor = copy.deepcopy(loss.extractor)
    with torch.no_grad():
        replica.extractor.blocks[0].mix.weight.mul_(2)
    assert not torch.equal(replica(*images), expected)
    assert torch.equal(loss(*images), expected)


def test_hooks_see_the_extractor() -> None:
    loss, images = MGHFLoss("n", extractor=squeezed()), pair()
    expected, seen = loss(*images), []
    handle = loss.extractor.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    # Composed of operators, without the squeeze folded into the first block.
    torch.testing.assert_close(loss(*images), expected, rtol=4e-6, atol=0)
    assert len(seen) == 2
    handle.remove()
    assert torch.equal(loss(*images), expected) and len(seen) == 2


def test_features_that_others_hold_are_not_overwritten() -> None:
    """A backward may write over features that the loss alone has."""
    held: list[Tensor] = []

    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = foreign()

        def forward(self, x: Tensor) -> Tensor:
            held.append(self.inner(x))
            return held[-1]

    hooked = squeezed()
    hooked.blocks[1].register_forward_hook(lambda _, inputs, output: held.append(output))
    for extractor in (Holding(), hooked):
        held.clear()
        total = MGHFLoss(preset="balanced", extractor=extractor)(*pair())
        before = [x.detach().clone() for x in held]
        total.backward()
        assert len(held) == 2 and all(map(torch.equal, held, before))


def test_backend_is_chosen_again() -> None:
    loss, images = MGHFLoss("n", extractor=squeezed()), pair()
    with mghf_fast.use_backend("reference"):
        reference = loss(*images)
    with mghf_fast.use_backend("reference"):
        assert torch.equal(loss(*images), reference)
    torch.testing.assert_close(loss(*images), reference, rtol=1e-5, atol=0)
    plans = len(loss._steps._plans)
    preferences.forget()
    loss(*images)
    assert len(loss._steps._plans) == plans + 2
    for size in range(40, 40 + 2 * step.MOST_PLANS, 2):
        loss(*pair(1, size, size))
    assert len(loss._steps._plans) <= step.MOST_PLANS


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("gammas", [(1, 1, 1), (0, 0, 1), (0, 1, 1), (1, 0, 0)])
def test_what_is_not_finite_gives_nan(gammas: Any, value: float) -> None:
    loss = MGHFLoss(extractor=squeezed())
    loss.gammas = gammas
    for index in (0, 1):
        images = [x.detach().clone() for x in pair(1)]
        images[index][0, 1, 55, 59] = value
        assert loss(*images).isnan()


def test_evaluation_keeps_nothing() -> None:
    loss, (sr, gt) = MGHFLoss(extractor=squeezed()), pair()
    with torch.no_grad():
        total = loss(sr, gt)
    assert total.grad_fn is None
    assert loss(sr.detach(), gt).grad_fn is None
    assert torch.equal(total, loss(sr, gt))


@pytest.mark.skipif("cpu" not in mghf_fast.available_backends(), reason="no compiled kernels")
@pytest.mark.parametrize("extractor", ["perceptual-v1", "procedural-v1", "random"])
def test_the_number_of_threads_changes_no_bit(extractor: str) -> None:
    """With an extractor made on that number of threads, too: what it is drawn from, and what the
    stem is folded into, are matrix products."""
    sr, gt = pair(1, 64, 72)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(value_and_gradient(MGHFLoss(extractor=extractor), sr, gt))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_in_inference_mode() -> None:
    sr, gt = pair()
    expected = MGHFLoss(extractor=squeezed())(sr, gt).detach()
    with torch.inference_mode():
        loss = MGHFLoss(extractor=squeezed())
        assert torch.equal(loss(sr, gt), expected) and torch.equal(loss(sr, gt), expected)
    loss = MGHFLoss(extractor=squeezed())
    with torch.inference_mode():
        assert torch.equal(loss(sr.clone(), gt.clone()), expected)
    got, want = both(loss, value_and_gradient, sr, gt)
    assert torch.equal(got[0], expected)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def test_under_autocast() -> None:
    loss, (sr, gt) = MGHFLoss(extractor=squeezed()), pair()
    expected = value_and_gradient(loss, sr, gt)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradient(loss, sr, gt)
    torch.testing.assert_close(got, expected)
