"""``mghf-fast pretrain``: its options."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..choices import ACTIVATIONS, SQUEEZES, STARTS, STEMS, SUBNETS
from .settings import (
    AMP,
    DEFAULTS,
    DEVICES,
    OBJECTIVES,
    PROCEDURAL,
    SHIPPED_NETWORK,
    TEACHERS,
    Settings,
    option,
)

_HELP: dict[str, str] = {
    "objective": "what the extractor learns: to tell classes apart (Algorithm 1), or a teacher's "
    "distances",
    "data": f"{PROCEDURAL!r}, the built-in pictures; or, for classes, a directory with a folder of "
    "pictures for each class, or tar files in webdataset's layout; for distances, directories of "
    "pictures at any depth",
    "out": "directory for checkpoint, weights and model card",
    "epochs": "passes over the data",
    "steps": "optimizer steps, instead of --epochs",
    "batch": "images per step, over all processes together; for distances, pairs",
    "size": "side of the training images, pixels",
    "learning_rate": "Adam's learning rate",
    "lr_decay": "factor of the learning rate",
    "lr_every": "steps between two decays",
    "lr_end": "the learning rate at the last step, as a fraction",
    "warm_up": "steps over which the learning rate rises",
    "weight_decay": "Adam's, L2",
    "channels": "feature maps of the extractor",
    "blocks": "invertible blocks",
    "stem": "of the extractor",
    "squeeze": "for a squeeze stem: image pixels per pixel of the features, along a side",
    "subnet": "of the blocks",
    "activation": "of the blocks",
    "clamp": "bound of the blocks' log scale; none: unbounded",
    "init": "weights that the extractor starts from",
    "stages": "widths of the CNN stages behind the extractor",
    "teacher": "network whose distances are learned",
    "networks": "super-resolution networks whose outputs pictures are compared with: safetensors "
    f"files of the demo's network, or {SHIPPED_NETWORK!r}",
    "gain": "the features' mean squared difference for a teacher's distance of 1",
    "hint": "weight of the fit to the teacher's features",
    "log_distance": "weight of the fit to the logarithm of its distances",
    "octave_guard": "weight of the penalty on unequal responses to octaves of detail",
    "noise_guard": "weight of the penalty on noise that costs less than blur",
    "inverse_guard": "weight of the penalty on blocks that are hard to invert",
    "blur_aversion": "weight of the penalty on the mean of candidates that is nearer to one of "
    "them than they are to each other",
    "seed": "of everything random",
    "epoch_images": "procedural pictures in an epoch",
    "held_out": "images that are never trained on; of files at most a fifth",
    "skip_limit": "number of unreadable pictures that are skipped, in all",
    "amp": "autocast; float16 with a gradient scaler, on GPUs",
    "device": "where it runs",
    "threads": "CPU threads of PyTorch",
    "workers": "processes that prepare images",
    "log_every": "steps between two entries of the curve",
    "evaluate_every": "steps between two evaluations on the held-out images",
    "checkpoint_every": "steps between two checkpoints",
    "resume": "continue from the checkpoint in --out, if there is one",
    "tensorboard": "write TensorBoard's event files too",
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "objective": OBJECTIVES, "stem": STEMS, "subnet": SUBNETS, "activation": ACTIVATIONS,
    "squeeze": SQUEEZES, "init": STARTS, "teacher": TEACHERS, "amp": AMP, "device": DEVICES,
}  # fmt: skip
_SEVERAL = ("data", "stages", "networks")


def clamp(word: str) -> float | None:
    """Parses ``--clamp``: a number, or "none"."""
    return None if word == "none" else float(word)


_TYPES: dict[str, Any] = {"out": Path, "clamp": clamp, "data": str, "networks": str}
_TYPES |= dict.fromkeys(
    (
        "learning_rate", "lr_decay", "lr_end", "weight_decay", "gain", "hint", "log_distance",
        "octave_guard", "noise_guard", "inverse_guard", "blur_aversion",
    ),
    float,
)  # fmt: skip


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _default(field: dataclasses.Field[Any]) -> str:
    """The default for the help text; each objective's if it depends on the objective."""
    if field.default is not None:
        return f" (default: {_words(field.default)})"
    own = {o: DEFAULTS[o][field.name] for o in OBJECTIVES if field.name in DEFAULTS[o]}
    if not own:
        return ""
    return f" ({'; '.join(f'{o}: {_words(value)}' for o, value in own.items())})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``mghf-fast pretrain``, one for each setting."""
    for field in dataclasses.fields(Settings):
        name, default = field.name, field.default
        if isinstance(default, bool):
            parser.add_argument(option(name), dest=name, action="store_true", help=_HELP[name])
            continue
        choices = _CHOICES.get(name)
        parser.add_argument(
            option(name),
            dest=name,
            type=type(choices[0]) if choices else _TYPES.get(name, int),
            choices=choices,
            nargs="+" if name in _SEVERAL else None,
            default=default,
            metavar=None
            if choices
            else {"out": "DIR", "data": "DATA", "networks": "FILE"}.get(name, "N"),
            help=_HELP[name] + _default(field).replace("%", "%%"),
        )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, FLOPs and an estimate of the time from a few steps; write nothing",
    )


def run(arguments: argparse.Namespace) -> int:
    """Trains or estimates; returns 0. A user's mistakes raise errors, which the command line
    reports."""
    values: dict[str, Any] = {
        field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)
    }
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    settings = Settings(**values)
    if arguments.dry_run:
        from .estimate import report

        print(report(settings))
        return 0
    from .card import CARD, WEIGHTS, export
    from .train import pretrain

    pretrain(settings, export, (WEIGHTS, CARD))
    return 0
