"""MoNCE and PatchNCE: values, gradients, contract."""

from __future__ import annotations

import math

import contract
import draws
import interpreter
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import CAPABILITIES, in_parent, run_file_under
from torch import Tensor

from benchmarks import iterations
from mghf_fast import MGHFLoss, functional, native, ops
from mghf_fast.ops.vocabulary import COSTS, KEPT, PLAN_GRADIENTS
from mghf_fast.reference import monce as reference
from mghf_fast.reference.sinkhorn import sinkhorn_plan

OPTIONS = (0.07, 1.0, 50, 1.0, "hard", "exact")


def pair(b: int, n: int, d: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    key = F.normalize(draws.randn(b, n, d, dtype=torch.float64), dim=2)
    query = F.normalize(key + 0.5 * draws.randn(b, n, d, dtype=torch.float64), dim=2)
    return query.to(dtype), key.to(dtype)


def by_hand(query: Tensor, key: Tensor, plan: Tensor, t: float, q: float) -> Tensor:
    """The loss as printed in the paper, one patch at a time."""
    s = query @ key.mT
    b, n, _ = query.shape
    losses = torch.zeros(b, n, dtype=query.dtype)
    for m in range(b):
        for i in range(n):
            positive = math.exp(s[m, i, i] / t)
            negatives = sum(
                plan[m, i, j].item() * math.exp(s[m, i, j] / t) for j in range(n) if j != i
            )
            losses[m, i] = -math.log(positive / (positive + q * (n - 1) * negatives))
    return losses


@pytest.mark.parametrize("cost", COSTS)
def test_definition(cost: str) -> None:
    query, key = pair(2, 6, dtype=torch.float64)
    plan = sinkhorn_plan(query @ key.mT, cost, 0.3, 9)
    got = functional.monce_loss(
        query,
        key,
        temperature=0.2,
        epsilon=0.3,
        iterations=9,
        negative_weight=0.7,
        cost=cost,
        reduction="none",
    )
    assert contract.relative_error(got, by_hand(query, key, plan, 0.2, 0.7)) < 1e-10
    uniform = torch.full_like(plan, 1 / 5)
    got = functional.patch_nce_loss(query, key, temperature=0.2, reduction="none")
    assert contract.relative_error(got, by_hand(query, key, uniform, 0.2, 1.0)) < 1e-10


def test_reductions() -> None:
    query, key = pair(2, 6)
    for fn in (functional.monce_loss, functional.patch_nce_loss):
        each = fn(query, key, reduction="none")
        assert each.shape == (2, 6) and (each >= 0).all()
        torch.testing.assert_close(fn(query, key), each.mean())
        torch.testing.assert_close(fn(query, key, reduction="sum"), each.sum())


@pytest.mark.parametrize("plan_gradient", PLAN_GRADIENTS)
@pytest.mark.parametrize("cost", COSTS)
def test_reference_gradient(cost: str, plan_gradient: str) -> None:
    query, key = pair(2, 6, dtype=torch.float64)
    query.requires_grad_()
    options = (0.07, 0.1, 12, 0.8, cost, plan_gradient)
    losses = reference.monce(query, key, *options)
    upstream = draws.randn_like(losses)
    (expected,) = torch.autograd.grad(losses, query, upstream)
    got = reference.monce_backward(upstream, query.detach(), key, *options)
    assert contract.relative_error(got, expected) < 1e-10


def test_gradcheck() -> None:
    query, key = pair(1, 4, 3, dtype=torch.float64)
    query.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: reference.monce(q, key, *OPTIONS), query)
    assert torch.autograd.gradcheck(lambda q: functional.patch_nce_loss(q, key), query)


def test_the_plan_carries_gradient() -> None:
    query, key = pair(1, 12, dtype=torch.float64)
    upstream = torch.ones(1, 12, dtype=torch.float64)
    exact, detached = (
        reference.monce_backward(upstream, query, key, 0.07, 0.1, 50, 1.0, "hard", mode)
        for mode in PLAN_GRADIENTS
    )
    assert contract.relative_error(detached, exact) > 0.01


@pytest.mark.parametrize("plan_gradient", PLAN_GRADIENTS)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(("n", "epsilon"), [(1, 1.0), (2, 1.0), (5, 0.1), (33, 1.0), (33, 0.05)])
def test_values_and_gradients(
    backend: str, n: int, epsilon: float, cost: str, plan_gradient: str
) -> None:
    query, key = pair(*interpreter.fitted(backend, (3, n), (1, n)))
    options = (0.07, epsilon, 50, 1.0, cost, plan_gradient)
    contract.check_against_reference(
        lambda q: functional.monce_loss(
            q,
            key,
            epsilon=epsilon,
            cost=cost,
            plan_gradient=plan_gradient,
            reduction="none",
            backend=backend,
        ),
        lambda q: reference.monce(q, key.double(), *options),
        [query],
    )


# ---- sizes, and plans that are hard to find ----


def check_map(query: Tensor, key: Tensor, backend: str, *options: object) -> None:
    """Losses and gradients of the given maps against float64, within the limits of float32
    similarities: an error of 2e-7 in them changes logits by 2e-7 / t, and if the plan hardly
    depends on them, its gradient is mostly its rounding divided by epsilon."""
    temperature, epsilon, iterations, weight, cost, plan_gradient = options

    def loss(q: Tensor) -> Tensor:
        return functional.monce_loss(
            q,
            key,
            temperature=temperature,
            epsilon=epsilon,
            iterations=iterations,
            negative_weight=weight,
            cost=cost,
            plan_gradient=plan_gradient,
            reduction="none",
            backend=backend,
        )

    expected = reference.monce(query.double(), key.double(), *options)
    # The reference's logarithms are as large as 1 / epsilon and accumulate ten roundings, which the
    # kernels avoid.
    lost, more = (6e-7 / epsilon, 10) if backend == "reference" else (0, 1)
    assert contract.relative_error(loss(query), expected) <= 1e-5 + 2e-7 / temperature + lost
    upstream = draws.randn(expected.shape)
    (got,) = contract.gradients(loss, [query], [upstream])
    want = reference.monce_backward(upstream.double(), query.double(), key.double(), *options)
    row = (upstream * -torch.expm1(-expected)).norm().item()
    error = (got.double() - want).norm().item()
    assert error <= (1e-4 + 2e-7 / temperature) * want.norm().item() + more * 3e-6 * row / epsilon


def clusters(n: int, count: int, spread: float) -> tuple[Tensor, Tensor]:
    """Patches of a few kinds: small epsilons move mass between the kinds only slowly."""
    centre = draws.randn(count, 16)[draws.randint(count, (2, n))]
    key = F.normalize(centre + spread * draws.randn(2, n, 16), dim=2)
    return F.normalize(key + 0.1 * draws.randn(2, n, 16), dim=2), key


@pytest.mark.parametrize(
    ("n", "d"), [(3, 1), (7, 3), (8, 4), (15, 16), (16, 17), (17, 64), (40, 65), (95, 33)]
)
def test_any_size(backend: str, n: int, d: int) -> None:
    check_map(*pair(*interpreter.fitted(backend, (3, n, d), (1, n, d))), backend, *OPTIONS)


def test_many_maps(backend: str) -> None:
    """More maps than a kernel processes at a time."""
    query, key = pair(11, 5, 3)
    contract.check_against_reference(
        lambda q: functional.monce_loss(q, key, iterations=3, reduction="none", backend=backend),
        lambda q: reference.monce(q, key.double(), 0.07, 1.0, 3, 1.0, "hard", "exact"),
        [query],
    )


@pytest.mark.parametrize("cost", ["hard", "exp"])
def test_the_papers_size(backend: str, cost: str) -> None:
    query, key = pair(*interpreter.fitted(backend, (1, 441, 64), (1, 141, 64)))
    check_map(query, key, backend, 0.07, 1.0, 50, 1.0, cost, "exact")


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("extractor", iterations.EXTRACTORS)
def test_photographs(backend: str, extractor: str, size: int) -> None:
    """The loss's own embeddings, which need few iterations, against all 50 in float64."""
    pytest.importorskip("skimage")
    maps = 8 if not interpreter.is_slow(backend) else 2 if size < 256 else 1
    loss, picture = MGHFLoss(extractor=extractor, backend="reference"), iterations.pictures(None)[0]
    query, key = iterations.embeddings(loss, picture, size, maps)
    query.requires_grad_()
    losses = functional.monce_loss(query, key, reduction="none", backend=backend)
    want = reference.monce(query.double(), key.double(), *OPTIONS)
    assert contract.relative_error(losses, want) <= 2e-6
    (grad,) = torch.autograd.grad(losses.sum(), query)
    given = (torch.ones_like(want), query.detach().double(), key.double())
    assert contract.relative_error(grad, reference.monce_backward(*given, *OPTIONS)) <= 1e-5


@pytest.mark.parametrize("plan_gradient", PLAN_GRADIENTS)
def test_the_backward_makes_no_iteration_again(backend: str, plan_gradient: str) -> None:
    """The backward uses the forward's state: with another map's state its gradient is different.
    Without a state it recomputes the iterations."""
    query, key = pair(2, 19, 16)
    options = (*OPTIONS[:-1], plan_gradient)
    losses, state = ops.monce.monce(query, key, *options, backend)
    upstream = draws.randn_like(losses)

    def gradient(state: Tensor) -> Tensor:
        grad: Tensor = ops.monce.monce_backward(upstream, query, key, state, *options, backend)
        return grad

    got, made = gradient(state), state[:, 0, 0]
    again = gradient(torch.zeros_like(state))
    torch.testing.assert_close(got, again, rtol=1e-5, atol=1e-6)
    if backend == "reference":
        assert (made == 0).all()
        return
    assert (made > 1).all() and (made <= KEPT).all()
    assert contract.relative_error(gradient(state.flip(0)), got) > 1e-2
    # Slowly converging maps save no iterations that do not fit.
    _, state = ops.monce.monce(*clusters(30, 3, 0.2), 0.07, 0.05, *OPTIONS[2:], backend)
    assert ((state[:, 0, 0] == 0) | (state[:, 0, 0] > 1)).all()


@pytest.mark.parametrize("iterations", [1, 2, 7, 50])
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.005])
def test_slow_convergence(backend: str, epsilon: float, iterations: int) -> None:
    for cost in ("hard", "exp"):
        check_map(*clusters(30, 3, 0.2), backend, 0.07, epsilon, iterations, 1.0, cost, "exact")


@pytest.mark.parametrize("plan_gradient", PLAN_GRADIENTS)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("epsilon", [0.02, 0.01, 0.005])
def test_small_epsilon(backend: str, epsilon: float, cost: str, plan_gradient: str) -> None:
    for d in (2, 3, 64):  # similarities all over [-1, 1] leave float32's range
        query, key = pair(*interpreter.fitted(backend, (2, 33, d), (1, 33, d)))
        check_map(query, key, backend, 0.07, epsilon, 50, 1.0, cost, plan_gradient)


@pytest.mark.parametrize("epsilon", [1.0, 0.01])
@pytest.mark.parametrize("temperature", [1e-3, 0.01, 10.0, 1e4])
def test_any_temperature(backend: str, temperature: float, epsilon: float) -> None:
    for cost in COSTS:
        query, key = pair(*interpreter.fitted(backend, (2, 19), (1, 19)))
        check_map(query, key, backend, temperature, epsilon, 50, 3.0, cost, "exact")


@pytest.mark.parametrize("n", [4, 19, 40])
def test_similarity_and_contrast_cancel_in_the_weights(backend: str, n: int) -> None:
    """Which then are v alone, and must be 0 for the positive and beyond the map all the same."""
    query, key = pair(1, n)
    check_map(query, key, backend, 0.5, 0.5, 12, 1.0, "easy", "exact")


def test_a_tiny_temperature_overflows_nothing(backend: str) -> None:
    query, key = pair(2, 19)
    got = functional.monce_loss(query, key, temperature=1e-9, reduction="none", backend=backend)
    want = reference.monce(query.double(), key.double(), 1e-9, *OPTIONS[1:])
    assert got.isfinite().all()
    assert contract.relative_error(got, want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    query, key = pair(2, 12, dtype=dtype)
    contract.check_half_precision(
        lambda q: functional.monce_loss(q, key, reduction="none", backend=backend),
        lambda q: reference.monce(q, key.to(q.dtype), *OPTIONS),
        [query],
        dtype,
    )


@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    query, key = pair(2, 35, 19, dtype)
    for (_, strided), (_, strided_key) in zip(
        contract.batch_layouts(query), contract.batch_layouts(key), strict=True
    ):
        contract.check_layout(
            lambda q: functional.monce_loss(q, key, backend=backend), query, strided
        )
        contract.check_layout(
            lambda q, k=strided_key: functional.monce_loss(q, k, backend=backend), query, strided
        )
    query, key = query[:1].expand(3, 35, 19), key[:1].expand(3, 35, 19)
    losses = functional.monce_loss(query, key, reduction="none", backend=backend)
    assert torch.equal(losses[0], losses[2])


def test_layouts_of_the_upstream_gradient(backend: str) -> None:
    query, key = pair(3, 5)
    upstream = draws.randn(3, 5)
    for _, strided in (*contract.batch_layouts(upstream), *contract.expanded(upstream)):
        expected = reference.monce_backward(strided, query, key, *OPTIONS)
        _, state = ops.monce.monce(query, key, *OPTIONS, backend)
        got = ops.monce.monce_backward(strided, query, key, state, *OPTIONS, backend)
        assert contract.relative_error(got, expected) <= 1e-5


def test_contract(backend: str) -> None:
    query, key = pair(2, 6)
    contract.check_opcheck(ops.monce.monce, query.clone().requires_grad_(), key, *OPTIONS, backend)
    contract.check_compiled(lambda q: functional.monce_loss(q, key, backend=backend), query)
    query, key = pair(*interpreter.fitted(backend, (5, 33), (2, 33)))
    for epsilon in (1.0, 0.01):
        contract.check_deterministic(
            backend,
            lambda q, epsilon=epsilon: functional.monce_loss(
                q, key, epsilon=epsilon, reduction="none", backend=backend
            ),
            query,
        )


def test_second_derivative() -> None:
    query, key = pair(1, 3, 3, dtype=torch.float64)
    contract.check_second_derivative(
        lambda q: functional.monce_loss(q, key, iterations=4, temperature=0.5), query
    )


def test_small_losses_keep_their_digits(backend: str) -> None:
    key = torch.eye(6).unsqueeze(0)
    got = functional.monce_loss(key, key, temperature=0.05, reduction="none", backend=backend)
    want = reference.monce(key.double(), key.double(), 0.05, *OPTIONS[1:])
    assert (want < 1e-7).all()
    assert contract.relative_error(got, want) < 1e-5


@pytest.mark.parametrize("epsilon", [1.0, 0.05, 0.005])
def test_degenerate_embeddings_are_finite(backend: str, epsilon: float) -> None:
    query, key = pair(4, 6)
    query[0], key[0] = query[0, :1], query[0, :1]  # every patch the same
    query[1, 2], key[1, 3] = 0, 0  # empty patches
    query[2, 1] = query[2, 0]
    query[3], key[3] = 0, 0
    for cost in COSTS:
        leaf = query.clone().requires_grad_()
        loss = functional.monce_loss(leaf, key, epsilon=epsilon, cost=cost, backend=backend)
        loss.backward()
        assert leaf.grad is not None and loss.isfinite() and leaf.grad.isfinite().all()


def test_single_patch_has_loss_zero() -> None:
    query, key = pair(2, 1)
    query.requires_grad_()
    for fn in (functional.monce_loss, functional.patch_nce_loss):
        loss = fn(query, key)
        (grad,) = torch.autograd.grad(loss, query)
        assert loss.item() == 0 and (grad == 0).all()


@pytest.mark.parametrize("n", [1, 2, 7])
def test_nan_gives_nan(n: int, backend: str) -> None:
    query, key = pair(2, n)
    query[1, 0, 0] = torch.nan
    losses = functional.monce_loss(query, key, reduction="none", backend=backend)
    assert losses[0].isfinite().all() and losses[1].isnan().any()
    assert functional.monce_loss(query, key, backend=backend).isnan()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("n", [2, 7, 40])
def test_nan_stays_in_its_map(backend: str, n: int, bad: float) -> None:
    for which in (0, 1):
        query, key = pair(3, n)
        (query, key)[which][1, n - 1, 3] = bad
        query.requires_grad_()
        losses = functional.monce_loss(query, key, reduction="none", backend=backend)
        (grad,) = torch.autograd.grad(losses, query, torch.ones_like(losses))
        assert losses[[0, 2]].isfinite().all() and grad[[0, 2]].isfinite().all()
        assert losses[1].isnan().any() and grad[1].isnan().any()


def test_no_gradient_to_the_key() -> None:
    query, key = pair(1, 4)
    key.requires_grad_()
    query.requires_grad_()
    functional.monce_loss(query, key).backward()
    assert key.grad is None and query.grad is not None


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 15),
    cost=st.sampled_from(COSTS),
    epsilon=st.floats(0.1, 3),
    temperature=st.floats(0.05, 1),
    weight=st.floats(0.1, 10),
    seed=st.integers(0, 10**6),
)
def test_any_problem(
    n: int, cost: str, epsilon: float, temperature: float, weight: float, seed: int
) -> None:
    torch.manual_seed(seed)
    query, key = pair(2, n)
    contract.check_against_reference(
        lambda q: functional.monce_loss(
            q,
            key,
            temperature=temperature,
            epsilon=epsilon,
            negative_weight=weight,
            cost=cost,
            reduction="none",
        ),
        lambda q: reference.monce(q, key.double(), temperature, epsilon, 50, weight, cost, "exact"),
        [query],
    )


def test_bad_input() -> None:
    query, key = pair(1, 4)
    with pytest.raises(ValueError, match="query must not be empty"):
        functional.monce_loss(query[:, :0], key[:, :0])
    with pytest.raises(ValueError, match="query and key must have the same shape"):
        functional.monce_loss(query, key[:, :3])
    with pytest.raises(ValueError, match="plan_gradient must be one of 'exact', 'detach'"):
        functional.monce_loss(query, key, plan_gradient="none")
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none'"):
        functional.monce_loss(query, key, reduction="max")
    with pytest.raises(ValueError, match="temperature must be finite and above 0, got 0"):
        functional.patch_nce_loss(query, key, temperature=0)
    with pytest.raises(ValueError, match="epsilon must be finite and above 0, got inf"):
        functional.monce_loss(query, key, epsilon=float("inf"))


# ---- the compiled kernel ----

needs_kernels = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)


@needs_kernels
@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("query", {"query": torch.zeros(3, 4)}),
        ("query", {"query": torch.zeros(2, 3, 4, dtype=torch.float64)}),
        ("key", {"key": torch.zeros(2, 3, 5)}),
        ("temperature", {"temperature": 0.0}),
        ("epsilon", {"epsilon": torch.nan}),
        ("iterations", {"iterations": 0}),
        ("negative_weight", {"negative_weight": torch.inf}),
        ("cost", {"cost": "soft"}),
        ("plan_gradient", {"plan_gradient": "none"}),
        ("kept", {"kept": 51}),
    ],
)
def test_bad_arguments_are_named(argument: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "query": torch.zeros(2, 3, 4),
        "key": torch.zeros(2, 3, 4),
        "temperature": 0.07,
        "epsilon": 1.0,
        "iterations": 50,
        "negative_weight": 1.0,
        "cost": "hard",
        "plan_gradient": "exact",
        "kept": 6,
    }
    arguments.update(change)
    with pytest.raises(RuntimeError, match=f"{argument} (is|has)"):
        torch.ops.mghf_native.monce(**arguments)
    if argument == "kept":
        return
    del arguments["kept"]
    state = torch.zeros(2, 25, 3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"{argument} (is|has)"):
        torch.ops.mghf_native.monce_backward(torch.zeros(2, 3), state=state, **arguments)


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 25, 4), (1, 25, 3), (2, 24, 3)])
def test_a_state_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    query, state = torch.zeros(2, 3, 4), torch.zeros(shape, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="state has shape"):
        torch.ops.mghf_native.monce_backward(torch.zeros(2, 3), query, query, state, *OPTIONS)


@needs_kernels
def test_empty_batches() -> None:
    for shape in ((0, 5, 3), (2, 0, 3), (2, 5, 0)):
        empty = torch.zeros(shape)
        losses, state = torch.ops.mghf_native.monce(empty, empty, *OPTIONS, 6)
        assert losses.shape == shape[:2] and losses.isfinite().all()
        grad = torch.ops.mghf_native.monce_backward(losses, empty, empty, state, *OPTIONS)
        assert grad.shape == shape


@in_parent
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_under_each_instruction_set(capability: str) -> None:
    selection = "cpu and (any_size or small or temperature or stays)"
    run_file_under(capability, __file__, "-k", selection)
