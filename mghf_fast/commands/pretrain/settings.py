"""The settings of a pretraining, and their checks."""

from __future__ import annotations

import dataclasses
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..choices import ACTIVATIONS, SQUEEZES, STARTS, STEMS, SUBNETS

PROCEDURAL = "procedural"
"""The name of the built-in source in ``--data``."""

OBJECTIVES = ("classes", "distances")
TEACHERS = ("stlpips-vgg", "efficientnet-lite0")
AMP = ("off", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")

SHIPPED_NETWORK = "demo-start"
"""The name of the shipped super-resolution network in ``--networks``."""

OWN: Any = None
"""The value of a setting that was not given and takes its objective's default."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "classes": {
        "epochs": 20,
        "batch": 32,
        "learning_rate": 5e-4,
        "lr_decay": 0.95,
        "lr_every": 5000,
        "weight_decay": 0.0,
        "blocks": 1,
        "stem": "conv",
        "stages": (64, 128),
        "held_out": 1024,
        "amp": "off",
    },
    "distances": {
        "steps": 10_000,
        "batch": 16,
        "learning_rate": 2e-3,
        "lr_end": 0.02,
        "warm_up": 50,
        "weight_decay": 0.0,
        "blocks": 3,
        "stem": "squeeze",
        "held_out": 256,
        "teacher": "stlpips-vgg",
        "networks": (SHIPPED_NETWORK,),
        "gain": 2.0,
        "hint": 1.0,
        "log_distance": 0.3,
        "octave_guard": 0.1,
        "noise_guard": 0.1,
        "inverse_guard": 0.1,
        "blur_aversion": 0.0,
    },
}
"""Each objective's defaults. A setting that only the other objective has may not be given."""
_EITHER_LENGTH = ("steps", "epochs")  # both objectives take both, if given


class PretrainError(ValueError):
    """The pretraining cannot continue; the message is one line for the user."""


@dataclass(frozen=True)
class Settings:
    """The settings of one pretraining. Those that are not given take the objective's defaults,
    which for ``"classes"`` are those of the papers' Algorithm 1.

    Args:
        objective: ``"classes"``: the extractor is trained as the first part of a classifier;
            ``"distances"``: its features' distances are trained to equal a teacher's.
        data: ``("procedural",)``; or, for classes, one directory with a folder of pictures for each
            class, or tar files in the layout of webdataset; for distances, directories of pictures.
        out: directory for all results, made if missing.
        epochs: passes over the data; ignored if ``steps`` is given.
        steps: optimizer steps in all.
        batch: images (for distances, pairs) per step, over all processes together.
        size: side of the square training images, pixels.
        learning_rate: Adam's.
        lr_decay, lr_every: for classes the rate is multiplied by ``lr_decay`` after every
            ``lr_every`` steps.
        lr_end, warm_up: for distances the rate rises over ``warm_up`` steps, and falls to the
            fraction ``lr_end`` at the last one along a cosine.
        weight_decay: Adam's, as L2 penalty.
        channels, blocks, stem, squeeze, subnet, activation, clamp, init: the extractor's.
        stages: widths of the CNN stages behind it, each of which halves the resolution.
        teacher: network whose distances are learned: ``"stlpips-vgg"`` or ``"efficientnet-lite0"``.
        networks: safetensors files of the demo's ``CompactEDSR``, whose outputs are among the
            distorted pictures; ``"demo-start"`` is the shipped one.
        gain: the features' mean squared difference for a teacher's distance of 1.
        hint, log_distance, octave_guard, noise_guard, inverse_guard, blur_aversion: weights of the
            terms of the loss (:mod:`mghf_fast.commands.pretrain.distances`).
        seed: seed of the weights, the data's order, the procedural pictures and the distortions.
        epoch_images: procedural pictures per epoch.
        held_out: images that are never trained on, for the accuracy; at most a fifth of all files.
        skip_limit: maximum number of unreadable pictures, in all, before the pretraining ends.
        amp: ``"bfloat16"`` or ``"float16"`` for autocast (the extractor itself stays in float32).
        device, threads, workers: device, CPU threads, and processes that prepare images (0: none).
        log_every, evaluate_every, checkpoint_every: intervals in steps.
        resume: continue from the checkpoint in ``out``, if there is one.
        tensorboard: write its event files below ``out``.
    """

    objective: str = "classes"
    data: tuple[str, ...] = (PROCEDURAL,)
    out: Path = Path("pretrain_output")
    epochs: int = OWN
    steps: int = OWN
    batch: int = OWN
    size: int = 64
    learning_rate: float = OWN
    lr_decay: float = OWN
    lr_every: int = OWN
    lr_end: float = OWN
    warm_up: int = OWN
    weight_decay: float = OWN
    channels: int = 128
    blocks: int = OWN
    stem: str = OWN
    squeeze: int = 4
    subnet: str = "bottleneck"
    activation: str = "relu6"
    clamp: float | None = 2.0
    init: str = "curved"
    stages: tuple[int, ...] = OWN
    teacher: str = OWN
    networks: tuple[str, ...] = OWN
    gain: float = OWN
    hint: float = OWN
    log_distance: float = OWN
    octave_guard: float = OWN
    noise_guard: float = OWN
    inverse_guard: float = OWN
    blur_aversion: float = OWN
    seed: int = 0
    epoch_images: int = 50_000
    held_out: int = OWN
    skip_limit: int = 100
    amp: str = OWN
    device: str = "auto"
    threads: int | None = None
    workers: int = 1
    log_every: int = 50
    evaluate_every: int = 1000
    checkpoint_every: int = 500
    resume: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _check_choice("objective", self.objective, OBJECTIVES)
        self._take_defaults()
        for name, least in (
            ("epochs", 1), ("steps", 1), ("batch", 2), ("size", 16), ("lr_every", 1),
            ("channels", 2), ("blocks", 1), ("seed", 0), ("epoch_images", 1), ("held_out", 1),
            ("skip_limit", 0), ("threads", 1), ("workers", 0), ("log_every", 1),
            ("evaluate_every", 1), ("checkpoint_every", 1), ("warm_up", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise PretrainError(f"{option(name)} is {value}; it must be at least {least}")
        if self.seed >= 2**63:
            raise PretrainError(f"--seed is {self.seed}; it must be below 2^63")
        if self.channels % 2:
            raise PretrainError(f"--channels is {self.channels}; it must be even")
        for name in ("learning_rate", "lr_decay", "clamp", "gain"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise PretrainError(f"{option(name)} is {value}; it must be finite and above 0")
        for name in (
            "weight_decay", "hint", "log_distance", "octave_guard", "noise_guard", "inverse_guard",
            "blur_aversion",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise PretrainError(f"{option(name)} is {value}; it must be 0 or more")
        if self.lr_end is not None and not 0 <= self.lr_end <= 1:
            raise PretrainError(f"--lr-end is {self.lr_end}; it must be from 0 to 1")
        if self.stages is not None and any(width < 1 for width in self.stages):
            raise PretrainError(f"--stages has a width of {min(self.stages)}; 1 is the least")
        for name, allowed in (
            ("stem", STEMS), ("subnet", SUBNETS), ("activation", ACTIVATIONS), ("init", STARTS),
            ("squeeze", SQUEEZES), ("teacher", TEACHERS), ("amp", AMP), ("device", DEVICES),
        ):  # fmt: skip
            _check_choice(name, getattr(self, name), allowed)
        if self.stem == "squeeze":
            if self.channels < (least := 3 * self.squeeze**2):
                raise PretrainError(
                    f"--channels is {self.channels}; with --squeeze {self.squeeze} it must be at "
                    f"least {least}"
                )
            if self.size % self.squeeze:
                raise PretrainError(
                    f"--size is {self.size}; it must be a multiple of --squeeze {self.squeeze}"
                )
        if not self.data:
            raise PretrainError("--data names nothing")
        if self.objective == "distances" and (self.size < 64 or self.size % 16):
            raise PretrainError(
                f"--size is {self.size}; for --objective distances it must be a multiple of 16, "
                "and at least 64, or a teacher's last layers see too little"
            )

    def _take_defaults(self) -> None:
        own = DEFAULTS[self.objective]
        for name, value in own.items():
            if getattr(self, name) is None and not (name == "steps" and self.epochs is not None):
                object.__setattr__(self, name, value)
        for objective in OBJECTIVES:
            for name in DEFAULTS[objective]:
                if name not in (*own, *_EITHER_LENGTH) and getattr(self, name) is not None:
                    raise PretrainError(
                        f"{option(name)} belongs to --objective {objective}, and the objective is "
                        f"{self.objective}"
                    )

    def extractor(self) -> dict[str, Any]:
        """The arguments of :class:`DetailFeatureExtractor`."""
        names = (
            "channels", "blocks", "stem", "subnet", "activation", "clamp", "squeeze", "init",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def identity(self) -> dict[str, Any]:
        """The settings that determine what is learned, which must agree on resuming and on all
        ranks: not those of device, duration and reporting, nor the other objective's.

        For distances the duration must agree too, since each step's rate depends on the number of
        all: that number, which may follow from the data, is added to these settings by
        :func:`~mghf_fast.commands.pretrain.train.configuration`."""
        free = {
            "data", "out", "epochs", "steps", "device", "threads", "workers", "log_every",
            "evaluate_every", "checkpoint_every", "resume", "tensorboard", "skip_limit",
            "epoch_images", "held_out",
        }  # fmt: skip
        if self.stem != "squeeze":
            free.add("squeeze")
        free |= {name for names in DEFAULTS.values() for name in names} - {
            *DEFAULTS[self.objective]
        }
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
            default = DEFAULTS[self.objective].get(field.name, field.default)
            if value == default and field.name not in ("data", "out", "seed"):
                continue
            if field.name == "resume":
                continue
            if value is None:
                if field.name == "clamp":
                    words += [option("clamp"), "none"]
                continue
            words.append(option(field.name))
            if isinstance(value, tuple):
                words += [str(v) for v in value]
            elif not isinstance(value, bool):
                words.append(str(value))
        return shlex.join(words)


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value is not None and value not in allowed:
        told = ", ".join(map(str, allowed))
        raise PretrainError(f"{option(name)} is {value!r}; allowed: {told}")


def option(field: str) -> str:
    """The option that sets a field, ``"learning_rate"`` -> ``"--lr"``."""
    return "--lr" if field == "learning_rate" else "--" + field.replace("_", "-")
