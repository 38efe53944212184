"""The run: photographs, a start network, two fine-tunings, measurements."""

from __future__ import annotations

import copy
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch
from torch import Tensor

import mghf_fast

from ... import weights
from ..machine import cpu_model
from ..pixels import Pixels, luminance
from . import losses, objectives
from .metrics import Judge, Quality, measure, radial_power
from .metrics import judge as find_judge
from .network import START_NAME, CompactEDSR, shipped_start, upsample_bicubic
from .photographs import Collection, bundled, from_directory
from .settings import DemoSettings, random_source
from .train import HeldOut, Training, batches, hold_out, super_resolve, train

PRETRAIN_RATE = 1e-3
FINE_TUNE_RATE = 5e-4

BICUBIC, START, L1, MGHF = "bicubic", "start", "L1", "MGHF-c"
GROUND_TRUTH = "ground truth"
METHODS = (BICUBIC, START, L1, MGHF)


@dataclass
class Setup:
    """The data and start network that all trainings of a run share."""

    settings: DemoSettings
    collection: Collection
    held_out: list[HeldOut]
    start: CompactEDSR
    pretraining: Training | None
    """The training of ``start``; None if it is the shipped network."""
    judge: Judge | None

    def crops(self, purpose: str = "fine-tuning") -> Iterator[tuple[Tensor, Tensor]]:
        """The batches for ``purpose``, the same on every call."""
        source = random_source(self.settings.seed, purpose)
        photographs = self.collection.training
        return batches(photographs, self.settings.batch, self.settings.patch, source)

    def measure(self, pictures: list[Pixels]) -> list[Quality]:
        """Quality of a super-resolved picture of each held-out photograph."""
        return [
            measure(sr, h.gt, self.judge) for sr, h in zip(pictures, self.held_out, strict=True)
        ]

    def describe_start(self) -> dict[str, str]:
        """Where ``start`` comes from, for the results."""
        if self.pretraining is not None:
            return {"from": f"scratch, {self.settings.pretrain_steps} steps on L1"}
        return {"from": START_NAME, "sha256": weights.OTHER_SHA256[START_NAME]}


@dataclass
class Result:
    """The results of a run."""

    setup: Setup
    gradient_ratio: float
    """Length of the weighted MGHF-c's gradient on the super-resolved picture divided by that of
    L1's, on the first batches."""
    trainings: dict[str, Training]
    """Method (L1, MGHF-c) -> training."""
    pictures: dict[str, list[Pixels]]
    """Method -> one picture per held-out photograph."""
    quality: dict[str, list[Quality]]
    """Method -> one quality per held-out photograph."""
    spectra: dict[str, list[float]]
    """Method, and "ground truth" -> power in each ring, mean over the held-out photographs;
    "frequency" -> the rings' centres in cycles per pixel."""
    machine: dict[str, str]
    seconds: float

    @property
    def settings(self) -> DemoSettings:
        return self.setup.settings

    @property
    def collection(self) -> Collection:
        return self.setup.collection

    @property
    def held_out(self) -> list[HeldOut]:
        return self.setup.held_out

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.setup.start.parameters())

    @property
    def judged(self) -> bool:
        """Whether ST-LPIPS could be measured."""
        return self.setup.judge is not None

    def mean(self, method: str) -> Quality:
        """The mean over the held-out photographs."""
        return Quality.mean(self.quality[method])


def describe_machine() -> dict[str, str]:
    """Processor, threads, versions: what the numbers may depend on."""
    machine = {
        "processor": f"{cpu_model()}, {os.cpu_count()} logical cores",
        "system": f"{platform.system()} {platform.machine()}",
        "PyTorch threads": str(torch.get_num_threads()),
        "mghf_fast backends": ", ".join(mghf_fast.available_backends()),
        "Python": platform.python_version(),
    }
    packages = ("mghf_fast", "torch", "numpy", "scikit-image", "scikit-learn", "pillow")
    for package in (*packages, "stlpips_pytorch"):
        try:
            machine[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            machine[package] = "not installed"
    return machine


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def describe_collection(collection: Collection) -> list[str]:
    """A few lines on which files are used and which are not."""
    held_out = ", ".join(p.name for p in collection.held_out)
    lines = [f"{len(collection.training)} photographs to train on, held out: {held_out}"]
    if collection.skipped:
        lines.append(f"{len(collection.skipped)} files skipped:")
        lines += [f"  {name}: {reason}" for name, reason in collection.skipped[:10]]
        if len(collection.skipped) > 10:
            lines.append(f"  and {len(collection.skipped) - 10} more (all of them in metrics.json)")
    if collection.unread:
        lines.append(f"{collection.unread} more files left alone: there are enough pictures")
    return lines


def _spectra(pictures: dict[str, list[Pixels]]) -> dict[str, list[float]]:
    spectra: dict[str, list[float]] = {}
    for method, each in pictures.items():
        rings = [radial_power(luminance(pixels)) for pixels in each]
        spectra["frequency"] = rings[0][0].tolist()
        spectra[method] = np.mean([power for _, power in rings], axis=0).tolist()
    return spectra


@contextmanager
def threads_of(settings: DemoSettings) -> Iterator[None]:
    """Sets PyTorch's number of threads for the run and restores it afterwards."""
    before = torch.get_num_threads()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def set_up(settings: DemoSettings) -> Setup:
    """Reads the photographs, and loads or trains the start network.

    Raises:
        DemoError: too few usable pictures, or a loss that is not finite.
    """
    if settings.images is None:
        collection = bundled()
    else:
        collection = from_directory(settings.images, settings.seed, exclude=settings.out)
    for line in describe_collection(collection):
        _say(line)
    held_out = hold_out(collection.held_out, settings.seed)
    if not settings.from_scratch:
        return Setup(settings, collection, held_out, shipped_start(), None, find_judge())
    start = CompactEDSR(torch.Generator().manual_seed(settings.seed))
    setup = Setup(settings, collection, held_out, start, None, find_judge())
    setup.pretraining = train(
        start,
        setup.crops("pre-training"),
        losses.l1,
        label="pre-training",
        steps=settings.pretrain_steps,
        learning_rate=PRETRAIN_RATE,
    )
    return setup


def gradient_ratio(setup: Setup) -> float:
    """Length of the gradient of the demo's weighted MGHF-c divided by that of L1's."""
    mghf = objectives.mghf(losses.EXTRACTOR, "c", losses.PRESET)
    lengths = [objectives.gradient_length(o, setup.start, setup.crops()) for o in (mghf, losses.l1)]
    return losses.MGHF_WEIGHT * lengths[0] / max(lengths[1], 1e-30)


def compare(settings: DemoSettings) -> Result:
    """Trains and measures; writes no file.

    Raises:
        DemoError: too few usable pictures, or a loss that is not finite.
    """
    began = time.perf_counter()
    with threads_of(settings):
        setup = set_up(settings)
        networks: dict[str, Callable[[Tensor], Tensor]] = {
            BICUBIC: upsample_bicubic,
            START: setup.start,
        }
        trainings: dict[str, Training] = {}
        ratio = gradient_ratio(setup)
        with_mghf = losses.l1_with_mghf()
        for method, objective in ((L1, losses.l1), (MGHF, with_mghf)):
            network = copy.deepcopy(setup.start)
            trainings[method] = train(
                network,
                setup.crops(),  # the same batches both times
                objective,
                label=method,
                steps=settings.steps,
                learning_rate=FINE_TUNE_RATE,
                held_out=setup.held_out,
                probe=with_mghf,
                checkpoints=settings.checkpoints,
                judge=setup.judge,
            )
            networks[method] = network

        pictures = {m: [super_resolve(networks[m], h.lr) for h in setup.held_out] for m in METHODS}
        return Result(
            setup=setup,
            gradient_ratio=ratio,
            trainings=trainings,
            pictures=pictures,
            quality={method: setup.measure(pictures[method]) for method in METHODS},
            spectra=_spectra({**pictures, GROUND_TRUTH: [h.gt for h in setup.held_out]}),
            machine=describe_machine(),
            seconds=time.perf_counter() - began,
        )
