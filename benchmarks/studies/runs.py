"""The trainings of the study, one file for each, so that they resume, and the choice of weights.

A network's file is named by objective, gradient ratio and seed. Weights are chosen with seed 0 on
the validation pictures alone: the smallest ratio whose network loses ``FULL_LOSS`` dB against L1,
or the largest. Then each seed's network is interpolated towards the seed's L1 network until it
loses ``TARGETS`` dB on the validation pictures.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq

from mghf_fast.commands.demo.network import CompactEDSR
from mghf_fast.commands.files import write_whole

from . import objectives, quality
from .probe import Setup, l1_run
from .tuning import Recipe, fine_tune, load_network, mixed, save_network, unit_weight

RATIOS = (1.0, 3.0, 10.0)
FULL_LOSS = 0.55
TARGETS = (0.3, 0.5)
"""dB below L1's PSNR."""
TOLERANCE = 0.004
"""Allowed error of the alpha at which a network loses the target."""


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.@-]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Study:
    """The settings of a study and the places of its files; it can be sent to other processes.

    ``names`` are the study's objectives, with ``F`` for the trained features ``features``.
    """

    out: Path
    start: Path
    train: Path
    validation: Path
    features: str
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: Recipe = field(default_factory=Recipe)
    ratios: tuple[float, ...] = RATIOS

    def full_name(self, name: str) -> str:
        """The objective's name with the trained features in the place of ``F``."""
        kind, _, features = name.partition(":")
        bare, at, preset = features.partition("@")
        return f"{kind}:{self.features}{at}{preset}" if bare == objectives.TRAINED else name

    @property
    def compared(self) -> tuple[str, ...]:
        """All but L1."""
        return tuple(name for name in self.names if name != objectives.L1)

    def of_one_seed(self) -> Study:
        """The same study with its first seed alone."""
        return dataclasses.replace(self, seeds=self.seeds[:1])

    def setup(self) -> Setup:
        return Setup.load(
            self.start, self.train, self.validation, self.recipe, self.out / "networks"
        )

    def described(self) -> dict[str, Any]:
        """The facts on which every file of the study depends; a folder belongs to one description.
        (Trained features are not among them: files that depend on them have their own names.)"""
        return {
            "start": hashlib.sha256(self.start.read_bytes()).hexdigest(),
            "steps": self.recipe.steps,
            "batch": self.recipe.batch,
            "patch": self.recipe.patch,
            "learning_rate": self.recipe.learning_rate,
            "ratios": list(self.ratios),
            "full_loss": FULL_LOSS,
            "targets": list(TARGETS),
            "primary": quality.PRIMARY,
        }

    def prepare(self) -> None:
        """Makes the folder, or checks that it belongs to this study.

        Raises:
            ValueError: it belongs to another.
        """
        path = self.out / "protocol.json"
        if path.exists():
            known = read_json(path)
            for key, value in self.described().items():
                if known.get(key) != value:
                    raise ValueError(
                        f"--out {self.out} holds a study with {key} {known.get(key)!r}, here it is "
                        f"{value!r}; give another folder"
                    )
        else:
            write_json(path, self.described())

    def file_name(self, name: str) -> str:
        """The objective's file name, with a digest of the trained features and the weights of the
        terms."""
        full = self.full_name(name)
        depends = objectives.identity(full) if full != name else objectives.terms(name)
        return slug(name) + (
            f"-{hashlib.sha256(depends.encode()).hexdigest()[:8]}" if depends else ""
        )

    def stem(self, name: str, ratio: float, seed: int) -> Path:
        return self.out / "networks" / f"{self.file_name(name)}-x{ratio:g}-seed{seed}"

    def match_file(self, name: str, seed: int) -> Path:
        return self.out / "matched" / f"{self.file_name(name)}-seed{seed}.json"

    # ---- trainings ----

    def trained(self, name: str, ratio: float, seed: int) -> tuple[CompactEDSR, dict[str, Any]]:
        """The network of an objective and its facts, trained unless its file is there."""
        stem = self.stem(name, ratio, seed)
        facts, weights = (stem.with_name(stem.name + s) for s in (".json", ".safetensors"))
        if facts.exists():
            return load_network(weights), read_json(facts)
        torch.set_num_threads(1)
        setup = self.setup()
        term = objectives.build(self.full_name(name))
        weight = ratio * unit_weight(term, setup.start, setup.photographs, setup.recipe)
        tuned = fine_tune(
            setup.start, term, weight, setup.photographs, setup.recipe, seed,
            f"{name} x{ratio:g} seed {seed}",
        )  # fmt: skip
        base = l1_run(seed, setup)[1]["psnr"]
        row = {
            "objective": name,
            "ratio": ratio,
            "seed": seed,
            "weight": weight,
            "psnr": round(quality.psnr(tuned.network, setup.pairs), 5),
            "l1_psnr": base,
            "seconds_per_step": round(tuned.step_seconds, 4),
            "loss_seconds": round(tuned.loss_seconds, 5),
        }
        facts.parent.mkdir(parents=True, exist_ok=True)
        save_network(weights, tuned.network)
        write_json(facts, row)
        return tuned.network, row

    def choose(self, name: str) -> float:
        """The objective's ratio, chosen with seed 0 on the validation pictures; trains the networks
        that it needs."""
        for ratio in self.ratios:
            _, row = self.trained(name, ratio, 0)
            if row["l1_psnr"] - row["psnr"] >= FULL_LOSS:
                break
        return ratio

    def chosen(self, name: str) -> float | None:
        """The result of :meth:`choose` without training; None if a training is missing."""
        for ratio in self.ratios:
            stem = self.stem(name, ratio, 0)
            facts = stem.with_name(stem.name + ".json")
            if not facts.exists():
                return None
            row = read_json(facts)
            if row["l1_psnr"] - row["psnr"] >= FULL_LOSS:
                return ratio
        return self.ratios[-1]

    def match(self, name: str, seed: int) -> dict[str, Any]:
        """The alphas at which a seed's network loses ``TARGETS``, with its quality there."""
        path = self.match_file(name, seed)
        if path.exists():
            return read_json(path)
        torch.set_num_threads(1)
        network, facts = self.trained(name, self.choose(name), seed)
        setup = self.setup()
        l1_network, l1_row = l1_run(seed, setup)

        @functools.cache
        def loss(alpha: float) -> float:
            if alpha == 1:
                return float(l1_row["psnr"] - facts["psnr"])
            return l1_row["psnr"] - quality.psnr(mixed(l1_network, network, alpha), setup.pairs)

        alphas = [
            round(float(brentq(lambda a, t=t: loss(a) - t if a else -t, 0, 1, xtol=TOLERANCE)), 4)
            if loss(1.0) > t
            else 1.0
            for t in TARGETS
        ]
        networks = {
            f"{t:g}": mixed(l1_network, network, a) for t, a in zip(TARGETS, alphas, strict=True)
        }
        found = quality.judge(networks, setup.pairs, quality.judges())
        row = facts | {
            "alphas": alphas,
            "reached": [loss(1.0) > t for t in TARGETS],
            "points": [quality.mean(found[f"{t:g}"]) for t in TARGETS],
            "l1": {k: l1_row[k] for k in found[f"{TARGETS[0]:g}"][setup.pairs[0].name]},
        }
        write_json(path, row)
        return row

    def missing(self) -> list[str]:
        """The missing trainings of the protocol, as "objective, seed"."""
        return [
            f"{name}, seed {seed}"
            for name in self.compared
            for seed in self.seeds
            if not self.match_file(name, seed).exists()
        ]

    def networks(self) -> dict[str, CompactEDSR]:
        """The networks that the test judges: ``start``, ``l1|seed|``, ``objective|seed|target``."""
        setup = self.setup()
        found = {"start": setup.start}
        for seed in self.seeds:
            l1_network, _ = l1_run(seed, setup)
            found[f"{objectives.L1}|{seed}|"] = l1_network
            for name in self.compared:
                row = self.match(name, seed)
                network, _ = self.trained(name, row["ratio"], seed)
                # A loss that reaches no target has one network for all, which is judged once.
                by_alpha = {a: mixed(l1_network, network, a) for a in row["alphas"]}
                for target, alpha in zip(TARGETS, row["alphas"], strict=True):
                    found[f"{name}|{seed}|{target:g}"] = by_alpha[alpha]
        return found
