"""Batches of a source for one rank, prepared by worker processes, starting at any step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .items import NO_LABEL, Item, Source


class Batch(NamedTuple):
    """Images (B, 3, S, S) of 8 bits, labels (B,), and the files that could not be read."""

    images: Tensor
    labels: Tensor
    skipped: tuple[str, ...]

    @property
    def readable(self) -> bool:
        """Whether every image could be read."""
        return not bool((self.labels == NO_LABEL).any())


def scaled(images: Tensor, device: torch.device) -> Tensor:
    """8 bits -> float32 in [-1, 1] on ``device``."""
    return images.to(device, non_blocking=True).float() / 127.5 - 1


def _collate(items: list[Item]) -> Batch:
    pixels = torch.from_numpy(np.stack([item.pixels for item in items]))
    # As (B, 3, S, S) it is channels_last, the extractor's preferred layout.
    return Batch(
        pixels.permute(0, 3, 1, 2),
        torch.tensor([item.label for item in items]),
        tuple(name for item in items for name in item.skipped),
    )


class _Images(Dataset[Item]):
    def __init__(self, source: Source, held_out: bool) -> None:
        self._get = source.held_out if held_out else source.training

    def __getitem__(self, position: int) -> Item:
        return self._get(position)


class _Positions:
    """The positions of each of a rank's batches."""

    def __init__(self, first: int, last: int, batch: int, rank: int, ranks: int) -> None:
        self._steps = range(first, last)
        self._batch, self._rank, self._each = batch, rank, batch // ranks

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            start = step * self._batch + self._rank * self._each
            yield list(range(start, start + self._each))


def one_thread(worker: int) -> None:
    """Initialises a worker process."""
    torch.set_num_threads(1)


def training_batches(
    source: Source, first: int, last: int, *, batch: int, rank: int, ranks: int, workers: int
) -> Iterator[Batch]:
    """This rank's share of the batches of steps ``first`` to ``last - 1``; ``batch``, the images
    of all ranks in a step, is a multiple of ``ranks``."""
    return iter(
        DataLoader(
            _Images(source, held_out=False),
            batch_sampler=_Positions(first, last, batch, rank, ranks),
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=one_thread,
            prefetch_factor=4 if workers else None,
        )
    )


def held_out_batches(source: Source, batch: int, rank: int, ranks: int) -> Iterator[Batch]:
    """This rank's share of the held-out images."""
    indices = range(rank, source.held_out_images, ranks)
    for start in range(0, len(indices), batch):
        yield _collate([source.held_out(i) for i in indices[start : start + batch]])
