"""Exports a finished pretraining: the extractor, and a model card with its origin."""

from __future__ import annotations

import datetime
import hashlib
import json
from typing import Any

import torch

from ... import __version__
from ..machine import machine_facts
from . import checkpoint
from .run import Run

WEIGHTS, CARD = "extractor.safetensors", "extractor.json"


def card(run: Run, described: dict[str, Any], weights: bytes, factor: float) -> dict[str, Any]:
    """The model card, for JSON; ``factor`` is the one folded into the weights."""
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
        "objective": settings.objective,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": settings.command(),
        "seed": settings.seed,
        "configuration": described,
        "steps": run.step,
        "hours": round(run.seconds / 3600, 3),
        "unreadable": len(run.skipped),
        "held_out_images": run.source.held_out_images,
        **run.figures(),
        "invertibility_error": run.latest("invertibility_error"),
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
    extractor, factor = run.exported()
    weights = extractor.to_safetensors()
    checkpoint.write(out / WEIGHTS, weights)
    text = json.dumps(card(run, described, weights, factor), indent=1) + "\n"
    checkpoint.write(out / CARD, text.encode())
