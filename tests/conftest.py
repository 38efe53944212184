"""Seeds, and the fixture `backend`: every backend that can run the test's op on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import emulated
import interpreter
import outcomes
import pytest
import torch

if importlib.util.find_spec("hypothesis") is None:  # a GPU image may lack it
    import without_hypothesis

    without_hypothesis.install(sys.modules)
else:
    from hypothesis import settings

    # Elsewhere hypothesis tries new examples on each run, but a merge must not depend on chance.
    settings.register_profile("ci", derandomize=True)
    if os.environ.get("CI"):
        settings.load_profile("ci")

from mghf_fast.backends import BACKENDS, triton_is_interpreted
from mghf_fast.ops import OPS

collect_ignore = ["toy_op"]  # runs in a copy of the repository: tests/test_toy_op.py


def pytest_addoption(parser: pytest.Parser) -> None:
    outcomes.pytest_addoption(parser)
    parser.addoption(
        "--device",
        default="cpu",
        help="where tensors are made; on 'cuda' only the tests of every backend and those of the "
        "GPU run",
    )
    parser.addoption(
        "--seeds",
        type=int,
        default=1,
        help="every test with so many seeds of its random numbers: what fails with one of them "
        "depends on luck",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Measurements of this machine's GPUs must not influence which backend a test uses.
    cache = tempfile.mkdtemp(prefix="mghf_fast-")
    os.environ["MGHF_CACHE"] = cache
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    outcomes.pytest_configure(config)
    device = config.getoption("--device")
    torch.set_default_device(device)
    if device != "cpu":
        as_float32_and_repeatable()
    if triton_is_interpreted():
        interpreter.hasten()
        interpreter.round_bfloat16()
        interpreter.cut_tf32()


def as_float32_and_repeatable() -> None:
    """Makes PyTorch's own kernels, which compute the reference on the device, use float32 and be
    deterministic. A nondeterministic one only warns here; test_gpu.py refuses it. Memory from
    `torch.empty` is filled with NaN, so that elements that a kernel does not write are noticed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)


def runs_on_a_device(item: pytest.Item) -> bool:
    """Whether a test is for every backend, for the Triton kernels or for the GPU."""
    return (
        item.get_closest_marker("gpu") is not None
        or "backend" in getattr(item, "fixturenames", ())
        or "triton" in item.name
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
    if config.getoption("--device") != "cpu":
        items[:] = [item for item in items if runs_on_a_device(item)]


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(getattr(request, "param", 0))


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    wanted = emulated.is_for(request.node)
    with emulated.installed() if wanted else contextlib.nullcontext():
        yield


def runnable_backends(op: str, probe: torch.Tensor) -> list[str]:
    on_cpu = probe.device.type == "cpu"
    with emulated.installed() if on_cpu else contextlib.nullcontext():
        return [backend for backend in BACKENDS if OPS[op].why_not(backend, probe) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises `backend` in test_<op>.py by the backends of <op> that run on this machine, and
    every test by the seeds."""
    if (seeds := metafunc.config.getoption("--seeds")) > 1:
        metafunc.parametrize("_seed", range(seeds), indirect=True, ids="seed{}".format)
    if "backend" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
        metafunc.parametrize("backend", runnable_backends(op, torch.zeros(1, 2, 2)))
