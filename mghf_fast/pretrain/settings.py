"""What a pretraining can be told, and how a bad setting is refused."""

from __future__ import annotations

import dataclasses
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..nn.detail_feature_extractor import STEMS
from ..reference.coupling import ACTIVATIONS, SUBNETS

PROCEDURAL = "procedural"
"""The name of the built-in source in ``--data``."""

AMP = ("off", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


class PretrainError(ValueError):
    """The pretraining cannot go on; the message is one line written for the user."""


@dataclass(frozen=True)
class Settings:
    """The settings of one pretraining. The defaults are those of the papers' Algorithm 1.

    Args:
        data: ``("procedural",)``; or one directory with a folder of pictures for each class; or tar
            files in the layout of webdataset.
        out: directory of everything that is written, made if missing.
        epochs: passes over the data; ``steps``, if given, takes their place.
        steps: optimizer steps in all.
        batch: images a step, over all processes together.
        size: side of the square training images, pixels.
        learning_rate, lr_decay, lr_every: Adam's rate is multiplied by ``lr_decay`` after every
            ``lr_every`` steps.
        weight_decay: of Adam, L2.
        channels, blocks, stem, subnet, activation, clamp: of the extractor.
        stages: widths of the CNN stages behind it, each of which halves the resolution.
        seed: of the weights, of the data's order and of the procedural pictures.
        epoch_images: procedural pictures in what counts as an epoch.
        held_out: images that are never trained on, for the accuracy; of files, at most a fifth.
        skip_limit: pictures that may be unreadable, in all, before the pretraining ends.
        amp: ``"bfloat16"`` or ``"float16"`` for autocast (the extractor itself stays in float32).
        device, threads, workers: where it runs; processes that prepare images (0: none).
        log_every, evaluate_every, checkpoint_every: steps.
        resume: go on from the checkpoint in ``out``, if there is one.
        tensorboard: write its event files below ``out``.
    """

    data: tuple[str, ...] = (PROCEDURAL,)
    out: Path = Path("pretrain_output")
    epochs: int = 20
    steps: int | None = None
    batch: int = 32
    size: int = 64
    learning_rate: float = 5e-4
    lr_decay: float = 0.95
    lr_every: int = 5000
    weight_decay: float = 0.0
    channels: int = 128
    blocks: int = 1
    stem: str = "conv"
    subnet: str = "bottleneck"
    activation: str = "relu6"
    clamp: float | None = None
    stages: tuple[int, ...] = (64, 128)
    seed: int = 0
    epoch_images: int = 50_000
    held_out: int = 1024
    skip_limit: int = 100
    amp: str = "off"
    device: str = "auto"
    threads: int | None = None
    workers: int = 1
    log_every: int = 50
    evaluate_every: int = 1000
    checkpoint_every: int = 500
    resume: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1), ("steps", 1), ("batch", 2), ("size", 16), ("lr_every", 1),
            ("channels", 2), ("blocks", 1), ("seed", 0), ("epoch_images", 1), ("held_out", 1),
            ("skip_limit", 0), ("threads", 1), ("workers", 0), ("log_every", 1),
            ("evaluate_every", 1), ("checkpoint_every", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise PretrainError(f"{option(name)} is {value}; it must be at least {least}")
        if self.seed >= 2**63:
            raise PretrainError(f"--seed is {self.seed}; it must be below 2^63")
        if self.channels % 2:
            raise PretrainError(f"--channels is {self.channels}; it must be even")
        for name in ("learning_rate", "lr_decay", "clamp"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise PretrainError(f"{option(name)} is {value}; it must be finite and above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise PretrainError(f"--weight-decay is {self.weight_decay}; it must be 0 or more")
        if any(width < 1 for width in self.stages):
            raise PretrainError(f"--stages has a width of {min(self.stages)}; 1 is the least")
        for name, allowed in (
            ("stem", STEMS), ("subnet", SUBNETS), ("activation", ACTIVATIONS), ("amp", AMP),
            ("device", DEVICES),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in allowed:
                raise PretrainError(f"{option(name)} is {value!r}; allowed: {', '.join(allowed)}")
        if not self.data:
            raise PretrainError("--data names nothing")

    def extractor(self) -> dict[str, Any]:
        """The arguments of :class:`DetailFeatureExtractor`."""
        names = ("channels", "blocks", "stem", "subnet", "activation", "clamp")
        return {name: getattr(self, name) for name in names}

    def identity(self) -> dict[str, Any]:
        """Whatever decides what is learned, and must be the same when a checkpoint goes on and on
        every rank: all but where it runs, how long, and how often it tells."""
        free = {
            "data", "out", "epochs", "steps", "device", "threads", "workers", "log_every",
            "evaluate_every", "checkpoint_every", "resume", "tensorboard", "skip_limit",
            "epoch_images", "held_out",
        }  # fmt: skip
        values = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if name not in free
        }

    def command(self) -> str:
        """The command line that repeats this run."""
        words = ["mghf-fast", "pretrain"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default and field.name not in ("data", "out", "seed"):
                continue
            if field.name == "resume" or value is None:
                continue
            words.append(option(field.name))
            if isinstance(value, tuple):
                words += [str(v) for v in value]
            elif not isinstance(value, bool):
                words.append(str(value))
        return shlex.join(words)


def option(field: str) -> str:
    """The option that sets a field, ``"learning_rate"`` -> ``"--lr"``."""
    return "--lr" if field == "learning_rate" else "--" + field.replace("_", "-")
