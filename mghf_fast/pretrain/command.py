"""``mghf-fast pretrain``: its options."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..nn.detail_feature_extractor import STEMS
from ..reference.coupling import ACTIVATIONS, SUBNETS
from .settings import AMP, DEVICES, PROCEDURAL, Settings, option

_HELP: dict[str, str] = {
    "data": f"{PROCEDURAL!r}, the built-in pictures; or a directory with a folder of pictures for "
    "each class; or tar files in webdataset's layout",
    "out": "where checkpoint, weights and model card go",
    "epochs": "passes over the data",
    "steps": "optimizer steps, instead of --epochs",
    "batch": "images a step, over all processes together",
    "size": "side of the training images, pixels",
    "learning_rate": "Adam's learning rate",
    "lr_decay": "factor of the learning rate",
    "lr_every": "steps between two decays",
    "weight_decay": "Adam's, L2",
    "channels": "feature maps of the extractor",
    "blocks": "invertible blocks",
    "stem": "of the extractor",
    "subnet": "of the blocks",
    "activation": "of the blocks",
    "clamp": "bound of the blocks' log scale",
    "stages": "widths of the CNN stages behind the extractor",
    "seed": "of everything random",
    "epoch_images": "procedural pictures in an epoch",
    "held_out": "images that are never trained on; of files at most a fifth",
    "skip_limit": "unreadable pictures that are passed over, in all",
    "amp": "autocast; float16 with a gradient scaler, on GPUs",
    "device": "where it runs",
    "threads": "CPU threads of PyTorch",
    "workers": "processes that prepare images",
    "log_every": "steps between two entries of the curve",
    "evaluate_every": "steps between two looks at the held-out images",
    "checkpoint_every": "steps between two checkpoints",
    "resume": "go on from the checkpoint in --out, if there is one",
    "tensorboard": "write TensorBoard's event files too",
}
_CHOICES = {
    "stem": STEMS, "subnet": SUBNETS, "activation": ACTIVATIONS, "amp": AMP, "device": DEVICES,
}  # fmt: skip
_TYPES = {"out": Path, "learning_rate": float, "lr_decay": float, "weight_decay": float}
_TYPES |= {"clamp": float, "data": str}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mghf-fast pretrain``: one for each of the settings."""
    for field in dataclasses.fields(Settings):
        name, text, default = field.name, _HELP[field.name], field.default
        if isinstance(default, bool):
            parser.add_argument(option(name), dest=name, action="store_true", help=text)
            continue
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        if default is not None:
            text += f" (default: {shown})"
        if name in _CHOICES:
            parser.add_argument(
                option(name), dest=name, choices=_CHOICES[name], default=default, help=text
            )
        else:
            parser.add_argument(
                option(name),
                dest=name,
                type=_TYPES.get(name, int),
                nargs="+" if isinstance(default, tuple) else None,
                default=default,
                metavar={"out": "DIR", "data": "DATA"}.get(name, "N"),
                help=text,
            )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, FLOPs and an estimate of the time from a few steps; write nothing",
    )


def run(arguments: argparse.Namespace) -> int:
    """Trains, or estimates; returns 0. Mistakes are errors, which the command line tells."""
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
