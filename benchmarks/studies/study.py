"""The study of what the features are worth: one command, one JSON, one page.

    python -m benchmarks.studies.study --pictures DIR --start FILE --features FILE --out DIR

DIR holds ``train`` (or ``train/BSDS500``), ``test/Set14`` (validation) and the test sets. The
parts, each of which continues where it was stopped:

    minimiser   which picture minimises the distance to several possible truths
    weights     each objective's weight, by seed 0 on the validation pictures
    train       every objective and seed, and the networks that lose 0.3 and 0.5 dB of L1's PSNR
    cost        a step of each loss beside the VGG-16 loss's
    terms       the gradient of each term of MGHF-c beside L1's, over sizes of crops
    ablation    MGHF-c without each term, and each alone: seed 0, on the validation pictures
    grid        a pattern of four pixels in the pictures: seed 0, on the validation pictures

``--open-test`` judges the networks on the test pictures, once, after all trainings;
``--open-whole`` those of the default and the VGG-16 loss on whole pictures of Set5 and BSD100.
``--report`` writes benchmarks/results/<machine>-features.json, docs/features.md and its plot from
the files in --out; without it they are only written to --out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.report import ROOT
from benchmarks.results import RESULTS

from . import cost, extractors, grid, minimiser, objectives, opening, page, terms
from .result import collect
from .runs import Study, write_json
from .tuning import Recipe

PARTS = ("minimiser", "weights", "train", "cost", "terms", "ablation", "grid")
VALIDATION = "Set14"
PAGE = "features.md"
T = TypeVar("T")


def together(
    function: Callable[..., T], arguments: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[T]:
    """The results in order, from ``jobs`` processes of one thread each."""
    if jobs == 1 or len(arguments) < 2:
        for each in arguments:
            yield function(*each)
        return
    with concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        futures = [pool.submit(function, *each) for each in arguments]
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _base(study: Study, seed: int) -> float:
    from .probe import l1_run

    torch.set_num_threads(1)
    return float(l1_run(seed, study.setup())[1]["psnr"])


def weights(study: Study, jobs: int) -> None:
    list(together(_base, [(study, seed) for seed in {0, *study.seeds}], jobs))
    works = [(study, name) for name in study.compared]
    for (_, name), ratio in zip(works, together(Study.choose, works, jobs), strict=True):
        print(f"{name}: gradient {ratio:g} times L1's", flush=True)


def train(study: Study, jobs: int) -> None:
    weights(study, jobs)
    match(study, study.compared, jobs)


def match(study: Study, names: Sequence[str], jobs: int) -> None:
    works = [(study, name, seed) for seed in study.seeds for name in names]
    for (_, name, seed), row in zip(works, together(Study.match, works, jobs), strict=True):
        shown = ", ".join(
            f"alpha {a:.2f}: {p['psnr']:.3f} dB, ST-LPIPS {p['stlpips']:.4f}"
            for a, p in zip(row["alphas"], row["points"], strict=True)
        )
        print(
            f"{name}, seed {seed}: {shown} (L1 {row['l1']['psnr']:.3f} dB, "
            f"{row['l1']['stlpips']:.4f})",
            flush=True,
        )


def run_part(study: Study, part: str, jobs: int) -> None:
    if part == "weights":
        weights(study, jobs)
    elif part == "train":
        train(study, jobs)
    elif part == "minimiser":
        names = ["pixels", *extractors.UNTRAINED, "procedural-v1", study.features, "vgg2", "vgg3"]
        rows = minimiser.table(list(dict.fromkeys(names)), study.validation)
        write_json(study.out / "minimiser.json", rows)
    elif part == "terms":
        write_json(study.out / "terms.json", terms.measure(study, ("2026", objectives.PRESET)))
    elif part == "ablation":
        match(study.of_one_seed(), [row.name for row in objectives.ABLATION], jobs)
    elif part == "grid":
        write_json(study.out / "grid.json", grid.measure(study))
    else:
        write_json(study.out / "cost.json", cost.measure(study, study.compared))


def write(study: Study, publish: bool) -> None:
    """Result, page and plot: into --out, or into the repository."""
    result = collect(study)
    name = f"{result['machine']['name']}-features.json"
    source = ROOT / "docs" / PAGE
    places = (
        (RESULTS / name, source, ROOT / "docs" / "assets" / page.PLOT)
        if publish
        else (study.out / name, study.out / PAGE, study.out / "assets" / page.PLOT)
    )
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
    places[0].write_text(json.dumps(result, indent=1) + "\n")
    places[1].write_text(page.generate(source.read_text(), result))
    if (svg := page.plot(result)) is not None:
        places[2].write_text(svg)
    print(f"Written: {places[0]}, {places[1]}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pictures", type=Path, required=True, metavar="DIR")
    parser.add_argument("--start", type=Path, required=True, metavar="FILE")
    parser.add_argument("--features", required=True, metavar="NAME_OR_FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--objectives", nargs="+", metavar="NAME", help="instead of the study's; F is --features"
    )
    parser.add_argument("--open-test", action="store_true", help="judge the test pictures, once")
    parser.add_argument("--open-whole", action="store_true", help="judge whole pictures, once")
    parser.add_argument("--crop", type=int, default=0, help="the test pictures' middle pixels")
    parser.add_argument("--report", action="store_true", help="publish: JSON, page and plot")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--patch", type=int, default=Recipe.patch)
    return parser


def make(args: argparse.Namespace) -> Study:
    if args.seeds < 1:
        raise ValueError(f"--seeds is {args.seeds}; allowed are 1 and more")
    folder: Path = args.pictures
    train_folder = folder / "train" / "BSDS500"
    names = args.objectives or [row.name for row in objectives.STUDY]
    study = Study(
        out=args.out,
        start=args.start,
        train=train_folder if train_folder.is_dir() else folder / "train",
        validation=folder / "test" / VALIDATION,
        features=args.features,
        names=tuple(dict.fromkeys([objectives.L1, *names])),
        seeds=tuple(range(args.seeds)),
        recipe=Recipe(args.steps, args.batch, args.patch),
    )
    for name in study.compared:
        objectives.build(study.full_name(name))  # reports a wrong name now and not in an hour
    study.prepare()
    return study


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(words)
    try:
        study = make(args)
        if args.open_test or args.open_whole:
            test = args.pictures / "test"
            works = (
                opening.open_test(study, test, args.crop)
                if args.open_test
                else opening.open_whole(study, test)
            )
            chunks = [(each,) for each in works]
            for done, _ in enumerate(together(opening.Opened.run, chunks, args.jobs), 1):
                if done % 10 == 0 or done == len(chunks):
                    print(f"{done} of {len(chunks)} pictures", flush=True)
        elif not args.report or args.only:
            for part in args.only or PARTS:
                print(f"{part} ...", flush=True)
                run_part(study, part, args.jobs)
        write(study, args.report)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
