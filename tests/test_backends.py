"""The choice of backend: default, context manager, environment, forcing and its refusals."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import draws
import pytest
import torch

import mghf_fast
from mghf_fast import available_backends, backends, functional, native, reference, use_backend
from mghf_fast.backends import BACKENDS, current_backend, unavailable_reasons
from mghf_fast.ops import OPS, Op, _dispatch, coupling

IDENTITY = SimpleNamespace(
    forward=lambda x: x, backward=lambda grad: grad, can_run=lambda *tensors, **options: None
)
"""A stand-in for a backend's module."""


def test_the_reference_is_always_there_and_runs_everything() -> None:
    assert "reference" in available_backends()
    assert set(available_backends()) | set(unavailable_reasons()) == set(BACKENDS)
    assert not set(available_backends()) & set(unavailable_reasons())
    files = {path.stem for path in Path(reference.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(OPS) == files and len(OPS) >= 8
    for op in OPS.values():
        assert op.why_not("reference", torch.zeros(1)) is None


def test_use_backend_nests_and_restores() -> None:
    assert current_backend() == "auto"
    with use_backend("reference"):
        assert current_backend() == "reference"
        with use_backend("auto"):
            assert current_backend() == "auto"
            assert current_backend("reference") == "reference"
        assert current_backend() == "reference"
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    assert current_backend() == "auto"


def test_auto_and_none_follow_the_surrounding_choice() -> None:
    """In a function, in a loss, and in a loss that was made elsewhere; a name forces."""
    x = draws.rand(1, 3, 48, 48, dtype=torch.float64)
    loss = mghf_fast.MGHFLoss("n", extractor=torch.nn.Identity(), backend="auto").double()
    with use_backend("cuda"):  # which takes no float64 anywhere
        for backend in (None, "auto"):
            assert current_backend(backend) == "cuda"
            with pytest.raises(RuntimeError, match="backend 'cuda' cannot run gram"):
                functional.gram_matrix(x, backend=backend)
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run content_style"):
            loss(x, x.flip(3))
        assert current_backend("reference") == "reference"
        functional.gram_matrix(x, backend="reference")
        mghf_fast.MGHFLoss("n", extractor=torch.nn.Identity(), backend="reference")(x, x)


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    x = draws.rand(1, 2, 4, 4)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run entropy: .*CUDA"):
        functional.channel_entropy(x, backend="cuda")
    with use_backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' cannot run"):
        functional.gram_matrix(x)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run sinkhorn: "):
        functional.sinkhorn_plan(draws.rand(1, 3, 3, dtype=torch.float64), backend="cpu")


@pytest.mark.skipif("cpu" not in available_backends(), reason="no compiled CPU kernels here")
def test_a_backend_without_a_kernel_for_the_op_names_those_with_one() -> None:
    op = Op("example")
    op.implement("reference", IDENTITY)
    with pytest.raises(RuntimeError, match=r"no kernel for this op yet \(which has: 'reference'\)"):
        op.choose("cpu", draws.rand(2))


def test_auto_logs_each_reason_once(caplog: pytest.LogCaptureFixture) -> None:
    op = Op("example")
    op.implement("reference", IDENTITY)
    with caplog.at_level(logging.DEBUG, "mghf_fast"):
        op.choose("auto", draws.rand(2))
        op.choose("auto", draws.rand(2))
    messages = [r.message for r in caplog.records if r.name == "mghf_fast"]
    assert len(messages) == len(set(messages)) == 3
    assert any(m.startswith("cuda cannot run example: ") for m in messages)


def test_unknown_names_are_refused() -> None:
    for attempt in (lambda: use_backend("gpu"), lambda: current_backend("gpu")):
        with pytest.raises(ValueError, match="'gpu'; allowed are 'auto', 'cuda', 'triton'"):
            attempt()


@pytest.mark.parametrize(("value", "ok"), [("reference", True), ("fast", False)])
def test_environment_variable(value: str, ok: bool) -> None:
    code = "import mghf_fast.backends as b; print(b.current_backend())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"MGHF_BACKEND": value, "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    if ok:
        assert run.stdout.strip() == value
    else:
        assert run.returncode and "environment variable MGHF_BACKEND is 'fast'" in run.stderr


def test_a_compiled_function_follows_the_backend() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: functional.gram_matrix(x), fullgraph=True, backend="aot_eager"
    )
    x = draws.rand(1, 2, 4, 4)
    compiled(x)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="cannot run gram"):
        compiled(x)
    compiled(x)


def test_one_context_manager_may_nest() -> None:
    outer = use_backend("reference")
    with outer, use_backend("cpu"):
        with outer:
            assert current_backend() == "reference"
        assert current_backend() == "cpu"


@pytest.mark.skipif("cpu" not in available_backends(), reason="no compiled CPU kernels here")
def test_the_cpu_kernels_refuse_tensors_of_another_device() -> None:
    with pytest.raises(RuntimeError, match="it runs on cpu tensors here, and one is on meta"):
        OPS["gram"].choose("cpu", torch.empty(1, 2, 4, 4, device="meta"))


def test_auto_leaves_the_interpreter_of_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    op, x = Op("example"), draws.rand(2)
    for backend in ("reference", "triton"):
        op.implement(backend, IDENTITY)
    monkeypatch.setattr(_dispatch, "unavailable_reasons", dict)
    assert op.preferred(x) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert op.preferred(x) == "reference"
    assert op.choose("triton", x) is op.implementation("triton")


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((9, 0), None, None),
        ((8, 0), None, None),
        ((7, 5), None, r"need compute capability 8.0 .* and Some GPU has 7.5"),
        ((9, 4), "6.2", "made for NVIDIA GPUs"),
    ],
)
def test_which_gpus_the_triton_kernels_are_for(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    hip: str | None,
    reason: str | None,
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    backends._triton_lacks.cache_clear()
    found = backends._triton_lacks(torch.device("cuda", 0))
    backends._triton_lacks.cache_clear()
    assert found is None if reason is None else re.search(reason, found or "")


def test_an_old_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reasons = {}
    for version in ("3.4.0", "3.5.1", "3.10.0+git1"):
        monkeypatch.setattr(importlib.metadata, "version", lambda package, v=version: v)
        reasons[version] = backends._triton_unavailable_reason.__wrapped__()
    assert reasons == {
        "3.4.0": "its kernels need Triton 3.5 or newer, and 3.4 is installed",
        "3.5.1": None,
        "3.10.0+git1": None,
    }


ARCHITECTURES = ["8.0", "8.6", "9.0a", "10.0", "12.0+PTX"]


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 5), False), ((8, 0), True), ((8, 7), True), ((9, 0), True), ((9, 1), False),
     ((10, 3), True), ((11, 0), False), ((12, 1), True), ((13, 0), True)],
)  # fmt: skip
def test_which_gpus_the_cuda_kernels_are_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    facts = {"cuda": {"version": "13.0.88", "architectures": ARCHITECTURES}}
    monkeypatch.setattr(native, "build_facts", lambda library: facts)
    reason = native.cuda_lacks(capability)
    assert (reason is None) == runs
    if reason is not None:
        wanted = ".".join(map(str, capability))
        how = f": build them with MGHF_CUDA_ARCHS={wanted}" if capability >= (8, 0) else ""
        assert reason.endswith(f"this GPU has {wanted}{how}")


@pytest.mark.parametrize(
    ("torch_cuda", "reason"),
    [(None, "is built without CUDA"), ("12.8", "for CUDA 13, and this torch is for CUDA 12.8"),
     ("13.2", "no such file")],
)  # fmt: skip
def test_why_there_are_no_cuda_kernels(
    monkeypatch: pytest.MonkeyPatch, torch_cuda: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(native, "unavailable_reason", lambda: None)
    monkeypatch.setattr(native, "build_facts", lambda library: {"cuda": {"version": "13.0.88"}})
    monkeypatch.setenv("MGHF_CUDA_LIBRARY", "nowhere.so")
    assert reason in str(native.cuda_unavailable_reason.__wrapped__())


# ---- the dialect ----


def arguments_of(operator: str) -> list[str]:
    """The names of an operator's arguments, without the backend's."""
    names = [a.name for a in getattr(torch.ops.mghf_fast, operator).default._schema.arguments]
    # It is the last, or the precision of products is.
    precision = [names.pop()] if names[-1] == "precision" else []
    assert names.pop() == "backend"
    return names + precision


DIALECT = [(op.name, op, ("forward", "backward")) for op in OPS.values()]
DIALECT.append(("coupling_inverse", coupling.INVERSE, ("forward",)))


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(("name", "op", "functions"), DIALECT, ids=[name for name, *_ in DIALECT])
def test_every_backend_takes_the_operators_arguments(
    name: str, op: Op, functions: tuple[str, ...], which: str
) -> None:
    if which not in op._modules:
        pytest.skip(f"{name} has no kernel for {which}")
    if which == "triton":
        pytest.importorskip("triton")
    implementation = op.implementation(which)
    operators = {"forward": name, "backward": f"{name}_backward"}
    if name == "patches":
        added = list(inspect.signature(implementation.add_backward).parameters)
        backward = [a for a in arguments_of(operators["backward"]) if a != "need_weights"]
        assert added == ["grad_x", *backward]
    if name == "entropy":
        functions = ("forward",)
        with pytest.raises(NotImplementedError, match="no such gradient"):
            implementation.backward()
    for function in functions:
        taken = list(inspect.signature(getattr(implementation, function)).parameters)
        expected = arguments_of(operators[function])
        if (name, function) == ("content_style", "backward"):
            expected.append("into")
        assert taken == expected, function
    first = next(iter(inspect.signature(implementation.can_run).parameters.values()))
    assert first.kind == inspect.Parameter.VAR_POSITIONAL


def test_nothing_imports_the_triton_kernels_before_they_are_wanted() -> None:
    """Nor `import mghf_fast` Triton itself, which PyTorch imports at an operator's first call."""
    code = (
        "import sys, torch, mghf_fast; early = [m for m in sys.modules if m.startswith('triton')];"
        "mghf_fast.functional.gram_matrix(torch.rand(1, 2, 4, 4));"
        "sys.exit(bool(early) or any(m.startswith('mghf_fast.kernels') for m in sys.modules))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
