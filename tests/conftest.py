"""Seeds, and the parameter `backend` of a test: every backend that can run the test's op here."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from mghf_fast.backends import BACKENDS
from mghf_fast.ops import OPS

# Everywhere else hypothesis looks for new examples on each run; a merge must not depend on luck.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="where tensors are made; on 'cuda' only the tests of every backend and those of the "
        "GPU run",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_default_device(config.getoption("--device"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
    if config.getoption("--device") != "cpu":
        items[:] = [
            item
            for item in items
            if item.get_closest_marker("gpu") or "backend" in getattr(item, "fixturenames", ())
        ]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` in test_<op>.py runs over the backends of <op> that this machine has."""
    if "backend" in metafunc.fixturenames:
        op = OPS[metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")]
        probe = torch.zeros(1, 2, 2)
        runnable = [b for b in BACKENDS if op.why_not(b, probe) is None]
        metafunc.parametrize("backend", runnable)
