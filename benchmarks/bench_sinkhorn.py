"""Transport plans of the paper's size (at 512 x 512: 128 matrices of 441 x 441), 50 iterations.

The log-domain reference is what a careful user writes; the exponential domain with `bmm` is what a
hasty one writes (it overflows at small epsilon); POT and geomloss are the libraries a user would
pick, where a cost of 50 keeps the diagonal empty. All give the same plan.
"""

import importlib

import torch
from torch import Tensor

from benchmarks.cases import PAPER, QUICK, Form, Shape, embeddings, measured, standard_forms
from mghf_fast import functional
from mghf_fast.commands.table5.workloads import CHANNELS
from mghf_fast.reference import sinkhorn

ITERATIONS = 50


def reference(similarity: Tensor) -> Tensor:
    return sinkhorn.sinkhorn_plan(similarity, "hard", 1.0, ITERATIONS, None)


def without_diagonal(similarity: Tensor, value: float) -> Tensor:
    return similarity.masked_fill(torch.eye(similarity.shape[1], dtype=torch.bool), value)


def exponential_domain(similarity: Tensor) -> Tensor:
    kernel = without_diagonal(similarity, -torch.inf).exp()
    v = kernel.new_ones(*kernel.shape[:2], 1)
    for _ in range(ITERATIONS):
        u = 1 / torch.bmm(kernel, v)
        v = 1 / torch.bmm(kernel.mT, u)
    return u * kernel * v.mT


def pot(similarity: Tensor) -> Tensor:
    kernel = without_diagonal(similarity, -torch.inf).exp()
    ones = torch.ones(kernel.shape[:2])
    project = importlib.import_module("ot.batch").bregman_projection_batch
    return project(kernel, ones, ones, max_iter=ITERATIONS, tol=0)["T"]


def geomloss(similarity: Tensor) -> Tensor:
    solve = importlib.import_module("geomloss.ot").solve_batch
    plan = solve(without_diagonal(-similarity, 50.0), reg=1.0, max_iter=ITERATIONS).plan
    return plan * similarity.shape[1]


def inputs(shape: Shape) -> tuple[Tensor]:
    query, key = embeddings(shape)
    return (query @ key.mT,)


FORWARD, HERE = ["forward"], (QUICK, PAPER)
FORMS = standard_forms(
    functional.sinkhorn_plan, reference, images=False, compiled=(PAPER,), compiled_parts=FORWARD
) | {
    "exponential domain": Form(lambda: exponential_domain, "peer", shapes=HERE),
    "POT": Form(lambda: pot, "peer", package="POT", shapes=HERE, parts=FORWARD),
    "geomloss": Form(lambda: geomloss, "peer", package="geomloss", shapes=HERE, parts=FORWARD),
}

test_sinkhorn = measured(
    "sinkhorn",
    __name__,
    inputs,
    FORMS,
    output=lambda shape: (shape.batch * CHANNELS, shape.patches, shape.patches),
)
