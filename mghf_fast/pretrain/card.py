"""What a finished pretraining leaves: the extractor, and a card that says where it comes from."""

from __future__ import annotations

import datetime
import hashlib
import json
from typing import Any

import torch

from .. import __version__
from ..measure import machine_facts
from . import checkpoint
from .train import Run

WEIGHTS, CARD = "extractor.safetensors", "extractor.json"


def _latest(run: Run, name: str) -> float | None:
    return next((entry[name] for entry in reversed(run.curve) if name in entry), None)


def card(run: Run, described: dict[str, Any], weights: bytes) -> dict[str, Any]:
    """The model card, for JSON."""
    settings = run.settings
    machine = machine_facts(settings.threads)
    return {
        "file": WEIGHTS,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "bytes": len(weights),
        "extractor": run.network.extractor.config,
        "parameters": sum(p.numel() for p in run.network.extractor.parameters()),
        "input": "RGB, -1 to 1",
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
    weights = run.network.extractor.to_safetensors()
    checkpoint.write_whole(out / WEIGHTS, weights)
    text = json.dumps(card(run, described, weights), indent=1) + "\n"
    checkpoint.write_whole(out / CARD, text.encode())
