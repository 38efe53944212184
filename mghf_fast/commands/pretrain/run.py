"""The state of a pretraining, whatever its objective, and its steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...nn import DetailFeatureExtractor
from .distributed import Ranks
from .items import Source
from .settings import PretrainError, Settings

AMP_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
INVERTIBILITY_IMAGES = 8


class AnyBatch(Protocol):
    """The properties common to all objectives' batches."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """The files that could not be read."""

    @property
    def readable(self) -> bool:
        """Whether every image could be read."""


class TrainedNetwork(nn.Module):
    """A network that contains the ``extractor`` to be pretrained."""

    extractor: DetailFeatureExtractor


class Run:
    """The state of a training, and its steps; each objective is a subclass.

    Args:
        network: the network with its initial weights, on ``device``.
        betas: Adam's.
    """

    PARTS: tuple[str, ...] = ()
    """Names of the parts of the loss that the curve shows."""
    LARGEST_NORM: float | None = None
    """Maximum norm of the gradient, which is clipped to it."""

    def __init__(
        self,
        settings: Settings,
        source: Source,
        ranks: Ranks,
        device: torch.device,
        network: TrainedNetwork,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.settings, self.source, self.ranks, self.device = settings, source, ranks, device
        self.network = network
        self.optimizer = torch.optim.Adam(
            network.parameters(),
            lr=settings.learning_rate,
            betas=betas,
            weight_decay=settings.weight_decay,
        )
        self.scheduler = self.make_scheduler()
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "float16")
        self.step = 0
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        """The sum over the ``losses`` steps since the last entry of the curve."""
        self.parts = torch.zeros(len(self.PARTS), dtype=torch.float64, device=device)
        self.losses = 0
        self.skipped: set[str] = set()
        self.trained: nn.Module = network

    # ------------------------------------------------------------ what an objective implements

    def remarks(self) -> list[str]:
        """Remarks for the user before the first step."""
        return []

    def make_scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of the learning rate."""
        raise NotImplementedError

    def batches(self, last: int) -> Iterator[Any]:
        """This rank's batches from the present step to ``last - 1``."""
        raise NotImplementedError

    def objective(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """The loss of a batch, differentiable, and the values of its ``PARTS``."""
        raise NotImplementedError

    def look(self) -> dict[str, float]:
        """Figures of the held-out images, over all ranks."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """The model card's figures on the result and its training data."""
        raise NotImplementedError

    def exported(self) -> tuple[DetailFeatureExtractor, float]:
        """The extractor to be written, on the CPU, and the factor folded into its weights."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------- the steps

    def distribute(self) -> None:
        """Wraps the network so that gradients are averaged over the ranks. Call it after loading
        the weights, which are then broadcast from rank 0."""
        if self.ranks.world > 1:
            on_gpu = self.device.type == "cuda"
            self.trained = DistributedDataParallel(
                self.network, device_ids=[self.device] if on_gpu else None
            )

    def autocast(self) -> Any:
        dtype = AMP_TYPES.get(self.settings.amp)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def train_on(self, batch: Any) -> None:
        """One step of the optimizer."""
        self.skip(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss, parts = self.objective(batch)
        torch.autograd.backward(self.scaler.scale(loss))
        if self.LARGEST_NORM is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.LARGEST_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.step += 1
        self.loss += loss.detach()
        if parts is not None:
            self.parts += parts.detach()
        self.losses += 1

    def skip(self, batch: AnyBatch) -> None:
        """Counts the pictures that could not be read.

        Raises:
            PretrainError: they exceed the limit, or no picture can be read.
        """
        self.skipped.update(batch.skipped)
        if len(self.skipped) > (limit := self.settings.skip_limit):
            some = ", ".join(sorted(self.skipped)[:3])
            raise PretrainError(
                f"more pictures than --skip-limit {limit} cannot be read, such as {some}"
            )
        if not batch.readable:
            raise PretrainError(f"none of {len(batch.skipped)} pictures in a row can be read")

    def mean_loss(self) -> float:
        """The mean over the steps since the last entry of the curve and over the ranks.

        Raises:
            PretrainError: it is not finite.
        """
        total = self.ranks.sum(self.loss.clone()) / (self.losses * self.ranks.world)
        if not math.isfinite(value := float(total)):
            raise PretrainError(
                f"the loss became {value} before step {self.step}; lower --lr, or give --clamp"
            )
        return value

    def entry(self) -> dict[str, float]:
        """The next entry of the curve, without figures on held-out images; resets its sums.

        Raises:
            PretrainError: the loss is not finite.
        """
        parts = self.ranks.sum(self.parts.clone()) / (self.losses * self.ranks.world)
        entry = {
            "step": self.step,
            "loss": self.mean_loss(),
            "learning_rate": float(self.scheduler.get_last_lr()[0]),
            **dict(zip(self.PARTS, parts.tolist(), strict=True)),
        }
        self.loss.zero_()
        self.parts.zero_()
        self.losses = 0
        return entry

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The objective's figures on the held-out images, and the error of inverting the blocks."""
        self.network.eval()
        found = self.look()
        self.network.train()
        return found

    def state(self) -> dict[str, Any]:
        """The complete state of the run; every rank must call this."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "curve": self.curve,
            "loss": float(self.ranks.sum(self.loss.clone())),
            "parts": self.ranks.sum(self.parts.clone()).tolist(),
            "losses": self.losses,
            "skipped": sorted(self.skipped),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores a :meth:`state`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve, self.losses = state["curve"], state["losses"]
        if self.ranks.first:  # the sums over the ranks
            self.loss.fill_(state["loss"])
            self.parts.copy_(torch.tensor(state.get("parts", []), dtype=torch.float64))
        self.skipped = set(state["skipped"])

    def is_finite(self) -> bool:
        """Whether every weight is finite; otherwise a checkpoint must not replace the last one."""
        return all(bool(p.isfinite().all()) for p in self.network.parameters())

    def latest(self, name: str) -> float | None:
        """The last value of a figure in the curve."""
        return next((entry[name] for entry in reversed(self.curve) if name in entry), None)
