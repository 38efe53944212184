"""Pretraining of the detail feature extractor (Algorithm 1 of MGHF).

A run is a function of its settings: every batch follows from the seed and the step, and the
checkpoint holds all else that a step depends on. On one machine with the same number of threads a
run that was killed and resumed ends with the very weights of one that was not.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..nn import DetailFeatureExtractor
from . import checkpoint
from .batches import Batch, held_out_batches, scaled, training_batches
from .distributed import Ranks, check_agreement, started, world_size
from .network import Classifier
from .settings import PretrainError, Settings
from .sources import NO_LABEL, Source, open_source

AMP_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
INVERTIBILITY_IMAGES = 8
LARGEST_INVERTIBILITY_ERROR = 1e-3


def device_of(settings: Settings) -> torch.device:
    """The device of this process.

    Raises:
        PretrainError: there is none such, or it cannot do the autocast that is asked for.
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


def build(settings: Settings, classes: int) -> Classifier:
    """The network with its first weights, the same in every process."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(settings.seed)
        extractor = DetailFeatureExtractor(**settings.extractor())
        return Classifier(extractor, settings.stages, classes)


class Run:
    """The state of a training, and its steps."""

    def __init__(self, settings: Settings, source: Source, ranks: Ranks, device: torch.device):
        self.settings, self.source, self.ranks, self.device = settings, source, ranks, device
        self.network = build(settings, len(source.classes)).to(device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(
            self.optimizer, settings.lr_every, settings.lr_decay
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "float16")
        self.step = 0
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        """The sum since the last entry of the curve, over ``losses`` steps."""
        self.losses = 0
        self.skipped: set[str] = set()
        self.trained: nn.Module = self.network

    def distribute(self) -> None:
        """Joins the ranks' gradients; after the weights are loaded, which rank 0 then gives to
        all."""
        if self.ranks.world > 1:
            on_gpu = self.device.type == "cuda"
            self.trained = DistributedDataParallel(
                self.network, device_ids=[self.device] if on_gpu else None
            )

    def autocast(self) -> Any:
        dtype = AMP_TYPES.get(self.settings.amp)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def train_on(self, batch: Batch) -> None:
        """One step of the optimizer."""
        self.skip(batch)
        images = scaled(batch.images, self.device)
        labels = batch.labels.to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = F.cross_entropy(self.trained(images).float(), labels)
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.step += 1
        self.loss += loss.detach()
        self.losses += 1

    def skip(self, batch: Batch) -> None:
        """Notes the pictures that could not be read.

        Raises:
            PretrainError: they are more than the limit, or all there are.
        """
        self.skipped.update(batch.skipped)
        if len(self.skipped) > (limit := self.settings.skip_limit):
            some = ", ".join(sorted(self.skipped)[:3])
            raise PretrainError(
                f"more pictures than --skip-limit {limit} cannot be read, such as {some}"
            )
        if bool((batch.labels == NO_LABEL).any()):
            raise PretrainError(f"none of {len(batch.skipped)} pictures in a row can be read")

    def mean_loss(self) -> float:
        """Over the steps since the last entry of the curve, and over the ranks.

        Raises:
            PretrainError: it is no number.
        """
        total = self.ranks.sum(self.loss.clone()) / (self.losses * self.ranks.world)
        if not math.isfinite(value := float(total)):
            raise PretrainError(
                f"the loss became {value} before step {self.step}; lower --lr, or give --clamp"
            )
        return value

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Cross-entropy and accuracy on the held-out images, and how far the blocks are from being
        undone by their inverses."""
        self.network.eval()
        found = torch.zeros(3, dtype=torch.float64, device=self.device)
        probe: Tensor | None = None
        batches = held_out_batches(
            self.source, self.settings.batch, self.ranks.rank, self.ranks.world
        )
        for batch in batches:
            self.skip(batch)
            images = scaled(batch.images, self.device)
            labels = batch.labels.to(self.device)
            with self.autocast():
                logits = self.network(images).float()
            found[0] += F.cross_entropy(logits, labels, reduction="sum")
            found[1] += (logits.argmax(1) == labels).sum()
            found[2] += len(labels)
            if probe is None:
                probe = images[:INVERTIBILITY_IMAGES]
        loss, right, number = self.ranks.sum(found).tolist()
        error = 0.0 if probe is None else self.network.extractor.invertibility_error(probe)
        self.network.train()
        return {
            "held_out_loss": loss / number,
            "held_out_accuracy": right / number,
            "invertibility_error": error,
        }

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on; every rank must ask for it."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "curve": self.curve,
            "loss": float(self.ranks.sum(self.loss.clone())),
            "losses": self.losses,
            "skipped": sorted(self.skipped),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes back to a :meth:`state`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve, self.losses = state["curve"], state["losses"]
        self.loss.fill_(state["loss"] if self.ranks.first else 0.0)  # the sum over the ranks
        self.skipped = set(state["skipped"])

    def is_finite(self) -> bool:
        """Whether every weight is a number: such a checkpoint may replace the last one."""
        return all(bool(p.isfinite().all()) for p in self.network.parameters())


def configuration(settings: Settings, source: Source, ranks: Ranks) -> dict[str, Any]:
    """What must be the same on every rank, and when a checkpoint goes on."""
    data = {f"data, {name}": value for name, value in source.description().items()}
    return {**settings.identity(), **data, "processes": ranks.world}


def _agreed(settings: Settings, ranks: Ranks) -> tuple[Source, dict[str, Any]]:
    """The source and the configuration, once every rank has them and they are the same.

    Raises:
        PretrainError: on every rank, what is wrong on one.
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
    """A checkpoint's bytes, if there is one, or what is wrong."""
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
    """Makes the directory; what is wrong with it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_leftovers(out)
    except OSError as error:
        return f"--out {out} cannot be written to: {error.strerror}"
    return None


def _restore(run: Run, described: dict[str, Any], *, fresh_names: tuple[str, ...]) -> None:
    """From the checkpoint in ``--out``, which the first rank reads for all, if there is one."""
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


class Progress:
    """A bar on a terminal (and with tqdm), lines elsewhere; on the first rank."""

    def __init__(self, run: Run, steps: int) -> None:
        self._steps, self._shown = steps, run.ranks.first
        self._bar: Any = None
        if self._shown and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=run.step, desc="pretrain", dynamic_ncols=True)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def tell(self, entry: dict[str, float]) -> None:
        """An entry of the curve."""
        told = "  ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in entry.items() if k != "step")
        self.say(f"step {entry['step']}/{self._steps}  {told}")

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._shown:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Board:
    """TensorBoard's event files, if they are wanted."""

    def __init__(self, run: Run) -> None:
        self._writer: Any = None
        if run.settings.tensorboard and run.ranks.first:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(run.settings.out / "tensorboard"), purge_step=run.step or None
            )

    def add(self, entry: dict[str, float]) -> None:
        """An entry of the curve."""
        if self._writer is not None:
            for name, value in entry.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(entry["step"]))
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _learn(run: Run, described: dict[str, Any], steps: int) -> None:
    """The steps from where ``run`` stands to ``steps``."""
    settings, ranks = run.settings, run.ranks
    path = settings.out / checkpoint.NAME
    batches = training_batches(
        run.source, run.step, steps, batch=settings.batch, rank=ranks.rank, ranks=ranks.world,
        workers=settings.workers,
    )  # fmt: skip
    progress, board = Progress(run, steps), Board(run)
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
                entry = {
                    "step": run.step,
                    "loss": run.mean_loss(),
                    "learning_rate": float(run.scheduler.get_last_lr()[0]),
                }
                if evaluates:
                    entry |= run.evaluate()
                run.curve.append(entry)
                run.loss.zero_()
                run.losses = 0
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
        checkpoint.write_whole(path, checkpoint.encode(described, state))


def pretrain(
    settings: Settings, finish: Callable[[Run, dict[str, Any]], None], names: tuple[str, ...] = ()
) -> None:
    """Trains, or goes on, and hands the end to ``finish`` on the first rank.

    Args:
        settings: what to do.
        finish: takes the finished run and its configuration.
        names: files that ``finish`` writes to ``settings.out``; a new run does not start if one of
            them is there.

    Raises:
        PretrainError: for every mistake of the user's or refusal of the system.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = device_of(settings)
    if settings.batch % (world := world_size()):
        raise PretrainError(
            f"--batch is {settings.batch}; it must be a multiple of the {world} processes"
        )
    with started(device) as ranks:
        # In a function, so that what holds the group of processes is gone before the group is.
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
    run = Run(settings, source, ranks, device)
    _restore(run, described, fresh_names=names)
    run.distribute()
    if run.step < steps:
        _learn(run, described, steps)
    if ranks.first:
        finish(run, described)
    ranks.from_first(None)  # the others wait, so that none ends the first one's work
