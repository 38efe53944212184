"""Sinkhorn plans of the paper's size: the native kernel against eager, compiled and library code.

The log-domain reference is what a careful user writes; the exponential-domain form with `bmm` is
what a hasty one writes (it overflows at small epsilon); POT's batched projection is the library a
user would pick. geomloss is left out: it takes point clouds, not a kernel with an empty diagonal,
and anneals epsilon, so that it solves another problem in another number of steps.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mghf_fast import functional, native
from mghf_fast.reference.sinkhorn import sinkhorn_plan

BATCH, PATCHES, ITERATIONS = 128, 441, 50
FACTS = {"iterations": ITERATIONS, "epsilon": 1.0}
SHAPE = f"{BATCH}x{PATCHES}x{PATCHES}"


@pytest.fixture(scope="module")
def similarity() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    query, noise = torch.randn(2, BATCH, PATCHES, 64, generator=generator)
    key = F.normalize(query + 0.5 * noise, dim=2)
    return F.normalize(query, dim=2) @ key.mT


def reference(similarity: Tensor) -> Tensor:
    return sinkhorn_plan(similarity, "hard", 1.0, ITERATIONS, None)


def _kernel(similarity: Tensor) -> Tensor:
    diagonal = torch.eye(PATCHES, dtype=torch.bool)
    return similarity.exp().masked_fill(diagonal, 0)


def bmm(similarity: Tensor) -> Tensor:
    kernel = _kernel(similarity)
    v = torch.ones(BATCH, PATCHES, 1)
    for _ in range(ITERATIONS):
        u = 1 / torch.bmm(kernel, v)
        v = 1 / torch.bmm(kernel.mT, u)
    return u * kernel * v.mT


def pot(similarity: Tensor) -> Tensor:
    ones = torch.ones(BATCH, PATCHES)
    project = importlib.import_module("ot.batch").bregman_projection_batch
    result: Tensor = project(_kernel(similarity), ones, ones, max_iter=ITERATIONS, tol=0)["T"]
    return result


def native_plan(similarity: Tensor, epsilon: float = 1.0) -> Tensor:
    return functional.sinkhorn_plan(
        similarity, epsilon=epsilon, iterations=ITERATIONS, backend="cpu"
    )


@pytest.fixture
def needs_kernels() -> None:
    if (reason := native.unavailable_reason()) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("form", ["reference", "compile", "bmm", "pot"])
def test_forward_baselines(
    bench: Callable[..., Any], benchmark: Any, similarity: Tensor, form: str
) -> None:
    benchmark.group = "sinkhorn forward"
    if form == "pot":
        pytest.importorskip("ot.batch")
    compiled = torch.compile(reference)
    function = {"reference": reference, "compile": compiled, "bmm": bmm, "pot": pot}[form]
    plan = bench(lambda: function(similarity), shape=SHAPE, **FACTS, form=form)
    if native.unavailable_reason() is None:
        torch.testing.assert_close(native_plan(similarity), plan)


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.02, 0.005])
def test_forward_native(
    bench: Callable[..., Any], benchmark: Any, similarity: Tensor, epsilon: float
) -> None:
    benchmark.group = "sinkhorn forward"
    capability = torch.ops.mghf_native.cpu_capability()
    facts = FACTS | {"epsilon": epsilon, "form": "native", "capability": capability}
    bench(lambda: native_plan(similarity, epsilon), shape=SHAPE, **facts)


@pytest.mark.parametrize("form", ["bmm", "native"])
def test_forward_and_backward(
    bench: Callable[..., Any], benchmark: Any, similarity: Tensor, form: str
) -> None:
    """The log-domain reference under autograd would hold 9.4 GiB, so `bmm` stands for it here."""
    benchmark.group = "sinkhorn forward and backward"
    if form == "native" and (reason := native.unavailable_reason()) is not None:
        pytest.skip(reason)
    function = native_plan if form == "native" else bmm
    leaf = similarity.detach().requires_grad_()
    weights = torch.rand(similarity.shape, generator=torch.Generator().manual_seed(1))
    bench(
        lambda: torch.autograd.grad(function(leaf), leaf, weights), shape=SHAPE, **FACTS, form=form
    )
