"""Pairs of a picture and a distorted one for one rank, prepared by worker processes, starting at
any step. A rank's pairs depend only on the seed and the step, not on the number of threads or
workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..demo.degradation import degrade
from ..demo.network import CompactEDSR
from .batches import one_thread
from .distortions import (
    Random,
    Scene,
    as_tensor,
    band_noise,
    distort,
    gaussian_blur,
    noise,
    random_shift,
)
from .items import MARGIN, NO_LABEL, Item, Source

OCTAVES = tuple((2.0**-n, 2.0 ** (1 - n)) for n in range(6, 1, -1))
"""Bands of frequency in cycles per pixel, the finest last."""
OCTAVE_RMS = 0.01
"""Strength of the noise whose response is measured; small enough for the features to be linear."""
PROBE_BLUR = (0.6, 1.6)
"""Standard deviation in pixels of the blur that is compared with noise of the same MSE."""
CANDIDATES = 4
"""Number of candidates shifted by at most a pixel, each of which is compared with their mean."""


class PairBatch(NamedTuple):
    """Pictures in [0, 1], float32, (B, 3, S, S), and the files that could not be read."""

    distorted: Tensor
    gt: Tensor
    probes: Tensor
    """(len(OCTAVES) + 2, 3, S, S): ``gt[0]`` with noise of each octave, with blur, and with white
    noise of the blur's MSE. Not clipped to 0 to 1."""
    candidates: Tensor
    """(CANDIDATES, 3, S, S), ``gt[0]`` shifted by less than a pixel; or none, (0, 3, S, S)."""
    skipped: tuple[str, ...]
    readable: bool


def _inside(images: Tensor) -> Tensor:
    edge = MARGIN // 2
    return images[..., edge:-edge, edge:-edge].contiguous()


def _probes(gt: Tensor, random: Random) -> Tensor:
    octaves = [gt + band_noise(gt, low, high, OCTAVE_RMS, random) for low, high in OCTAVES]
    blurred = gaussian_blur(gt, random.uniform(*PROBE_BLUR))
    rms = (blurred - gt).square().mean().sqrt()
    return torch.stack([*octaves, blurred, gt + noise(gt.shape, random) * rms])


@contextmanager
def _on_one_thread() -> Iterator[None]:
    # Sums split over threads differ in their last bits.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Pairs:
    """Pairs of a source's pictures, which must have ``MARGIN`` more pixels per side than the
    pairs.

    Args:
        networks: networks for super-resolution by 4; each batch uses one of them.
        candidates: whether to make candidates.
    """

    def __init__(
        self, source: Source, networks: list[CompactEDSR], seed: int, candidates: bool
    ) -> None:
        self._source, self._networks, self._seed = source, networks, seed
        self._candidates = candidates

    def training(self, positions: range) -> PairBatch:
        """The pairs at these positions in the endless order of training."""
        randoms = [np.random.default_rng([self._seed, 4, p]) for p in positions]
        return self._batch([self._source.training(p) for p in positions], randoms)

    def held_out(self, indices: range) -> PairBatch:
        """Pairs of held-out pictures, by the pictures' indices."""
        randoms = [np.random.default_rng([self._seed, 5, i]) for i in indices]
        return self._batch([self._source.held_out(i) for i in indices], randoms)

    @torch.no_grad()
    def _batch(self, items: list[Item], randoms: list[Random]) -> PairBatch:
        first = randoms[0]
        with _on_one_thread():
            gt = torch.stack([as_tensor(item.pixels) for item in items])
            low = torch.stack(
                [
                    as_tensor(degrade(item.pixels, random))
                    for item, random in zip(items, randoms, strict=True)
                ]
            )
            network = self._networks[int(first.integers(len(self._networks)))]
            sr = network(low.contiguous(memory_format=torch.channels_last))
            sr = sr.contiguous().clamp(0, 1)
            distorted = []
            for place, random in enumerate(randoms):
                other = int(random.integers(len(items)))
                scene = Scene(gt[place], sr[place], gt[other] - sr[other])
                distorted.append(distort(scene, random))
            candidates = [
                random_shift(gt[0], 0, 1, first) for _ in range(CANDIDATES * self._candidates)
            ]
            shown = _inside(gt)
            return PairBatch(
                _inside(torch.stack(distorted)),
                shown,
                _probes(shown[0], first),
                _inside(torch.stack(candidates)) if candidates else shown[:0],
                tuple(name for item in items for name in item.skipped),
                all(item.label != NO_LABEL for item in items),
            )


class _Steps(Dataset[PairBatch]):
    """The pairs of one rank, by step."""

    def __init__(self, pairs: Pairs, batch: int, rank: int, ranks: int) -> None:
        self._pairs, self._batch = pairs, batch
        self._each = batch // ranks
        self._offset = rank * self._each

    def __getitem__(self, step: int) -> PairBatch:
        start = step * self._batch + self._offset
        return self._pairs.training(range(start, start + self._each))


def _as_it_is(batch: Any) -> Any:
    return batch


def training_pairs(
    pairs: Pairs, first: int, last: int, *, batch: int, rank: int, ranks: int, workers: int
) -> Iterator[PairBatch]:
    """This rank's share of the pairs of steps ``first`` to ``last - 1``; ``batch``, the pairs of
    all ranks in a step, is a multiple of ``ranks``."""
    return iter(
        DataLoader(
            _Steps(pairs, batch, rank, ranks),
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=one_thread,
            prefetch_factor=4 if workers else None,
        )
    )


def held_out_pairs(
    pairs: Pairs, number: int, batch: int, rank: int, ranks: int
) -> Iterator[PairBatch]:
    """This rank's share of the pairs of ``number`` held-out pictures."""
    indices = range(rank, number, ranks)
    for start in range(0, len(indices), batch):
        yield pairs.held_out(indices[start : start + batch])
