"""Estimates the cost of a pretraining: ``--dry-run``."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

from .distributed import Ranks
from .network import multiply_adds
from .settings import Settings
from .sources import open_source
from .train import device_of, make_run, total_steps

WARM_UP, MEASURED = 1, 4
FORWARD = {"classes": 0.3, "distances": 0.8}
"""Approximate share of a step's time without gradients; teachers need none."""


def estimate(settings: Settings) -> dict[str, Any]:
    """Parameters, multiply-adds, and the time of a few steps, whose results are discarded.

    Returns:
        ``images`` per epoch, ``held_out``, ``classes``, ``steps``, ``parameters_extractor``,
        ``parameters_head``; multiply-adds ``macs_extractor`` and ``macs_head`` of one image's
        forward and ``macs_step`` of a step; ``seconds_step`` (median), ``seconds_batch`` (preparing
        one, in one process), ``seconds_held_out`` (one evaluation), ``seconds`` in all.
    """
    device = device_of(settings)
    source = open_source(settings)
    steps = total_steps(settings, source)
    # No worker processes, which would hide the time to prepare a batch.
    run = make_run(dataclasses.replace(settings, workers=0), source, Ranks(), device)
    parameters_extractor = sum(p.numel() for p in run.network.extractor.parameters())
    parameters = sum(p.numel() for p in run.network.parameters())
    extractor, head = multiply_adds(run.network, settings.size)
    images = settings.batch * (2 if settings.objective == "distances" else 1)
    inputs, times = [], []
    batches = run.batches(WARM_UP + MEASURED)
    for _ in range(WARM_UP + MEASURED):
        start = time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        run.train_on(batch)
        run.mean_loss()  # waits for the device
        times.append(time.perf_counter() - ready)
        inputs.append(ready - start)
    step = statistics.median(times[WARM_UP:])
    prepare = statistics.median(inputs[WARM_UP:])
    held_out = (
        (FORWARD[settings.objective] * step + prepare) / settings.batch * source.held_out_images
    )
    # Worker processes prepare images while this one computes, if they keep up.
    slower = max(step, prepare / settings.workers) if settings.workers else step + prepare
    return {
        "images": source.epoch_images,
        "held_out": source.held_out_images,
        "classes": len(source.classes),
        "steps": steps,
        "parameters_extractor": parameters_extractor,
        "parameters_head": parameters - parameters_extractor,
        "macs_extractor": extractor,
        "macs_head": head,
        # Extractor: forward, recomputation, gradients of the input and of the weights.
        "macs_step": images * (4 * extractor + 3 * head),
        "seconds_step": step,
        "seconds_batch": prepare,
        "seconds_held_out": held_out,
        "seconds": steps * slower + (steps // settings.evaluate_every + 1) * held_out,
    }


def report(settings: Settings) -> str:
    """The estimate as text for a terminal."""
    found = estimate(settings)
    hours, minutes = divmod(round(found["seconds"] / 60), 60)
    size, batch = settings.size, settings.batch
    pairs = settings.objective == "distances"
    classes = "" if pairs else f"{found['classes']} classes, "
    what = "pairs" if pairs else "images"
    teacher = ", and the teacher's" if pairs else ""
    return "\n".join(
        (
            f"data          {classes}{found['images']} images an epoch, "
            f"{found['held_out']} held out",
            f"parameters    {found['parameters_extractor']:,} in the extractor, "
            f"{found['parameters_head']:,} behind it, which are discarded",
            f"an image      {found['macs_extractor'] / 1e9:.3f} + {found['macs_head'] / 1e9:.3f} "
            f"GFLOPs forward at {size} x {size} (a FLOP is one multiply-add)",
            f"a step        about {found['macs_step'] / 1e9:.1f} GFLOPs{teacher}; {batch} {what}, "
            f"{found['seconds_step']:.2f} s, and {found['seconds_batch']:.2f} s to prepare them",
            f"all           {found['steps']} steps, about {hours} h {minutes:02d} min in one "
            "process like this",
        )
    )
