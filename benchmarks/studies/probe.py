"""The training probe: does a loss lead a small super-resolution network to better pictures?

    python -m benchmarks.studies.probe --start start.safetensors --images photographs/ \
        --validation Set14/ --features curved my.safetensors --variant n c --ratio 1 3

One start network is trained for 300 steps (4 crops of 96 x 96, the demo's degradation and schedule)
on L1 + w loss and, for comparison, on L1 alone with the same batches, for each seed. w makes the
loss's gradient in the start network's pictures RATIO times as long as L1's. Then the networks
between L1's and the objective's (weights interpolated at alpha) are judged on the validation
pictures: PSNR and SSIM in the papers' convention and shift-tolerant LPIPS (AlexNet), as a curve of
the perceptual distance over PSNR.

Everything is cached in ``--cache``, keyed by its inputs (the start network, the pictures, the
features' weights, seed, ratio), so that repeating a call costs nothing, and L1 runs once per seed.
``--objectives`` takes names of :mod:`.objectives` instead of features.

From Python: ``probe(objective, seed, setup, ratio=1.0)`` -> a dict, for an ``objective(sr, gt)`` of
images of 0 to 1; ``setup = Setup.load(start, images, validation)``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mghf_fast.commands.demo.network import CompactEDSR
from mghf_fast.commands.demo.photographs import Photograph
from mghf_fast.commands.files import write_whole

from . import objectives, quality
from .pictures import Pair, degraded, training
from .tuning import (
    Recipe,
    Term,
    fine_tune,
    load_network,
    mixed,
    save_network,
    unit_weight,
)

ALPHAS = (0.25, 0.5, 0.75, 1.0)
SEEDS = (0, 1, 2)
DEFAULT_CACHE = Path("build/probe")


@dataclass
class Setup:
    """The inputs that all objectives of a probe share."""

    start: CompactEDSR
    photographs: list[Photograph]
    pairs: list[Pair]
    recipe: Recipe = field(default_factory=Recipe)
    cache: Path | None = None
    """Folder in which L1's networks are kept."""

    @classmethod
    @functools.lru_cache(maxsize=1)
    def load(
        cls,
        start: Path,
        images: Path,
        validation: Path,
        recipe: Recipe | None = None,
        cache: Path | None = None,
        crop: int = 0,
    ) -> Setup:
        pictures = training(images), degraded(validation, crop)
        return cls(load_network(start), *pictures, recipe or Recipe(), cache)

    def key(self) -> str:
        """A digest of the start network, the pictures and the recipe."""
        whole = hashlib.sha256(json.dumps(asdict(self.recipe)).encode())
        for name, value in self.start.state_dict().items():
            whole.update(name.encode() + value.numpy().tobytes())
        for photograph in self.photographs:
            whole.update(photograph.name.encode() + str(photograph.pixels.shape).encode())
            whole.update(photograph.pixels[::16, ::16].tobytes())
        for pair in self.pairs:
            whole.update(pair.name.encode() + pair.gt[::8, ::8].tobytes() + pair.lr.tobytes())
        return whole.hexdigest()[:12]


def l1_run(seed: int, setup: Setup) -> tuple[CompactEDSR, dict[str, Any]]:
    """The network of L1 alone and its row, from the cache if it is there."""
    stem = None
    if setup.cache is not None:
        stem = setup.cache / f"l1-{setup.key()}-{seed}"
        if stem.with_suffix(".json").exists():
            row = json.loads(stem.with_suffix(".json").read_text())
            return load_network(stem.with_suffix(".safetensors")), row
    tuned = fine_tune(
        setup.start, None, 0.0, setup.photographs, setup.recipe, seed, f"L1 seed {seed}"
    )
    found = quality.judge({"": tuned.network}, setup.pairs, quality.judges())[""]
    row = {
        "seed": seed,
        "seconds_per_step": round(tuned.step_seconds, 4),
        "loss_seconds": round(tuned.loss_seconds, 5),
        **quality.mean(found),
    }
    if stem is not None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        save_network(stem.with_suffix(".safetensors"), tuned.network)
        write_whole(stem.with_suffix(".json"), (json.dumps(row, indent=1) + "\n").encode())
    return tuned.network, row


def probe(
    objective: Term,
    seed: int,
    setup: Setup,
    *,
    ratio: float = 1.0,
    alphas: Sequence[float] = ALPHAS,
    label: str = "",
) -> dict[str, Any]:
    """Probes one objective with one seed.

    Returns:
        ``seed``, ``ratio``, ``weight``, ``seconds_per_step`` and ``loss_seconds`` (medians),
        ``l1`` (the row of L1 alone: ``psnr``, ``ssim``, ``stlpips``, means over the validation
        pictures), and ``points``, a row of the same for each alpha, the last the network itself.
    """
    l1_network, l1_row = l1_run(seed, setup)
    weight = ratio * unit_weight(objective, setup.start, setup.photographs, setup.recipe)
    tuned = fine_tune(
        setup.start, objective, weight, setup.photographs, setup.recipe, seed,
        label or f"seed {seed}",
    )  # fmt: skip
    networks = {f"{alpha:g}": mixed(l1_network, tuned.network, alpha) for alpha in alphas}
    found = quality.judge(networks, setup.pairs, quality.judges())
    points = [{"alpha": float(alpha), **quality.mean(rows)} for alpha, rows in found.items()]
    return {
        "seed": seed,
        "ratio": ratio,
        "weight": weight,
        "seconds_per_step": round(tuned.step_seconds, 4),
        "loss_seconds": round(tuned.loss_seconds, 5),
        "l1": l1_row,
        "points": points,
    }


# ---- the command ----


@dataclass(frozen=True)
class Work:
    """One training of the command, which can run in its own process."""

    name: str
    ratio: float
    seed: int
    start: Path
    images: Path
    validation: Path
    recipe: Recipe
    cache: Path
    crop: int

    def run(self) -> dict[str, Any]:
        torch.set_num_threads(1)
        setup = Setup.load(
            self.start, self.images, self.validation, self.recipe, self.cache, self.crop
        )
        if self.name == objectives.L1:
            return {"objective": self.name, **l1_run(self.seed, setup)[1]}
        identity = f"{objectives.identity(self.name)} {self.ratio:g} {self.seed} {setup.key()}"
        file = self.cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
        if file.exists():
            return json.loads(file.read_text())
        label = f"{objectives.label(self.name)} x{self.ratio:g} seed {self.seed}"
        row = probe(objectives.build(self.name), self.seed, setup, ratio=self.ratio, label=label)
        row = {"objective": objectives.label(self.name), **row}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, (json.dumps(row, indent=1) + "\n").encode())
        return row


def line(label: str, row: dict[str, Any], seconds: float | None, against: Any = None) -> str:
    """A table's line as text; ``against`` is L1's row of the same seed."""
    text = f"{label:<44}  {row['psnr']:>7.3f}  {row['ssim']:.4f}  {row['stlpips']:.4f}"
    if against is not None:
        text += f"  {row['psnr'] - against['psnr']:>+7.3f}"
        text += f"  {row['stlpips'] - against['stlpips']:>+8.4f}"
    return text + ("" if seconds is None else f"  {seconds:6.3f} s a step")


def show(row: dict[str, Any]) -> None:
    label = f"{row['objective']} x{row['ratio']:g}, seed {row['seed']}"
    for point in row["points"]:
        seconds = row["seconds_per_step"] if point["alpha"] == 1 else None
        print(line(f"{label}, alpha {point['alpha']:g}", point, seconds, row["l1"]))
    sys.stdout.flush()


def run(works: Sequence[Work], jobs: int) -> list[dict[str, Any]]:
    """The rows of the trainings, L1's first, in ``jobs`` processes of one thread each."""
    first = {work.seed: work for work in reversed(works)}
    base = [Work(**{**vars(w), "name": objectives.L1, "ratio": 0.0}) for w in first.values()]
    rows: list[dict[str, Any]] = []
    print(f"{'':<44}     PSNR    SSIM  ST-LPIPS  and less L1's")
    if jobs == 1:
        for work in base:
            row = work.run()
            print(line(f"L1, seed {work.seed}", row, row["seconds_per_step"]), flush=True)
        for work in works:
            rows.append(work.run())
            show(rows[-1])
        return rows
    with concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        for work, row in zip(base, pool.map(Work.run, base), strict=True):
            print(line(f"L1, seed {work.seed}", row, row["seconds_per_step"]), flush=True)
        for row in pool.map(Work.run, works):
            rows.append(row)
            show(row)
    return rows


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--start", type=Path, required=True, metavar="FILE")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="to train on")
    parser.add_argument("--validation", type=Path, required=True, metavar="DIR")
    parser.add_argument("--features", nargs="+", default=[], metavar="NAME_OR_FILE")
    parser.add_argument("--variant", nargs="+", choices=("n", "c"), default=["n"])
    parser.add_argument("--objectives", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--ratio", nargs="+", type=float, default=[1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--patch", type=int, default=Recipe.patch)
    parser.add_argument("--crop", type=int, default=0, help="judge the middle of so many pixels")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows, too")
    args = parser.parse_args(words)
    names = list(args.objectives)
    names += [f"mghf-{v}:{f}" for f in args.features for v in args.variant]
    if not names:
        parser.error("give --features or --objectives")
    recipe = Recipe(args.steps, args.batch, args.patch)
    works = [
        Work(
            name, ratio, seed, args.start, args.images, args.validation, recipe, args.cache,
            args.crop,
        )
        for name in names
        for ratio in args.ratio
        for seed in args.seeds
    ]  # fmt: skip
    try:
        for name in names:
            objectives.build(name)  # reports a wrong name now and not in an hour
        rows = run(works, args.jobs)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
