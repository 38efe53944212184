"""What a finished pretraining leaves: the extractor, and a card that says where it comes from."""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
from typing import Any

import torch

from .. import __version__
from ..measure import machine_facts
from ..nn import DetailFeatureExtractor
from . import checkpoint
from .batches import held_out_batches, scaled
from .scale import power_of_two, response, scale_features
from .train import Run, build

WEIGHTS, CARD = "extractor.safetensors", "extractor.json"
SCALE_IMAGES = 64
"""Held-out images on which the features' scale is found."""


def scaled_extractor(run: Run) -> tuple[DetailFeatureExtractor, float]:
    """The trained extractor with features of the scale that they had before the first step, and
    the factor (see :mod:`.scale`)."""
    extractor = copy.deepcopy(run.network.extractor).cpu().eval()
    before = build(run.settings, len(run.source.classes)).extractor.eval()
    batch = next(held_out_batches(run.source, SCALE_IMAGES, 0, 1))
    images = scaled(batch.images, torch.device("cpu"))
    factor = power_of_two(response(before, images), response(extractor, images))
    scale_features(extractor, factor)
    return extractor, factor


def _latest(run: Run, name: str) -> float | None:
    return next((entry[name] for entry in reversed(run.curve) if name in entry), None)


def card(run: Run, described: dict[str, Any], weights: bytes, factor: float) -> dict[str, Any]:
    """The model card, for JSON; ``factor`` is the one drawn into the weights."""
    settings = run.settings
    machine = machine_facts(settings.threads)
    return {
        "file": WEIGHTS,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "bytes": len(weights),
        "extractor": run.network.extractor.config,
        "parameters": sum(p.numel() for p in run.network.extractor.parameters()),
        "input": "RGB, -1 to 1",
        "feature_scale": factor,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": settings.command(),
        "seed": settings.seed,
        "configuration": described,
        "steps": run.step,
        "images": run.step * settings.batch,
        "hours": round(run.seconds / 3600, 3),
        "unreadable": len(run.skipped),
        "held_out_images": run.source.held_out_images,
        "held_out_accuracy": _latest(run, "held_out_accuracy"),
        "held_out_loss": _latest(run, "held_out_loss"),
        "chance_accuracy": 1 / len(run.source.classes),
        "invertibility_error": _latest(run, "invertibility_error"),
        "versions": {"mghf_fast": __version__, "torch": torch.__version__},
        "machine": {k: machine[k] for k in ("cpu", "isa", "cores", "threads", "gpu")},
        "curve": run.curve,
    }


def export(run: Run, described: dict[str, Any]) -> None:
    """Writes the weights, then the card, to ``--out``.

    Raises:
        PretrainError: the system refuses.
    """
    out = run.settings.out
    extractor, factor = scaled_extractor(run)
    weights = extractor.to_safetensors()
    checkpoint.write_whole(out / WEIGHTS, weights)
    text = json.dumps(card(run, described, weights, factor), indent=1) + "\n"
    checkpoint.write_whole(out / CARD, text.encode())
