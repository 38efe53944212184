"""Transport plans: values, gradients, convergence, contract."""

from __future__ import annotations

import contextlib
from typing import Any

import contract
import draws
import interpreter
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mghf_fast import backends, functional, ops
from mghf_fast.ops.vocabulary import COSTS
from mghf_fast.reference import sinkhorn as reference


def cosines(b: int, n: int, d: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    q, k = (F.normalize(draws.randn(b, n, d, dtype=dtype), dim=2) for _ in range(2))
    return q @ k.mT


def by_hand(similarity: Tensor, cost: str, epsilon: float, iterations: int) -> Tensor:
    """NumPy, in the plain domain."""
    s = similarity.numpy()
    score = {"hard": s, "easy": 1 - s, "exp": -np.exp(s)}[cost]
    kernel = np.exp(score / epsilon) * (1 - np.eye(s.shape[1]))
    v = np.ones((s.shape[0], s.shape[1], 1))
    for _ in range(iterations):
        u = 1 / (kernel @ v)
        v = 1 / (kernel.transpose(0, 2, 1) @ u)
    return torch.from_numpy(u * kernel * v.transpose(0, 2, 1))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("n", [2, 3, 17])
def test_definition(cost: str, n: int) -> None:
    s = cosines(2, n, dtype=torch.float64)
    got = functional.sinkhorn_plan(s, cost=cost, epsilon=0.2, iterations=7)
    assert contract.relative_error(got, by_hand(s, cost, 0.2, 7)) < 1e-12


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_reference_gradient(cost: str, tolerance: float | None) -> None:
    s = cosines(3, 6, dtype=torch.float64).requires_grad_()
    plan = reference.sinkhorn_plan(s, cost, 0.1, 12, tolerance)
    upstream = draws.randn_like(plan)
    (expected,) = torch.autograd.grad(plan, s, upstream)
    got = reference.sinkhorn_plan_backward(upstream, s.detach(), cost, 0.1, 12, tolerance)
    assert contract.relative_error(got, expected) < 1e-10


def test_gradcheck() -> None:
    s = cosines(2, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: reference.sinkhorn_plan(s, "hard", 0.5, 5), s)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("n", [1, 2, 5, 33])
def test_values_and_gradients(backend: str, cost: str, epsilon: float, n: int) -> None:
    contract.check_against_reference(
        lambda s: functional.sinkhorn_plan(s, cost=cost, epsilon=epsilon, backend=backend),
        lambda s: reference.sinkhorn_plan(s, cost, epsilon, 50),
        [cosines(*interpreter.fitted(backend, (3, n), (1, n)))],
        # A near-permutation plan hardly depends on s, and the sum nearly cancels.
        cancelled=lambda upstream, plan: (upstream * plan).abs().sum((1, 2)) / epsilon,
        differentiable=n != 2,
    )


@pytest.mark.parametrize("epsilon", [1.0, 0.02])
def test_two_patches_leave_no_choice(backend: str, epsilon: float) -> None:
    """The plan of N = 2 is the exchange, whatever the similarities, and its gradient 0."""
    s = cosines(3, 2).requires_grad_()
    plan = functional.sinkhorn_plan(s, epsilon=epsilon, backend=backend)
    torch.testing.assert_close(plan, torch.eye(2).flip(0).expand(3, 2, 2))
    (grad,) = torch.autograd.grad(plan, s, draws.randn_like(plan))
    assert grad.abs().max() <= 1e-6 / epsilon


@pytest.mark.parametrize("cost", COSTS)
def test_small_epsilon_stays_finite(backend: str, cost: str) -> None:
    s = cosines(2, 24)
    s[0, 3] = s[0, 4]  # coincident patches
    s[1] = 1 - 2 * torch.eye(24)  # all pairs equal, at the edge of the range
    for epsilon in (0.01, 0.005):
        leaf = s.clone().requires_grad_()
        plan = functional.sinkhorn_plan(leaf, cost=cost, epsilon=epsilon, backend=backend)
        plan.square().sum().backward()
        assert leaf.grad is not None and plan.isfinite().all() and leaf.grad.isfinite().all()
        torch.testing.assert_close(plan.sum(1), torch.ones(2, 24), atol=1e-4, rtol=0)
        want = reference.sinkhorn_plan(s.double(), cost, epsilon, 50)
        assert contract.relative_error(plan, want) < 1e-4


@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_matrices_of_several_blocks(backend: str, tolerance: float | None) -> None:
    # Few dimensions and a small epsilon: columns that no row prefers at first.
    for similarity, epsilon in ((cosines(2, 150), 0.5), (cosines(1, 150, 2), 0.02)):
        contract.check_against_reference(
            lambda s, epsilon=epsilon: functional.sinkhorn_plan(
                s, epsilon=epsilon, iterations=12, tolerance=tolerance, backend=backend
            ),
            lambda s, epsilon=epsilon: reference.sinkhorn_plan(s, "hard", epsilon, 12, tolerance),
            [similarity],
        )


def test_marginals(backend: str) -> None:
    plan = functional.sinkhorn_plan(cosines(2, 40), epsilon=0.5, backend=backend)
    ones = torch.ones(2, 40)
    torch.testing.assert_close(plan.sum(1), ones, atol=1e-5, rtol=0)
    torch.testing.assert_close(plan.sum(2), ones, atol=1e-5, rtol=0)
    assert (plan.diagonal(dim1=1, dim2=2) == 0).all() and (plan >= 0).all()
    assert (functional.marginal_error(plan) < 1e-5).all()
    assert functional.marginal_error(torch.zeros(1, 3, 3)).item() == 1


@pytest.mark.parametrize("epsilon", [1.0, 0.05])
def test_tolerance_stops_early_and_keeps_it(backend: str, epsilon: float) -> None:
    s = cosines(4, 30)
    early = functional.sinkhorn_plan(s, epsilon=epsilon, tolerance=1e-2, backend=backend)
    exact = reference.sinkhorn_plan(s.double(), "hard", epsilon, 50, 1e-2)
    reached = functional.marginal_error(exact) <= 1e-2  # not guaranteed after 50 iterations
    assert reached.any() and (functional.marginal_error(early)[reached] <= 1e-2 + 1e-5).all()
    full = functional.sinkhorn_plan(s, epsilon=epsilon, backend=backend)
    assert not torch.equal(early, full)
    contract.check_against_reference(
        lambda s: functional.sinkhorn_plan(s, epsilon=epsilon, tolerance=1e-2, backend=backend),
        lambda s: reference.sinkhorn_plan(s, "hard", epsilon, 50, 1e-2),
        [s],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    contract.check_half_precision(
        lambda s: functional.sinkhorn_plan(s, backend=backend),
        lambda s: reference.sinkhorn_plan(s, "hard", 1.0, 50),
        [cosines(2, 12)],
        dtype,
    )


@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    def fn(s: Tensor) -> Tensor:
        return functional.sinkhorn_plan(s, backend=backend)

    s = cosines(3, 9, dtype=dtype)
    for _, strided in contract.batch_layouts(s):
        contract.check_layout(fn, s, strided)
    for _, strided in contract.expanded(s):
        contract.check_layout(fn, strided.contiguous(), strided)
    plan = fn(s[:1].expand(3, 9, 9))
    assert torch.equal(plan[0], plan[2])


def test_layouts_of_the_upstream_gradient(backend: str) -> None:
    s, upstream = cosines(3, 9), draws.randn(3, 9, 9)
    options = ("hard", 0.5, 50, None)
    for _, strided in (*contract.batch_layouts(upstream), *contract.expanded(upstream)):
        got = ops.sinkhorn.sinkhorn_backward(strided, s, *options, backend)
        # In float64: in float32 the reference's own rounding, on a GPU another, would count too.
        expected = reference.sinkhorn_plan_backward(strided.double(), s.double(), *options)
        # Equal gradients along a row or column cancel, because the marginals are fixed.
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_contract(backend: str) -> None:
    s = cosines(2, 6)
    for tolerance in (None, 1e-3):
        options = ("easy", 0.5, 10, tolerance, backend)
        contract.check_opcheck(ops.sinkhorn.sinkhorn, s.clone().requires_grad_(), *options)
        contract.check_opcheck(ops.sinkhorn.sinkhorn_backward, draws.rand_like(s), s, *options)
    contract.check_opcheck(
        ops.sinkhorn.sinkhorn, s.mT.clone().mT.requires_grad_(), "hard", 1.0, 10, None, backend
    )
    contract.check_compiled(lambda s: functional.sinkhorn_plan(s, backend=backend) * 2, s)
    contract.check_deterministic(
        backend,
        lambda s: functional.sinkhorn_plan(s, backend=backend),
        cosines(*interpreter.fitted(backend, (5, 33), (2, 33))),
    )


def test_second_derivative() -> None:
    contract.check_second_derivative(
        lambda s: functional.sinkhorn_plan(s, iterations=4), cosines(1, 4)
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("n", [1, 2, 20])
def test_nan_stays_in_its_matrix(backend: str, n: int, bad: float) -> None:
    s = cosines(3, n)
    s[1, 0, n - 1] = bad
    plan = functional.sinkhorn_plan(s, backend=backend)
    assert plan[[0, 2]].isfinite().all()
    assert plan[1].isnan().any()


def test_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.sinkhorn_plan(cosines(1, 4).bfloat16()).dtype == torch.float32


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 20),
    cost=st.sampled_from(COSTS),
    epsilon=st.floats(0.05, 5),
    iterations=st.integers(1, 60),
    tolerance=st.none() | st.floats(1e-4, 1e-2),
    seed=st.integers(0, 10**6),
)
def test_any_problem(
    n: int, cost: str, epsilon: float, iterations: int, tolerance: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    s = cosines(2, n)
    got = functional.sinkhorn_plan(
        s, cost=cost, epsilon=epsilon, iterations=iterations, tolerance=tolerance
    )
    want = reference.sinkhorn_plan(s.double(), cost, epsilon, iterations, tolerance)
    # With a tolerance float32 may stop one iteration earlier or later.
    assert contract.relative_error(got, want) < (1e-5 if tolerance is None else 2e-2)


def test_bad_input() -> None:
    s = cosines(1, 4)
    for epsilon in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="epsilon must be finite and above 0"):
            functional.sinkhorn_plan(s, epsilon=epsilon)
    with pytest.raises(ValueError, match="cost must be one of 'hard', 'easy', 'exp', got 'soft'"):
        functional.sinkhorn_plan(s, cost="soft")
    with pytest.raises(
        ValueError, match=r"similarity must have shape \(B, N, N\), got \(1, 4, 3\)"
    ):
        functional.sinkhorn_plan(s[..., :3])
    with pytest.raises(ValueError, match="similarity must not be empty"):
        functional.sinkhorn_plan(draws.rand(2, 0, 0))
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        functional.sinkhorn_plan(s, iterations=0)
    with pytest.raises(ValueError, match="tolerance must be finite and above 0"):
        functional.sinkhorn_plan(s, tolerance=0.0)
    with pytest.raises(TypeError, match="similarity must be float16"):
        functional.sinkhorn_plan(torch.zeros(1, 2, 2, dtype=torch.int32))


@pytest.mark.skipif(not backends.triton_is_interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize(("n", "epsilon"), [(40, 1.0), (40, 0.02)])
def test_many_programs_of_a_map_on_triton(
    n: int, epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first iterations of large maps are separate passes, which stop at the same iteration and
    with the same potentials as a single program. One matrix is NaN, and the small epsilon exceeds
    the range of a pass's sums."""
    from mghf_fast.kernels import sinkhorn_potentials as kernels

    s = draws.rand(3, n, n) * torch.tensor([0.9, 0.1, 0.9]).view(3, 1, 1)
    s[2, 3, 5] = torch.nan
    monkeypatch.setattr(kernels, "PROGRAMS", 6)
    found = []
    for large in (n + 1, 2):
        monkeypatch.setattr(kernels, "LARGE", large)
        state = torch.zeros(3, 25, n, dtype=torch.int32)
        options = ("hard", epsilon, 50, None, False)
        with interpreter.another_order() if large == 2 else contextlib.nullcontext():
            _, steps = kernels.solve(s, *options, settle=True, leave=state)
        found.append((steps[:2], state[:2, 0], state[:2, 1:].view(torch.float32)))
    for one, several in zip(*found, strict=True):
        torch.testing.assert_close(several, one, rtol=0, atol=1e-6)


@pytest.mark.skipif(not backends.triton_is_interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize(
    ("cost", "epsilon", "terms"), [("hard", 1.0, 8), ("hard", 0.1, 2), ("exp", 1.0, 3)]
)
def test_many_programs_of_a_gradient_on_triton(
    cost: str, epsilon: float, terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first terms of a large map's recursion are made by many programs, and the rest by one: as
    many terms as one program makes, with the same values. One map is NaN."""
    from mghf_fast.kernels import monce, sinkhorn_potentials, sinkhorn_recursion

    n, options = 21, (0.5, epsilon, 50, 1.0, cost, "exact")
    query, key = (torch.nn.functional.normalize(draws.randn(3, n, 4), dim=2) for _ in range(2))
    query[2, 1, 0] = torch.nan
    _, state = monce.forward(query, key, *options)
    upstream = draws.randn(3, n)
    monkeypatch.setattr(sinkhorn_potentials, "PROGRAMS", 9)
    monkeypatch.setattr(sinkhorn_potentials, "programs_of_map", lambda b, n: 3)
    monkeypatch.setattr(sinkhorn_recursion, "programs_of_map", lambda b, n: 3)
    monkeypatch.setattr(sinkhorn_recursion, "TERMS", terms)
    found, recur = [], monce.recur
    for large in (n + 1, 2):
        monkeypatch.setattr(sinkhorn_recursion, "LARGE", large)
        bounds = []

        def noted(*arguments: Any, bounds: Any = bounds, **more: Any) -> Any:
            made = recur(*arguments, **more)
            bounds.append(made[1][:2].tolist())
            return made

        monkeypatch.setattr(monce, "recur", noted)
        with interpreter.another_order() if large == 2 else contextlib.nullcontext():
            found.append((monce.backward(upstream, query, key, state, *options), bounds))
    (one, bounds), (several, also) = found
    assert bounds == also
    assert several[2].isnan().all()
    torch.testing.assert_close(several[:2], one[:2], rtol=1e-5, atol=1e-7)
