"""The run: photographs, pre-training, two fine-tunings, measurements."""

from __future__ import annotations

import copy
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch
from torch import Tensor

import mghf_fast

from . import losses
from .metrics import Quality, luminance, measure, radial_power
from .network import CompactEDSR, upsample_bicubic
from .photographs import Collection, Pixels, bundled, from_directory
from .settings import DemoSettings, random_source
from .train import HeldOut, Training, batches, hold_out, super_resolve, train

PRETRAIN_RATE = 1e-3
FINE_TUNE_RATE = 5e-4

BICUBIC, START, L1, MGHF = "bicubic", "start", "L1", "MGHF-c"
GROUND_TRUTH = "ground truth"
METHODS = (BICUBIC, START, L1, MGHF)


@dataclass
class Result:
    """Everything a run found out."""

    settings: DemoSettings
    collection: Collection
    held_out: list[HeldOut]
    pretraining: Training
    trainings: dict[str, Training]
    """By method: L1 and MGHF-c."""
    pictures: dict[str, list[Pixels]]
    """By method, one for each held-out photograph."""
    quality: dict[str, list[Quality]]
    """By method, one for each held-out photograph."""
    spectra: dict[str, list[float]]
    """By method and for "ground truth": power in each ring, mean over the held-out photographs;
    "frequency" holds the rings' centres in cycles a pixel."""
    parameters: int
    machine: dict[str, str]
    seconds: float

    def mean(self, method: str) -> Quality:
        """The mean over the held-out photographs."""
        return Quality.mean(self.quality[method])


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_machine() -> dict[str, str]:
    """Processor, threads, versions: what the numbers may depend on."""
    machine = {
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "system": f"{platform.system()} {platform.machine()}",
        "PyTorch threads": str(torch.get_num_threads()),
        "mghf_fast backends": ", ".join(mghf_fast.available_backends()),
        "Python": platform.python_version(),
    }
    for package in ("mghf_fast", "torch", "numpy", "scikit-image", "scikit-learn", "pillow"):
        try:
            machine[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            machine[package] = "not installed"
    return machine


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def describe_collection(collection: Collection) -> list[str]:
    """What is used and what is not, in a few lines."""
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


def compare(settings: DemoSettings) -> Result:
    """Trains and measures; writes no file.

    Raises:
        DemoError: too few usable pictures, or a loss that is no finite number.
    """
    began = time.perf_counter()
    threads_before = torch.get_num_threads()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        return _compare(settings, began)
    finally:
        torch.set_num_threads(threads_before)


def _compare(settings: DemoSettings, began: float) -> Result:
    if settings.images is None:
        collection = bundled()
    else:
        collection = from_directory(settings.images, settings.seed, exclude=settings.out)
    for line in describe_collection(collection):
        _say(line)
    held_out = hold_out(collection.held_out, settings.seed)

    def crops(purpose: str) -> Iterator[tuple[Tensor, Tensor]]:
        source = random_source(settings.seed, purpose)
        return batches(collection.training, settings.batch, settings.patch, source)

    generator = torch.Generator().manual_seed(settings.seed)
    start = CompactEDSR(generator)
    pretraining = train(
        start,
        crops("pre-training"),
        losses.l1,
        label="pre-training",
        steps=settings.pretrain_steps,
        learning_rate=PRETRAIN_RATE,
    )

    networks: dict[str, Callable[[Tensor], Tensor]] = {BICUBIC: upsample_bicubic, START: start}
    trainings: dict[str, Training] = {}
    with_mghf = losses.l1_with_mghf()
    for method, objective in ((L1, losses.l1), (MGHF, with_mghf)):
        network = copy.deepcopy(start)
        trainings[method] = train(
            network,
            crops("fine-tuning"),  # the same batches both times
            objective,
            label=method,
            steps=settings.steps,
            learning_rate=FINE_TUNE_RATE,
            held_out=held_out,
            probe=with_mghf,
            checkpoints=settings.checkpoints,
        )
        networks[method] = network

    pictures = {m: [super_resolve(networks[m], h.lr) for h in held_out] for m in METHODS}
    quality = {
        m: [measure(sr, h.gt) for sr, h in zip(pictures[m], held_out, strict=True)] for m in METHODS
    }
    return Result(
        spectra=_spectra({**pictures, GROUND_TRUTH: [h.gt for h in held_out]}),
        settings=settings,
        collection=collection,
        held_out=held_out,
        pretraining=pretraining,
        trainings=trainings,
        pictures=pictures,
        quality=quality,
        parameters=sum(p.numel() for p in start.parameters()),
        machine=describe_machine(),
        seconds=time.perf_counter() - began,
    )
