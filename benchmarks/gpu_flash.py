"""Comparison with the package flash-sinkhorn, which streams the distances of points and never has
N x N numbers in memory: the potentials of a transport problem, and its gradient.

One problem for both. Ours is given by the inner products s of unit rows and leaves out the pair of
a query with its own key; theirs is given by half the squared distance, 1 - s, and has every pair.
So

* keys are nearly opposite to their own queries: that pair has 1.5e-7 of a row's mass in theirs for
  441 patches, exp(-0.9 / EPSILON) against some 2 N, so that the plans differ by 1.7e-6,
* theirs has EPSILON, ITERATIONS, alternating updates that begin with the rows, weights 1 / N, and
  no schedule of epsilons or threshold, as ours. Ours may stop when an iteration changes nothing; so
  theirs is measured with a threshold too,
* their plan is ours / N, and exp((f + g - (1 - s)) / EPSILON) / N^2 with their potentials f, g.

What is compared before it is timed: rows of the plan, and the gradient of the transport cost in
the queries, sum_j P_ij (x_i - y_j), which theirs takes from the potentials and ours from the plan.
MoNCE is timed beside them: the potentials and the contrast, of which theirs has no counterpart.

    python -m benchmarks.gpu_flash

prints the rows with theirs autotuned too, which `make gpu` has no time for: 44 variants of a kernel
are compiled first.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mghf_fast import functional

from . import cases, results
from .gpu_parts import BUDGET, Clock, Gpu, Write, failure, tf32_products, timed

PACKAGE = "flash-sinkhorn"
THEIRS, STOPPING, TUNED = PACKAGE, f"{PACKAGE}, threshold 1e-6", f"{PACKAGE}, autotuned"
PLAN, MONCE = "mghf_fast, plan", "mghf_fast, MoNCE"
EPSILON, ITERATIONS, DEPTH = 0.1, 50, 64
TEMPERATURE = 0.07
ROWS = 64  # of a plan that are compared
ALLOWED = {"float32": 1e-3, "tf32": 2e-2}
"""Largest relative L2 distance of two plans or gradients. An epsilon of 0.1 makes ten times a
product's error of a logarithm."""


class Problem(NamedTuple):
    """``batch`` problems of ``patches`` queries and keys."""

    batch: int
    patches: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.patches} x {DEPTH}"


PROBLEMS = (Problem(128, 441), Problem(1, 4096), Problem(1, 16384), Problem(1, 8192))
"""The paper's maps, and sizes for which flash-sinkhorn is meant."""


def points(problem: Problem) -> tuple[Tensor, Tensor]:
    """Unit queries and keys, (batch, N, DEPTH) each; see above."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, *problem, DEPTH, generator=generator, device="cpu")
    query, noise = numbers.to(torch.get_default_device())
    return F.normalize(query, dim=2), F.normalize(0.5 * noise - query, dim=2)


# ---- ours ----


def plan(query: Tensor, key: Tensor) -> Tensor:
    """(batch, N, N), mass N."""
    similarity = query @ key.mT
    return functional.sinkhorn_plan(similarity, epsilon=EPSILON, iterations=ITERATIONS)


def gradient(query: Tensor, key: Tensor) -> Tensor:
    """That of the transport cost in the queries."""
    ours = plan(query, key)
    return (query * ours.sum(2, keepdim=True) - ours @ key) / query.shape[1]


def contrast(query: Tensor, key: Tensor, precision: str) -> Tensor:
    return functional.monce_loss(
        query, key, temperature=TEMPERATURE, epsilon=EPSILON, iterations=ITERATIONS,
        plan_gradient="exact", reduction="sum", precision=precision,
    )  # fmt: skip


def contrast_step(query: Tensor, key: Tensor, precision: str) -> Tensor:
    leaf = query.detach().requires_grad_()
    return torch.autograd.grad(contrast(leaf, key, precision), leaf)[0]


# ---- theirs ----


def solver(form: str, precision: str, potentials: bool) -> Callable[..., Any]:
    loss = importlib.import_module("flash_sinkhorn").SamplesLoss
    stopping = {"threshold": 1e-6, "inner_iterations": 1} if form == STOPPING else {}
    made: Callable[..., Any] = loss(
        "sinkhorn", backend="alternating", use_epsilon_scaling=False, half_cost=True,
        eps=EPSILON, n_iters=ITERATIONS, potentials=potentials, autotune=form == TUNED,
        allow_tf32=precision == "tf32", **stopping,
    )  # fmt: skip
    return made


def their_gradient(solve: Callable[..., Any], query: Tensor, key: Tensor) -> Tensor:
    leaf = query.detach().requires_grad_()
    return torch.autograd.grad(solve(leaf, key).sum(), leaf)[0]


def plan_of(potentials: tuple[Tensor, Tensor], query: Tensor, key: Tensor) -> Tensor:
    """The first rows of our plan from their potentials, (batch, ROWS, N), in float64."""
    f, g = potentials
    query, key = query[:, :ROWS].double(), key.double()
    cost = (query.square().sum(2).unsqueeze(2) + key.square().sum(2).unsqueeze(1)) / 2
    cost = cost - query @ key.mT
    score = f[:, :ROWS].double().unsqueeze(2) + g.double().unsqueeze(1) - cost
    return (score / EPSILON).exp() / key.shape[1]


# ---- rows ----


def distance(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm())


def facts(clock: Clock, function: Callable[[], object], graph: bool) -> dict[str, Any]:
    """The times of a function, launched from Python and, if it can be captured, as a graph."""
    found = {"part": results.part_facts(timed(clock, function, BUDGET))}
    if graph:
        try:
            found["graph"] = results.part_facts(timed(clock, clock.captured(function), BUDGET))
        except Exception as error:
            found["graph"] = {"failure": failure(error)}
    return found


def ways(
    what: str, precision: str, query: Tensor, key: Tensor, autotuned: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(form, function) of a row; ours first."""
    potentials = what == "forward"
    yield PLAN, functools.partial(plan if potentials else gradient, query, key)
    for form in (THEIRS, STOPPING, TUNED) if autotuned else (THEIRS, STOPPING):
        solve = solver(form, precision, potentials)
        run = solve if potentials else functools.partial(their_gradient, solve)
        yield form, functools.partial(run, query, key)
    own = contrast if potentials else contrast_step
    yield MONCE, functools.partial(own, query, key, precision)


def compare_problem(
    clock: Clock, problem: Problem, what: str, precision: str, autotuned: bool, write: Write
) -> None:
    """Rows of one problem: "forward", the plan or the potentials, or "gradient"."""
    row = {"problem": str(problem), "what": what, "precision": precision}
    query, key = points(problem)
    ours: Tensor | None = None
    for form, function in ways(what, precision, query, key, autotuned):
        clock.clear()
        found: dict[str, Any] = row | {"form": form}
        try:
            with tf32_products(precision == "tf32"):
                result = function()
                if form == PLAN:
                    ours = result[:, :ROWS].clone()
                elif form != MONCE:
                    theirs = result if what == "gradient" else plan_of(result, query, key)
                    if ours is None:
                        raise ValueError("there is no result of ours to compare with")
                    apart = distance(theirs[:, :ROWS], ours)
                    found["difference"] = float(f"{apart:.2g}")
                    if not apart <= ALLOWED[precision]:
                        raise ValueError(f"differs from ours by {apart:.1e}, so is not timed")
                found |= facts(clock, function, graph=form != STOPPING)  # which asks the device
        except Exception as error:
            found["part"] = {"failure": failure(error)}
        write(found)


def compare(
    clock: Clock, write: Write, patches: int | None = None, autotuned: bool = False
) -> None:
    """Writes the rows of every problem, in float32 and then with TF32; for tests ``patches``
    replaces all problems by a small one. Without the package one row says so. ``autotuned`` times
    theirs with tuned blocks too."""
    if cases.package_version(PACKAGE) is None:
        write({"form": THEIRS, "part": {"failure": f"{PACKAGE} is not installed"}})
        return
    problems = PROBLEMS if patches is None else (Problem(2, patches),)
    for precision in ALLOWED:
        for problem in problems:
            for what in ("forward", "gradient"):
                compare_problem(clock, problem, what, precision, autotuned, write)


if __name__ == "__main__":
    torch.set_default_device("cuda")
    compare(Gpu(), lambda row: print(json.dumps(row), flush=True), autotuned=True)
