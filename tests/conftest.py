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
