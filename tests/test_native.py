"""The compiled kernels, called directly, under every instruction set this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import draws
import pytest
import torch
from instruction_sets import (
    CAPABILITIES,
    PRINT_CAPABILITY,
    in_parent,
    run_file_under,
    run_under,
)
from torch import Tensor

from mghf_fast import native
from mghf_fast.reference.sinkhorn import sinkhorn_plan, sinkhorn_plan_backward

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, because small tensors gain nothing from threads, which wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def similarities(batch: int, size: int, kind: str = "random", seed: int = 0) -> Tensor:
    """Cosine similarities of matching query and key embeddings, as in training."""
    generator = torch.Generator().manual_seed(seed + size)
    query, noise = torch.randn(2, batch, size, 64, generator=generator)
    key = query + 0.5 * noise
    if kind == "coincident":  # all patches the same but one, which is the opposite
        key = query = query[:, :1].repeat(1, size, 1)
        query[:, 0] *= -1
    elif kind == "spread":  # similarities all over [-1, 1]
        return 2 * torch.rand(batch, size, size, generator=generator) - 1
    normalize = torch.nn.functional.normalize
    return normalize(query, dim=2) @ normalize(key, dim=2).mT


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check(
    similarity: Tensor, cost: str, epsilon: float, iterations: int, tolerance: float | None
) -> None:
    options = (cost, epsilon, iterations, tolerance)
    before = similarity.clone()
    plan = torch.ops.mghf_native.sinkhorn(similarity, *options)
    expected = sinkhorn_plan(similarity.double(), *options)
    assert plan.is_contiguous() and plan.dtype == torch.float32
    assert relative_error(plan, expected) <= 1e-5
    assert (plan.diagonal(dim1=1, dim2=2) == 0).all()

    grad = torch.randn(similarity.shape, generator=torch.Generator().manual_seed(1))
    grad_similarity = torch.ops.mghf_native.sinkhorn_backward(grad, similarity, *options)
    expected = sinkhorn_plan_backward(grad.double(), similarity.double(), *options)
    # If the plan hardly depends on the similarities, its gradient is mostly rounding.
    floor = 1e-6 * (grad * plan).norm().item() / epsilon
    error = (grad_similarity.double() - expected).norm().item()
    assert error <= 1e-4 * expected.norm().item() + floor
    assert torch.equal(similarity, before)


# ---- values and gradients ----


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.05, 0.02, 0.01, 0.005])
@pytest.mark.parametrize("cost", ["hard", "easy", "exp"])
@pytest.mark.parametrize("size", [2, 3, 5, 17, 33])
def test_matches_the_float64_reference(size: int, cost: str, epsilon: float) -> None:
    for kind in ("random", "coincident", "spread"):
        check(similarities(2, size, kind), cost, epsilon, 50, None)


@pytest.mark.parametrize("epsilon", [1.0, 0.02])
def test_matches_the_float64_reference_at_the_papers_size(epsilon: float) -> None:
    check(similarities(1, 441), "hard", epsilon, 50, None)
    check(similarities(1, 441, "spread"), "hard", epsilon, 5, None)


@pytest.mark.parametrize("iterations", [1, 2, 7])
@pytest.mark.parametrize("epsilon", [1.0, 0.01])
def test_any_number_of_iterations(iterations: int, epsilon: float) -> None:
    check(similarities(3, 20, "spread"), "hard", epsilon, iterations, None)


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
def test_stops_at_the_tolerance(tolerance: float, epsilon: float) -> None:
    check(similarities(4, 30), "hard", epsilon, 50, tolerance)


def test_stops_each_matrix_by_itself() -> None:
    similarity = torch.cat([similarities(1, 30), similarities(1, 30, "spread")])
    options = ("hard", 0.1, 50, 1e-2)
    both = torch.ops.mghf_native.sinkhorn(similarity, *options)
    alone = [torch.ops.mghf_native.sinkhorn(s, *options) for s in similarity.split(1)]
    assert torch.equal(both, torch.cat(alone))
    assert not torch.equal(both, torch.ops.mghf_native.sinkhorn(similarity, *options[:3], None))


def test_any_strides() -> None:
    contiguous = similarities(3, 21)
    grad = draws.randn(3, 21, 21)
    spaced = torch.zeros(6, 42, 63)[::2, ::2, ::3].copy_(contiguous)
    transposed = contiguous.mT.contiguous().mT
    expanded = contiguous[:1].expand(3, 21, 21)
    assert not (spaced.is_contiguous() or transposed.is_contiguous() or expanded.is_contiguous())
    for epsilon in (1.0, 0.005):
        for view in (spaced, transposed, expanded):
            options = ("exp", epsilon, 10, None)
            dense = view.contiguous()
            plan = torch.ops.mghf_native.sinkhorn(view, *options)
            assert torch.equal(plan, torch.ops.mghf_native.sinkhorn(dense, *options))
            for g in (grad, grad.mT, grad[:1, :1].expand(3, 21, 21)):
                assert torch.equal(
                    torch.ops.mghf_native.sinkhorn_backward(g, view, *options),
                    torch.ops.mghf_native.sinkhorn_backward(g.contiguous(), dense, *options),
                )


@pytest.mark.parametrize("epsilon", [1.0, 0.01])
def test_the_number_of_threads_does_not_change_a_bit(epsilon: float) -> None:
    similarity, grad = similarities(5, 65, "spread"), draws.randn(5, 65, 65)
    options = ("hard", epsilon, 20, None)
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        for _ in range(2):
            plan = torch.ops.mghf_native.sinkhorn(similarity, *options)
            gradient = torch.ops.mghf_native.sinkhorn_backward(grad, similarity, *options)
            results.append(torch.stack([plan, gradient]))
    assert all(torch.equal(results[0], result) for result in results)


def test_degenerate_shapes() -> None:
    for shape in ((0, 5, 5), (3, 0, 0), (0, 0, 0)):
        empty = torch.zeros(shape)
        assert torch.ops.mghf_native.sinkhorn(empty, "hard", 1.0, 50, None).shape == shape
        gradient = torch.ops.mghf_native.sinkhorn_backward(empty, empty, "hard", 1.0, 50, None)
        assert gradient.shape == shape
    single = torch.tensor([[[0.5]], [[torch.nan]]])
    plan = torch.ops.mghf_native.sinkhorn(single, "hard", 1.0, 50, None)
    assert plan[0] == 0 and plan[1].isnan()
    gradient = torch.ops.mghf_native.sinkhorn_backward(single, single, "hard", 1.0, 50, None)
    assert gradient[0] == 0 and gradient[1].isnan()


# ---- input that is not a similarity ----


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("epsilon", [1.0, 0.01])
@pytest.mark.parametrize("cost", ["hard", "easy", "exp"])
def test_what_cannot_be_handled_gives_nan(cost: str, epsilon: float, value: float) -> None:
    similarity = similarities(3, 19, "spread")
    expected = torch.ops.mghf_native.sinkhorn(similarity, cost, epsilon, 50, 1e-3)
    similarity[1, 4, 7] = value
    plan = torch.ops.mghf_native.sinkhorn(similarity, cost, epsilon, 50, 1e-3)
    assert torch.equal(plan[[0, 2]], expected[[0, 2]])
    if cost == "exp" and value == -torch.inf:
        return  # exp(-inf) is 0, a score like any other
    assert plan[1].isnan().all()
    grad = torch.ones(3, 19, 19)
    grad = torch.ops.mghf_native.sinkhorn_backward(grad, similarity, cost, epsilon, 50, 1e-3)
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


def test_the_diagonal_is_never_looked_at() -> None:
    similarity = similarities(2, 19)
    expected = torch.ops.mghf_native.sinkhorn(similarity, "hard", 0.1, 50, None)
    similarity.diagonal(dim1=1, dim2=2).fill_(torch.nan)
    assert torch.equal(torch.ops.mghf_native.sinkhorn(similarity, "hard", 0.1, 50, None), expected)


def test_nan_in_the_upstream_gradient_stays_in_its_matrix() -> None:
    similarity, grad = similarities(2, 19), torch.ones(2, 19, 19)
    grad[0, 2, 3] = torch.nan
    for epsilon in (1.0, 0.005):
        gradient = torch.ops.mghf_native.sinkhorn_backward(
            grad, similarity, "hard", epsilon, 9, None
        )
        assert gradient[0].isnan().any() and gradient[1].isfinite().all()


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("similarity", {"similarity": torch.zeros(2, 3, 4)}),
        ("similarity", {"similarity": torch.zeros(3, 3)}),
        ("similarity", {"similarity": torch.zeros(2, 3, 3, dtype=torch.float64)}),
        ("cost", {"cost": "soft"}),
        ("epsilon", {"epsilon": 0.0}),
        ("epsilon", {"epsilon": torch.nan}),
        ("epsilon", {"epsilon": torch.inf}),
        ("iterations", {"iterations": 0}),
        ("tolerance", {"tolerance": -1.0}),
        ("tolerance", {"tolerance": torch.nan}),
    ],
)
def test_bad_arguments_are_named(argument: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "similarity": torch.zeros(2, 3, 3),
        "cost": "hard",
        "epsilon": 1.0,
        "iterations": 50,
        "tolerance": None,
    }
    arguments.update(change)
    with pytest.raises(RuntimeError, match=f"{argument} (is|has)"):
        torch.ops.mghf_native.sinkhorn(**arguments)
    with pytest.raises(RuntimeError, match=f"{argument} (is|has)"):
        torch.ops.mghf_native.sinkhorn_backward(torch.zeros(2, 3, 3), **arguments)


def test_a_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match="grad has shape"):
        torch.ops.mghf_native.sinkhorn_backward(
            torch.zeros(1, 3, 3), torch.zeros(2, 3, 3), "hard", 1.0, 50, None
        )


# ---- instruction sets ----


@in_parent
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_under_each_instruction_set(capability: str) -> None:
    run_file_under(capability, __file__)


@in_parent
def test_an_unknown_instruction_set_is_refused() -> None:
    result = run_under("sse9", "-c", PRINT_CAPABILITY)
    assert result.returncode != 0
    assert "MGHF_CPU_CAPABILITY is 'sse9'" in result.stderr


def test_build_facts_name_the_instruction_set_in_use() -> None:
    facts = native.build_facts()
    assert torch.ops.mghf_native.cpu_capability() in facts["capabilities"]
    assert {"compiler", "flags", "torch", "torch_target_version"} <= facts.keys()


@pytest.mark.parametrize(
    "shape", [(1, 4, 4), (2, 3, 4), (2, 4, 3), (3, 4, 4)], ids=lambda shape: str(shape)
)
def test_gram_backward_refuses_a_gradient_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="grad has shape"):
        torch.ops.mghf_native.gram_backward(torch.zeros(shape), torch.zeros(2, 4, 5, 6), 1.0)


def test_coupling_refuses_what_does_not_fit_together() -> None:
    ops, options = torch.ops.mghf_native, (6, 1, "relu6", 0.0)
    x, weights = torch.zeros(2, 6, 4, 5), torch.zeros(6 * 7 + 3 * (36 + 54))
    ops.coupling_backward(x, x, weights, *options, False)
    for shape in ((1, 6, 4, 5), (2, 4, 4, 5), (2, 6, 3, 5), (2, 6, 4, 4)):
        with pytest.raises(RuntimeError, match="grad has shape"):
            ops.coupling_backward(torch.zeros(shape), x, weights, *options, False)
    for wrong in (weights[1:], torch.cat((weights, weights))[::2]):
        with pytest.raises(RuntimeError, match="weights has shape"):
            ops.coupling(x, wrong, *options)
