"""The tests themselves on a device: which run there, and how PyTorch is set."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import conftest
import draws
import pytest
import torch
import without_hypothesis
from torch import nn

from benchmarks import floors, gpu_parts
from mghf_fast import backends

TESTS = Path(__file__).parent

# ---- the suite on a device ----


def test_the_backends_of_a_cuda_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels and the reference, as if there were a CUDA device."""
    monkeypatch.setattr(backends, "_triton_unavailable_reason", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends, "_triton_lacks", lambda device: None)
    probe: Any = SimpleNamespace(
        device=torch.device("cuda"), is_cuda=True, dtype=torch.float32, shape=(1, 2, 2),
        dim=lambda: 3,
    )  # fmt: skip
    for op in floors.OPS:
        assert conftest.runnable_backends(op, probe) == ["triton", "reference"], op


def test_pytorch_is_exact_and_repeatable_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with torch.backends.cudnn.flags(enabled=True), gpu_parts.tf32_products(True):
        try:
            conftest.as_float32_and_repeatable()
            assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic
            assert not torch.backends.cuda.matmul.allow_tf32
            assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
            assert torch.empty(9).isnan().all()  # so that unwritten elements are noticed
        finally:
            torch.use_deterministic_algorithms(False)


def test_what_runs_on_a_device() -> None:
    def item(name: str, *fixtures: str, gpu: bool = False) -> Any:
        marker = object() if gpu else None
        return SimpleNamespace(
            name=name, fixturenames=fixtures, get_closest_marker=lambda _: marker
        )

    assert conftest.runs_on_a_device(item("test_values[triton]", "backend"))
    assert conftest.runs_on_a_device(item("test_bands_of_triton[1-1-7]"))
    assert conftest.runs_on_a_device(item("test_another_stream", gpu=True))
    assert not conftest.runs_on_a_device(item("test_definition", "request"))


def test_where_hypothesis_is_missing() -> None:
    modules: dict[str, ModuleType] = {}
    without_hypothesis.install(modules)
    given, settings = modules["hypothesis"].given, modules["hypothesis"].settings
    strategies = modules["hypothesis.strategies"]
    drawn = strategies.integers(1, 2) | strategies.tuples(strategies.floats()).map(abs)

    def test_any(x: int) -> None:
        raise AssertionError

    stand_in = settings(max_examples=3)(given(x=drawn)(test_any))
    assert stand_in.__name__ == "test_any"
    assert [mark.name for mark in stand_in.pytestmark] == ["skip"]
    with pytest.raises(AttributeError):
        _ = strategies.__file__


# ---- random numbers ----


def test_numbers_are_those_of_the_cpu() -> None:
    """The same on every device, and all drawn from the CPU's generator."""
    layer = nn.Linear(3, 2)
    made = {
        "randn": lambda m: m.randn(2, 3), "rand": lambda m: m.rand((2, 3), dtype=torch.float64),
        "randint": lambda m: m.randint(5, (7,)), "randperm": lambda m: m.randperm(9),
        "randn_like": lambda m: m.randn_like(torch.ones(2, 3, device="cpu").mT),
        "rand_like": lambda m: m.rand_like(torch.ones(4, device="cpu")),
    }  # fmt: skip
    for make in made.values():
        torch.manual_seed(3)
        expected = make(torch)
        torch.manual_seed(3)
        assert torch.equal(make(draws), expected)
        with torch.device("meta"):
            assert make(draws).shape == expected.shape
    assert draws.randn(2, 3, requires_grad=True).requires_grad
    assert draws.randn_like(torch.ones(2, 3).mT).stride() == (1, 3)
    with torch.device("meta"):
        before = torch.get_rng_state()
        assert (
            draws.randn(3).device.type == draws.module(lambda: nn.Linear(3, 2)).weight.device.type
        )
        assert layer.weight.device.type == "cpu" and not torch.equal(before, torch.get_rng_state())


DRAWN = ("randn", "rand", "randint", "randperm", "randn_like", "rand_like", "normal")


@pytest.mark.parametrize("path", sorted(TESTS.glob("*.py")), ids=lambda path: path.stem)
def test_no_test_draws_on_a_device(path: Path) -> None:
    """Except by draws.py, or with an explicit generator, which is the CPU's."""
    if path.name == "draws.py":
        return
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)):
                if name in DRAWN and "generator" not in {k.arg for k in node.keywords}:
                    wrong.append(f"line {node.lineno}: torch.{name}, use draws.{name}")
    assert not wrong, wrong
