"""What a pretraining would take: ``--dry-run``."""

from __future__ import annotations

import statistics
import time
from typing import Any

from .batches import training_batches
from .distributed import Ranks
from .network import multiply_adds
from .settings import Settings
from .sources import open_source
from .train import Run, device_of, total_steps

WARM_UP, MEASURED = 1, 4


def estimate(settings: Settings) -> dict[str, Any]:
    """Parameters, multiply-adds, and the time of a few steps, which are thrown away.

    Returns:
        ``images`` of an epoch, ``held_out``, ``classes``, ``steps``, ``parameters_extractor`` and
        ``parameters_head``, multiply-adds of one image forward ``macs_extractor`` and
        ``macs_head``, and of a step ``macs_step``, ``seconds_step`` (median), ``seconds_batch`` (to
        prepare one, in one process), ``seconds_held_out`` (one evaluation), ``seconds`` in all.
    """
    device = device_of(settings)
    source = open_source(settings)
    steps = total_steps(settings, source)
    run = Run(settings, source, Ranks(), device)
    extractor, head = multiply_adds(run.network, settings.size)
    inputs, times = [], []
    batches = training_batches(
        source, 0, WARM_UP + MEASURED, batch=settings.batch, rank=0, ranks=1, workers=0
    )
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
    start = time.perf_counter()
    run.network.eval()
    run.network(batch.images.to(device).float())
    each = (time.perf_counter() - start + prepare) / settings.batch
    held_out = each * source.held_out_images
    # Other processes prepare images while this one computes, if they keep up.
    slower = max(step, prepare / settings.workers) if settings.workers else step + prepare
    return {
        "images": source.epoch_images,
        "held_out": source.held_out_images,
        "classes": len(source.classes),
        "steps": steps,
        "parameters_extractor": sum(p.numel() for p in run.network.extractor.parameters()),
        "parameters_head": sum(
            p.numel()
            for part in (run.network.stages, run.network.classifier)
            for p in part.parameters()
        ),
        "macs_extractor": extractor,
        "macs_head": head,
        # Forward; then forward again, gradient of the input and of the weights in the extractor.
        "macs_step": settings.batch * (4 * extractor + 3 * head),
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
    return "\n".join(
        (
            f"data          {found['classes']} classes, {found['images']} images an epoch, "
            f"{found['held_out']} held out",
            f"parameters    {found['parameters_extractor']:,} in the extractor, "
            f"{found['parameters_head']:,} behind it, which are thrown away",
            f"an image      {found['macs_extractor'] / 1e9:.3f} + {found['macs_head'] / 1e9:.3f} "
            f"GFLOPs forward at {size} x {size} (a FLOP is one multiply-add)",
            f"a step        about {found['macs_step'] / 1e9:.1f} GFLOPs; {batch} images, "
            f"{found['seconds_step']:.2f} s, and {found['seconds_batch']:.2f} s to prepare them",
            f"all           {found['steps']} steps, about {hours} h {minutes:02d} min in one "
            "process like this",
        )
    )
