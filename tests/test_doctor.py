"""`mghf-fast doctor` reports every backend's state and checks its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from mghf_fast import native
from mghf_fast.backends import BACKENDS
from mghf_fast.commands.cli import main
from mghf_fast.commands.doctor import examination as doctor


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "triton", "numpy", "python", "threads", "GPU", "Self-check", "sinkhorn"):
        assert word in shown
    assert all(backend in shown for backend in BACKENDS)
    assert "Usable." in shown


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["usable"] is True
    assert facts["packages"]["torch"]
    for name, backend in facts["backends"].items():
        assert backend["available"] == (backend["reason"] is None), name
    assert set(facts["ops"]["sinkhorn"]) == set(BACKENDS)
    assert facts["self_check"]["reference"]["error"] <= doctor.TOLERANCE


def shown_under(capability: str, *more: str) -> str:
    """What the command shows in a process of its own: the instruction set is chosen once."""
    return subprocess.run(
        [sys.executable, "-m", "mghf_fast", "doctor", *more],
        env={**os.environ, "MGHF_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="no CPU kernels here")
def test_the_instruction_set_is_named() -> None:
    own = torch.ops.mghf_native.cpu_capability()
    assert f"available, with the instruction set {own}\n" in doctor.report(doctor.examine())
    assert json.loads(shown_under("default", "--json"))["instruction_set"] == "default"
    shown = shown_under("sse9")
    assert "instruction set" not in shown and "MGHF_CPU_CAPABILITY is 'sse9'" in shown


def test_every_op_has_the_reference() -> None:
    reasons = doctor.op_backends()
    assert {"coupling", "content_style", "sinkhorn", "monce", "patches"} <= set(reasons)
    assert all(backends["reference"] is None for backends in reasons.values())


def test_an_available_backend_that_computes_wrongly_is_not_usable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "TOLERANCE", -1.0)
    assert main(["doctor"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_backend_that_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    op = doctor.OPS["sinkhorn"]

    def choose(*arguments: object) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(op, "choose", choose)
    facts = doctor.examine()
    assert facts["usable"] is False
    assert "illegal instruction" in doctor.report(facts)
