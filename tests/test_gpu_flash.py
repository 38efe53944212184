"""The comparison with flash-sinkhorn, with its mathematics in float64 in place of its kernels."""

from __future__ import annotations

import importlib.util
import math
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from gpu_runs import CASES
from torch import Tensor

from benchmarks import cases, gpu_flash, gpu_parts, gpu_tables
from benchmarks.gpu_flash import MONCE, PLAN, STOPPING, THEIRS, TUNED, Problem
from mghf_fast import use_backend
from mghf_fast.reference import sinkhorn

SMALL = Problem(2, 96)


class SamplesLoss:
    """What flash_sinkhorn.SamplesLoss computes with alternating updates: potentials or the cost,
    whose gradient is that of fixed potentials. ``wrong`` is a factor of its epsilon."""

    made: ClassVar[list[dict[str, Any]]] = []
    wrong = 1.0

    def __init__(self, loss: str, **options: Any) -> None:
        assert loss == "sinkhorn" and options["backend"] == "alternating"
        assert options["half_cost"] and not options["use_epsilon_scaling"]
        self.made.append(options)
        self.options = options

    def __call__(self, x: Tensor, y: Tensor) -> Any:
        epsilon = self.options["eps"] * self.wrong
        cost = torch.cdist(x.double(), y.double()).square() / 2
        n = x.shape[1]
        f, g = cost.new_zeros(2, *x.shape[:2]).unbind()
        with torch.no_grad():
            for _ in range(self.options["n_iters"]):
                f = -epsilon * ((g.unsqueeze(1) - cost) / epsilon).logsumexp(2)
                f += epsilon * math.log(n)
                g = -epsilon * ((f.unsqueeze(2) - cost) / epsilon).logsumexp(1)
                g += epsilon * math.log(n)
        if self.options["potentials"]:
            return f, g
        plan = ((f.unsqueeze(2) + g.unsqueeze(1) - cost) / epsilon).exp() / n**2
        return (plan.detach() * cost).sum((1, 2))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "package_version", lambda package: "0.4.1")
    monkeypatch.setitem(sys.modules, "flash_sinkhorn", SimpleNamespace(SamplesLoss=SamplesLoss))  # type: ignore[misc]
    monkeypatch.setattr(SamplesLoss, "made", [])
    monkeypatch.setattr(gpu_parts, "CALLS", 1)
    monkeypatch.setattr(gpu_parts, "SLOW", 0.0)


def rows_of(what: str, precision: str = "float32", autotuned: bool = False) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with use_backend("reference"):
        gpu_flash.compare_problem(gpu_parts.Host(), SMALL, what, precision, autotuned, rows.append)
    return rows


def test_the_own_pair_has_no_weight() -> None:
    """The two problems are one: in float64 the plans with and without it are the same."""
    for problem, share in ((SMALL, 6e-6), (Problem(1, 441), 2e-6)):
        query, key = (x.double() for x in gpu_flash.points(problem))
        similarity = query @ key.mT
        assert similarity.diagonal(dim1=1, dim2=2).max() < -0.7
        ours = sinkhorn.sinkhorn_plan(similarity, "hard", gpu_flash.EPSILON, gpu_flash.ITERATIONS)
        solve = gpu_flash.solver(THEIRS, "float32", True)
        theirs = gpu_flash.plan_of(solve(query, key), query, key)
        apart = gpu_flash.distance(theirs, ours[:, : gpu_flash.ROWS])
        assert 0 < apart < share
        assert (theirs.sum(2) - 1).abs().max() < 1e-9  # ours has mass N


@pytest.mark.parametrize("what", ["forward", "gradient"])
def test_results_are_compared_before_they_are_timed(what: str) -> None:
    rows = rows_of(what)
    assert [r["form"] for r in rows] == [PLAN, THEIRS, STOPPING, MONCE]
    assert all(r["part"]["median_s"] > 0 for r in rows), rows
    assert [("difference" in r) for r in rows] == [False, True, True, False]
    assert all(r["difference"] < 3e-5 for r in rows[1:3])
    assert [("graph" in r) for r in rows] == [True, True, False, True]  # its threshold waits
    assert SamplesLoss.made[0]["allow_tf32"] is False and "threshold" not in SamplesLoss.made[0]
    assert SamplesLoss.made[1]["threshold"] == 1e-6 and not SamplesLoss.made[1]["autotune"]


def test_another_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SamplesLoss, "wrong", 1.5)
    for what in ("forward", "gradient"):
        rows = rows_of(what, "tf32", autotuned=True)
        assert [r["form"] for r in rows] == [PLAN, THEIRS, STOPPING, TUNED, MONCE]
        for row in rows[1:4]:
            assert "so is not timed" in row["part"]["failure"] and row["difference"] > 2e-2
        assert rows[4]["part"]["median_s"] > 0
    assert SamplesLoss.made[-1]["autotune"] and SamplesLoss.made[-1]["allow_tf32"]


def test_a_failure_of_theirs_costs_their_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise ValueError("x and y must be CUDA tensors")

    monkeypatch.setattr(SamplesLoss, "__call__", broken)
    rows = rows_of("forward")
    assert [r["part"].get("failure") for r in rows] == [
        None, "ValueError: x and y must be CUDA tensors",
        "ValueError: x and y must be CUDA tensors", None,
    ]  # fmt: skip


def test_the_part_and_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for op, case in CASES.items():  # they get a GPU's forms, until the end of the test
        monkeypatch.setitem(cases.CASES, op, case)
    rows: list[dict[str, Any]] = []
    gpu_parts.run("flash", rows.append, quick=True, backend="reference", size=96)
    assert {(r["precision"], r["what"]) for r in rows} == {
        (p, w) for p in ("float32", "tf32") for w in ("forward", "gradient")
    }
    text = gpu_tables.flash({"flash": rows})
    assert "| 2 x 96 x 64, forward, float32 | flash-sinkhorn | " in text
    monkeypatch.setattr(cases, "package_version", lambda package: None)
    rows.clear()
    gpu_parts.run("flash", rows.append, quick=True, backend="reference", size=96)
    assert gpu_tables.flash({"flash": rows}) == "flash-sinkhorn is not installed.\n"


@pytest.mark.skipif(
    importlib.util.find_spec("flash_sinkhorn") is None or not torch.cuda.is_available(),
    reason="flash-sinkhorn or a CUDA device is missing",
)
@pytest.mark.parametrize("what", ["forward", "gradient"])
def test_the_package_itself(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flash_sinkhorn")
    rows: list[dict[str, Any]] = []
    with torch.device("cuda"):
        gpu_flash.compare_problem(gpu_parts.Host(), SMALL, what, "float32", False, rows.append)
    assert all("failure" not in r["part"] for r in rows), rows
