"""Pretraining of the detail feature extractor, whatever the objective.

A run is a function of its settings: every batch depends only on the seed and the step, and the
checkpoint holds everything else on which a step depends. On one machine with the same number of
threads, a run that was killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import remove_leftovers
from . import checkpoint
from .distributed import Ranks, check_agreement, started, world_size
from .items import Source
from .progress import Board, Progress
from .run import Run
from .settings import PretrainError, Settings
from .sources import open_source

LARGEST_INVERTIBILITY_ERROR = 1e-3


def device_of(settings: Settings) -> torch.device:
    """The device of this process.

    Raises:
        PretrainError: it does not exist, or does not support the requested autocast.
    """
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise PretrainError("--device is cuda; there is none that torch can use")
    if settings.device == "cpu" or not cuda:
        if settings.amp == "float16":
            raise PretrainError("--amp is float16, which needs a GPU; bfloat16 also runs on a CPU")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def total_steps(settings: Settings, source: Source) -> int:
    """Optimizer steps of the whole run.

    Raises:
        PretrainError: an epoch is smaller than a batch.
    """
    if settings.steps is not None:
        return settings.steps
    if (each := source.epoch_images // settings.batch) < 1:
        raise PretrainError(
            f"--batch is {settings.batch}, and an epoch has {source.epoch_images} images only"
        )
    return settings.epochs * each


def make_run(settings: Settings, source: Source, ranks: Ranks, device: torch.device) -> Run:
    """The run of the objective, before its first step."""
    if settings.objective == "distances":
        from .distances import DistancesRun

        return DistancesRun(settings, source, ranks, device, total_steps(settings, source))
    from .classes import ClassesRun

    return ClassesRun(settings, source, ranks, device)


def configuration(settings: Settings, source: Source, ranks: Ranks) -> dict[str, Any]:
    """The configuration that must agree on every rank and on resuming."""
    found = settings.identity()
    found |= {f"data, {name}": value for name, value in source.description().items()}
    if settings.objective == "distances":
        from .networks import digests

        # The learning rate's schedule depends on the number of steps.
        found |= {"steps": total_steps(settings, source), "networks": digests(settings.networks)}
    return {**found, "processes": ranks.world}


def _agreed(settings: Settings, ranks: Ranks) -> tuple[Source, dict[str, Any]]:
    """The source and the configuration, after checking that all ranks agree.

    Raises:
        PretrainError: on every rank, if one rank fails or differs.
    """
    source, described, problem = None, {}, None
    try:
        source = open_source(settings)
        described = configuration(settings, source, ranks)
    except PretrainError as error:
        problem = str(error)
    for rank, told in enumerate(ranks.gather(problem)):
        if told is not None:
            raise PretrainError(told if ranks.world == 1 else f"rank {rank}: {told}")
    assert source is not None
    check_agreement(ranks, described)
    return source, described


def _read(path: Path, resume: bool) -> tuple[bytes | None, str | None]:
    """A checkpoint's bytes, if there is one, or an error message."""
    try:
        if not path.exists():
            return None, None
        if not resume:
            return (
                None,
                f"{path} is there already: --resume goes on from it, or choose another --out",
            )
        return path.read_bytes(), None
    except OSError as error:
        return None, f"{path} cannot be read: {error.strerror}"


def _prepare(out: Path) -> str | None:
    """Makes the directory; returns an error message or None."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
    except OSError as error:
        return f"--out {out} cannot be written to: {error.strerror}"
    return None


def _restore(run: Run, described: dict[str, Any], *, fresh_names: tuple[str, ...]) -> None:
    """Restores the checkpoint in ``--out``, if there is one; the first rank reads it for all."""
    settings, ranks = run.settings, run.ranks
    path = settings.out / checkpoint.NAME
    answer: tuple[bytes | None, str | None] = (None, None)
    if ranks.first:
        problem = _prepare(settings.out)
        answer = (None, problem) if problem else _read(path, settings.resume)
        if answer == (None, None):
            there = [name for name in fresh_names if (settings.out / name).exists()]
            if there:
                answer = (
                    None,
                    f"{settings.out / there[0]} is there already, without a checkpoint to go on "
                    "from; nothing is replaced, choose another --out",
                )
    content, problem = ranks.from_first(answer)
    if problem is not None:
        raise PretrainError(problem)
    if content is not None:
        run.load(checkpoint.decode(content, path, described))


def _learn(run: Run, described: dict[str, Any], steps: int) -> None:
    """Trains from the present step to ``steps``."""
    settings = run.settings
    path = settings.out / checkpoint.NAME
    batches = run.batches(steps)
    progress, board = Progress(run, steps), Board(run)
    for remark in run.remarks():
        progress.say(remark)
    warned = False
    try:
        run.network.train()
        last_time = time.monotonic()
        for batch in batches:
            run.train_on(batch)
            progress.advance()
            last = run.step == steps
            evaluates = last or run.step % settings.evaluate_every == 0
            if evaluates or run.step % settings.log_every == 0:
                entry = run.entry()
                if evaluates:
                    entry |= run.evaluate()
                run.curve.append(entry)
                progress.tell(entry)
                board.add(entry)
                if not warned and entry.get("invertibility_error", 0) > LARGEST_INVERTIBILITY_ERROR:
                    warned = True
                    progress.say(
                        "warning: the blocks are hardly invertible any more; --clamp and "
                        "--weight-decay keep them so"
                    )
            if last or run.step % settings.checkpoint_every == 0:
                now = time.monotonic()
                run.seconds += now - last_time
                last_time = now
                _save(run, path, described)
    finally:
        progress.close()
        board.close()


def _save(run: Run, path: Path, described: dict[str, Any]) -> None:
    run.skipped = set().union(*run.ranks.gather(run.skipped))
    if not run.is_finite():
        raise PretrainError(
            f"a weight became infinite or no number before step {run.step}; the last checkpoint "
            "stays; lower --lr, or give --clamp"
        )
    state = run.state()
    if run.ranks.first:
        checkpoint.write(path, checkpoint.encode(described, state))


def pretrain(
    settings: Settings, finish: Callable[[Run, dict[str, Any]], None], names: tuple[str, ...] = ()
) -> None:
    """Starts or resumes a training, then calls ``finish`` on the first rank.

    Args:
        settings: the settings.
        finish: called with the finished run and its configuration.
        names: files that ``finish`` writes to ``settings.out``; a new run does not start if one of
            them exists.

    Raises:
        PretrainError: for every user's mistake or system's refusal.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = device_of(settings)
    if settings.batch % (world := world_size()):
        raise PretrainError(
            f"--batch is {settings.batch}; it must be a multiple of the {world} processes"
        )
    with started(device) as ranks:
        # In a function, so that all references to the process group are gone before it is.
        _pretrain(settings, ranks, device, finish, names)


def _pretrain(
    settings: Settings,
    ranks: Ranks,
    device: torch.device,
    finish: Callable[[Run, dict[str, Any]], None],
    names: tuple[str, ...],
) -> None:
    source, described = _agreed(settings, ranks)
    steps = total_steps(settings, source)
    run = make_run(settings, source, ranks, device)
    _restore(run, described, fresh_names=names)
    run.distribute()
    if run.step < steps:
        _learn(run, described, steps)
    if ranks.first:
        finish(run, described)
    ranks.from_first(None)  # the others wait for the first one to finish
