"""Part (d): the demo's super-resolution, fine-tuned with trained and with random features.

A seed is a start network, batches and degradations, the same for every objective, and a random
extractor. The gradient that MGHF-c sends into the picture has another length with other features,
which is a weight in disguise; so the trained ones are also run with the weight that makes their
gradient as long as that of the random ones, measured on the start network's first batches.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mghf_fast import DetailFeatureExtractor, MGHFLoss
from mghf_fast.demo import losses
from mghf_fast.demo.metrics import Quality
from mghf_fast.demo.metrics import measure as quality_of
from mghf_fast.demo.network import CompactEDSR
from mghf_fast.demo.photographs import Collection, bundled
from mghf_fast.demo.pipeline import FINE_TUNE_RATE, PRETRAIN_RATE
from mghf_fast.demo.settings import DemoSettings, random_source
from mghf_fast.demo.train import batches, hold_out, super_resolve, train

from .subjects import RANDOM, TRAINED, random_extractor

L1, MATCHED = "L1 alone", "trained, gradient matched"
FIRST_BATCHES = 4


def gradient_length(objective: losses.Objective, network: CompactEDSR, data: Any) -> float:
    """Mean length of the gradient that MGHF-c's part sends into the super-resolved picture."""
    lengths = []
    for lr, gt in itertools.islice(data, FIRST_BATCHES):
        sr = network(lr).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(sr, gt)["total"], sr)
        lengths.append(float(torch.linalg.vector_norm(gradient)))
    return sum(lengths) / len(lengths)


def perceptual(extractor: DetailFeatureExtractor) -> losses.Objective:
    """MGHF-c alone."""
    loss = MGHFLoss(preset=losses.PRESET, extractor=extractor, input_range="0,1")
    return lambda sr, gt: {"total": loss(sr, gt)}


def with_l1(objective: losses.Objective, weight: float) -> losses.Objective:
    def both(sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        mae = losses.l1(sr, gt)
        return {"total": mae["total"] + weight * objective(sr, gt)["total"], "l1": mae["l1"]}

    return both


def run_seed(
    trained: DetailFeatureExtractor,
    seed: int,
    settings: DemoSettings,
    collection: Collection,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """A row for each objective: the mean quality over the held-out photographs."""
    held_out = hold_out(collection.held_out, seed)

    def crops(purpose: str) -> Any:
        source = random_source(seed, purpose)
        return batches(collection.training, settings.batch, settings.patch, source)

    start = CompactEDSR(torch.Generator().manual_seed(seed))
    train(
        start,
        crops("pre-training"),
        losses.l1,
        label=f"start {seed}",
        steps=settings.pretrain_steps,
        learning_rate=PRETRAIN_RATE,
    )
    extractors = {RANDOM: random_extractor(trained, seed), TRAINED: trained}
    terms = {name: perceptual(extractor) for name, extractor in extractors.items()}
    length = {
        name: gradient_length(term, start, crops("fine-tuning")) for name, term in terms.items()
    }
    weight = losses.MGHF_WEIGHT
    matched = weight * length[RANDOM] / max(length[TRAINED], 1e-30)
    objectives: dict[str, tuple[losses.Objective, float]] = {
        L1: (losses.l1, 0.0),
        RANDOM: (with_l1(terms[RANDOM], weight), weight),
        TRAINED: (with_l1(terms[TRAINED], weight), weight),
        MATCHED: (with_l1(terms[TRAINED], matched), matched),
    }
    rows = []
    for name, (objective, used) in objectives.items():
        network = copy.deepcopy(start)
        train(
            network,
            crops("fine-tuning"),
            objective,
            label=f"{name} {seed}",
            steps=settings.steps,
            learning_rate=FINE_TUNE_RATE,
        )
        found = [quality_of(super_resolve(network, h.lr), h.gt) for h in held_out]
        mean = {key: round(value, 5) for key, value in asdict(Quality.mean(found)).items()}
        rows.append({"objective": name, "seed": seed, "weight": float(f"{used:.4g}"), **mean})
        say(f"  {name}, seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in mean.items()))
    return rows


def measure(
    trained: DetailFeatureExtractor,
    seeds: Sequence[int],
    settings: DemoSettings | None = None,
    collection: Collection | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The part's result."""
    settings = settings or DemoSettings()
    collection = collection or bundled()
    rows = [r for seed in seeds for r in run_seed(trained, seed, settings, collection, say)]
    return {
        "pretrain_steps": settings.pretrain_steps,
        "steps": settings.steps,
        "batch": settings.batch,
        "patch": settings.patch,
        "held_out": [p.name for p in collection.held_out],
        "training": [p.name for p in collection.training],
        "rows": rows,
    }
