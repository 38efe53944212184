"""The tests themselves on a device: which run there, and how PyTorch is set."""

from __future__ import annotations

import os
from types import ModuleType, SimpleNamespace
from typing import Any

import conftest
import pytest
import torch
import without_hypothesis

from benchmarks import floors, gpu_parts
from mghf_fast import backends
from mghf_fast.ops import _dispatch

# ---- the suite on a device ----


def test_the_backends_of_a_cuda_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels and the reference, as if there were a CUDA device."""
    monkeypatch.setattr(backends, "_triton_unavailable_reason", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(_dispatch, "_triton_lacks", lambda device: None)
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
            assert torch.empty(9).isnan().all()  # what is left unwritten shows
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
