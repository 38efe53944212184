"""Fine-tuning of one start network with one objective, the same in every study."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mghf_fast.commands.demo.network import CompactEDSR
from mghf_fast.commands.demo.photographs import Photograph
from mghf_fast.commands.demo.settings import random_source
from mghf_fast.commands.demo.train import batches, train

Term = Callable[[Tensor, Tensor], Tensor]
"""(sr, gt), both (B, 3, H, W) of 0 to 1 -> a scalar."""

FIRST_BATCHES = 4
"""The number of batches on which the gradients' lengths are compared."""
WEIGHT_SEED = 0
PREPARATION_SEED = 1000
"""The seed of the batches from which a term learns before its first use; no training uses it."""


@dataclass(frozen=True)
class Recipe:
    """The settings that all trainings of a study share."""

    steps: int = 300
    batch: int = 4
    patch: int = 96
    learning_rate: float = 5e-4


class Tuned(NamedTuple):
    """A network after its fine-tuning, with the median seconds of a whole step and of its loss."""

    network: CompactEDSR
    step_seconds: float
    loss_seconds: float


def load_network(path: Path) -> CompactEDSR:
    """The network in a .safetensors file, or in a checkpoint of :mod:`.start_network`."""
    network = CompactEDSR(torch.Generator().manual_seed(0))
    if path.suffix == ".safetensors":
        from safetensors.torch import load

        network.load_state_dict(load(path.read_bytes()))
    else:
        network.load_state_dict(torch.load(path, weights_only=True)["network"])
    return network.eval()


def save_network(path: Path, network: CompactEDSR) -> None:
    from safetensors.torch import save

    from mghf_fast.commands.files import write_whole

    write_whole(path, save({k: v.contiguous() for k, v in network.state_dict().items()}))


def mixed(first: CompactEDSR, second: CompactEDSR, alpha: float) -> CompactEDSR:
    """The network with the weights (1 - alpha) first + alpha second."""
    network = copy.deepcopy(first)
    other = second.state_dict()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            value.lerp_(other[name], alpha)
    return network


def crops(
    photographs: list[Photograph], recipe: Recipe, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a seed, the same for every objective."""
    return batches(photographs, recipe.batch, recipe.patch, random_source(seed, "fine-tuning"))


def gradient_length(term: Term, start: CompactEDSR, data: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean length of a term's gradient in the start network's pictures."""
    lengths = []
    for lr, gt in data:
        with torch.no_grad():
            sr = start(lr)
        sr = sr.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(term(sr, gt), sr)
        lengths.append(float(torch.linalg.vector_norm(gradient)))
    return statistics.fmean(lengths)


def unit_weight(
    term: Term, start: CompactEDSR, photographs: list[Photograph], recipe: Recipe
) -> float:
    """The weight that makes a term's gradient as long as L1's, on the first batches of seed 0.

    A term with a method ``prepare(start, data)`` first learns from separate batches.
    """
    prepare = getattr(term, "prepare", None)
    if prepare is not None:
        prepare(start, crops(photographs, recipe, PREPARATION_SEED))
    data = list(itertools.islice(crops(photographs, recipe, WEIGHT_SEED), FIRST_BATCHES))
    length = gradient_length(term, start, data)
    if not length > 0:
        raise ValueError(f"the objective's gradient has the length {length}: it has no weight")
    return gradient_length(F.l1_loss, start, data) / length


def fine_tune(
    start: CompactEDSR,
    term: Term | None,
    weight: float,
    photographs: list[Photograph],
    recipe: Recipe,
    seed: int,
    label: str = "",
) -> Tuned:
    """Fine-tunes a copy of ``start`` on ``L1 + weight * term``, or on L1 alone without a term."""
    network = copy.deepcopy(start).train()

    def objective(sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        l1 = F.l1_loss(sr, gt)
        total = l1 if term is None else l1 + weight * term(sr, gt)
        return {"total": total, "l1": l1.detach()}

    record = train(
        network,
        crops(photographs, recipe, seed),
        objective,
        label=label or "fine-tuning",
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
    )
    return Tuned(
        network.eval(),
        statistics.median(record.step_seconds),
        statistics.median(record.loss_seconds),
    )
