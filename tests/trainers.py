"""Trainers' packages, and stand-ins for parts of those that are not on PyPI, for the tests of
mghf_fast.integrations.

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
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn


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


class Registry:
    """Both trainers' registry: classes by name, which only traiNNer-redux lower-cases."""

    def __init__(self, lower: bool) -> None:
        self.found: dict[str, Callable[..., nn.Module]] = {}
        self.lower = lower

    def register(self) -> Callable[[type], type]:
        def enter(cls: type) -> type:
            name = cls.__name__.lower() if self.lower else cls.__name__
            assert name not in self.found
            self.found[name] = cls
            return cls

        return enter

    def build(self, options: Mapping[str, Any]) -> nn.Module:
        """A loss from its entry in the options, as both trainers' ``build_loss`` makes it."""
        more = dict(options)
        return self.found[more.pop("type")](**more)


@contextmanager
def stand_in(
    package: str, adapter: str, lower: bool, folder: Path | None = None
) -> Iterator[Registry]:
    """``package.utils.registry`` with a registry in which our adapter registers itself: because it
    is imported here, or, with ``folder``, by the files that the trainer in that folder imports."""
    registry = Registry(lower)
    names = [package, f"{package}.utils", f"{package}.utils.registry"]
    ours = f"mghf_fast.integrations.{adapter}"
    before = {name: sys.modules.pop(name, None) for name in [*names, ours]}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[names[-1]].LOSS_REGISTRY = registry  # type: ignore[attr-defined]
    try:
        if folder is None:
            importlib.import_module(ours)
        else:
            for path in (folder / package / "losses").glob("*_loss.py"):
                runpy.run_path(str(path))
        yield registry
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


KAPPA = 2.0


class Diffusion:
    """ResShift's scaling of latents by a state's deviation at each step."""

    num_timesteps = 4
    etas = torch.tensor([0.01, 0.1, 0.5, 0.99])

    def _scale_input(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (x.shape[0],) and t.dtype == torch.int64
        return x / (self.etas[t] * KAPPA**2 + 1).sqrt().view(-1, 1, 1, 1)


class Network(nn.Module):
    """A network that depends on the state, the step and the low resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, lq: Tensor) -> Tensor:
        return self.conv(torch.cat([x, lq], 1)) * (1 + t.view(-1, 1, 1, 1)).float().sqrt()


if __name__ == "__main__":
    supply_torchvision()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
