"""The measurement of what Python costs: what it measures, not how long it takes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import host
from mghf_fast.backends import current_backend
from mghf_fast.ops import OPS


def test_it_measures_every_op_and_both_losses(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(host.ops()) == {*OPS}
    assert host.main(["--rounds", "1", "--backend", "reference"]) == 0
    rows = dict(line.rsplit(maxsplit=2)[0:2] for line in capsys.readouterr().out.splitlines()[1:])
    for name in (*OPS, *host.losses()):
        assert any(row.startswith(name) for row in rows), name


def test_a_row_is_of_the_forward_without_a_gradient_and_of_a_step() -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), current_backend()))
        return 2 * x

    row = host.measure("twice", function, torch.ones(2), rounds=3)
    assert row.name == "twice" and row.forward > 0 and row.step is not None and row.step > 0
    assert {grad for grad, _ in seen} == {True, False}
    assert host.measure("none", torch.Tensor.detach, torch.ones(2), rounds=1).step is None


def test_rounds_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert host.main(["--rounds", "0"]) == 2
    assert "--rounds is 0; allowed are 1 and more" in capsys.readouterr().err
