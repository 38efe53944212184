"""Trainers' packages, for the tests of mghf_fast.integrations.

    python -m trainers MODULE [ARGUMENT ...]      as ``python -m MODULE``, with torchvision

PyPI's torchvision is built for a torch with CUDA. With a CPU-only torch its operators do not load,
and its import then fails on the two that it registers fakes for; if they are declared beforehand,
only calling them fails.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch


def supply_torchvision() -> None:
    """Imports torchvision if it is installed, with its two operators declared if they cannot be
    loaded."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for op in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{op}", schema)
        importlib.import_module("torchvision")


def need(*packages: str) -> None:
    """Skips the test, or the file, unless every package is installed. If MGHF_TEST_TRAINERS is set,
    as before a merge, a missing one is a failure."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            reason = f"{package} is not installed (`make test` installs it)"
            if os.environ.get("MGHF_TEST_TRAINERS"):
                pytest.fail(reason)
            pytest.skip(reason, allow_module_level=True)


def run(words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python on ``words`` in ``folder``, with this folder and the package on its path."""
    here = Path(__file__).resolve().parent
    path = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=600,
    )


if __name__ == "__main__":
    supply_torchvision()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
