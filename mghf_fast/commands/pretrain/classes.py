"""Algorithm 1 of MGHF: the extractor is trained as the first part of a classifier."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn import DetailFeatureExtractor
from .batches import Batch, held_out_batches, scaled, training_batches
from .distributed import Ranks
from .items import Source
from .network import Classifier
from .run import INVERTIBILITY_IMAGES, Run
from .scale import power_of_two, response, scale_features
from .settings import Settings

SCALE_IMAGES = 64
"""Number of held-out images on which the features' scale is measured."""


def build(settings: Settings, classes: int) -> Classifier:
    """The network with its first weights, the same in every process."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(settings.seed)
        extractor = DetailFeatureExtractor(**settings.extractor())
        return Classifier(extractor, settings.stages, classes)


class ClassesRun(Run):
    """Cross-entropy of the pictures' classes."""

    network: Classifier

    def __init__(self, settings: Settings, source: Source, ranks: Ranks, device: torch.device):
        super().__init__(
            settings, source, ranks, device, build(settings, len(source.classes)).to(device)
        )

    def make_scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.StepLR(
            self.optimizer, self.settings.lr_every, self.settings.lr_decay
        )

    def batches(self, last: int) -> Iterator[Batch]:
        return training_batches(
            self.source, self.step, last, batch=self.settings.batch, rank=self.ranks.rank,
            ranks=self.ranks.world, workers=self.settings.workers,
        )  # fmt: skip

    def objective(self, batch: Batch) -> tuple[Tensor, None]:
        images = scaled(batch.images, self.device)
        labels = batch.labels.to(self.device, non_blocking=True)
        with self.autocast():
            return F.cross_entropy(self.trained(images).float(), labels), None

    def look(self) -> dict[str, float]:
        """Cross-entropy and accuracy on the held-out images, and the error of undoing the
        blocks."""
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
        return {
            "held_out_loss": loss / number,
            "held_out_accuracy": right / number,
            "invertibility_error": error,
        }

    def figures(self) -> dict[str, Any]:
        return {
            "images": self.step * self.settings.batch,
            "held_out_accuracy": self.latest("held_out_accuracy"),
            "held_out_loss": self.latest("held_out_loss"),
            "chance_accuracy": 1 / len(self.source.classes),
        }

    def exported(self) -> tuple[DetailFeatureExtractor, float]:
        """The extractor with its features rescaled to their scale before the first step (see
        :mod:`.scale`), and the factor."""
        extractor = copy.deepcopy(self.network.extractor).cpu().eval()
        before = build(self.settings, len(self.source.classes)).extractor.eval()
        batch = next(held_out_batches(self.source, SCALE_IMAGES, 0, 1))
        images = scaled(batch.images, torch.device("cpu"))
        factor = power_of_two(response(before, images), response(extractor, images))
        scale_features(extractor, factor)
        return extractor, factor
