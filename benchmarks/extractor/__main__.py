"""`python -m benchmarks.extractor --weights FILE`: measures, and rewrites docs/extractor.md."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.report import ROOT
from benchmarks.results import RESULTS, this_machine
from mghf_fast import DetailFeatureExtractor
from mghf_fast.demo.settings import DemoSettings
from mghf_fast.measure import machine_facts

from . import finetuning, inversion, page, retrieval, scenes, sensitivity
from .subjects import (
    PIXELS,
    RANDOM,
    TRAINED,
    VGG,
    Subject,
    describe,
    of_extractor,
    random_extractor,
    vgg16,
)
from .verdicts import PARTS

DEFAULT_WEIGHTS = "procedural-v1"


class Sizes(NamedTuple):
    """How much is measured: random extractors of a part, photographs, pixels, steps."""

    seeds: int = 8
    seeds_vgg: int = 3
    seeds_inversion: int = 4
    seeds_sensitivity: int = 5
    seeds_fine_tuning: int = 3
    photographs: int | None = None
    regions: int = retrieval.REGIONS
    inverted: int = inversion.PHOTOGRAPHS
    budget: int = inversion.BUDGET
    side: int = sensitivity.SIDE
    settings: DemoSettings = DemoSettings()


QUICK = Sizes(2, 1, 2, 2, 2, 6, 3, 1, 20, 96, DemoSettings(steps=2, pretrain_steps=2))


class Target(NamedTuple):
    """Where the result, the page and its pictures go."""

    result: Path
    page: Path
    assets: Path


def target(out: Path | None, quick: bool) -> Target:
    """In the repository, or all in one folder; a quick run never replaces a whole one."""
    name = f"{this_machine(torch.get_num_threads())}-extractor.json"
    if out is None and quick:
        out = ROOT / "build" / "extractor"
    if out is None:
        return Target(RESULTS / name, ROOT / "docs" / "extractor.md", ROOT / "docs" / "assets")
    return Target(out / name, out / "extractor.md", out / "assets")


def run_part(
    part: str, trained: DetailFeatureExtractor, sizes: Sizes
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The result of a part, and files for the assets."""
    photographs = scenes.photographs(sizes.photographs)
    if part == "retrieval":
        seeds = range(sizes.seeds)
        subjects = [
            of_extractor(TRAINED, trained),
            *(of_extractor(RANDOM, random_extractor(trained, s), s) for s in seeds),
            *(of_extractor(VGG, vgg16("relu2_2", s), s) for s in range(sizes.seeds_vgg)),
            Subject(PIXELS, lambda image: image),
        ]
        return retrieval.measure(subjects, photographs, regions=sizes.regions), {}
    if part == "inversion":
        windows = scenes.busiest(photographs, inversion.SIDE)[: sizes.inverted]
        facts, strip = inversion.measure(
            trained, windows, range(sizes.seeds_inversion), sizes.budget
        )
        return facts, {page.IMAGES[part][0]: strip}
    if part == "sensitivity":
        windows = scenes.busiest(photographs[: scenes.COLOUR], sizes.side)
        return sensitivity.measure(trained, windows, range(sizes.seeds_sensitivity)), {}
    return finetuning.measure(trained, range(sizes.seeds_fine_tuning), sizes.settings), {}


def write_page(places: Target, result: dict[str, Any] | None) -> None:
    source = places.page if places.page.exists() else ROOT / "docs" / "extractor.md"
    text = page.generate(source.read_text(), result)
    places.assets.mkdir(parents=True, exist_ok=True)
    for name, svg in page.drawings(result or {"parts": {}}).items():
        (places.assets / name).write_text(svg)
    places.page.write_text(text)


def measure(weights: str, parts: list[str], places: Target, sizes: Sizes) -> dict[str, Any]:
    """Measures the parts, and writes result and page whenever one ends."""
    trained = DetailFeatureExtractor.from_pretrained(weights).eval().requires_grad_(False)
    threads = torch.get_num_threads()
    facts = machine_facts(threads)
    machine = {key: facts[key] for key in ("cpu", "cores", "threads", "isa", "torch", "mghf_fast")}
    result: dict[str, Any] = {
        "machine": {"name": this_machine(threads), **machine},
        "weights": describe(trained, weights),
        "parts": {},
    }
    if places.result.exists():
        before = json.loads(places.result.read_text())
        if before["weights"]["sha256"] == result["weights"]["sha256"]:
            result["parts"] = before["parts"]
        else:
            print(
                f"{places.result.name} is of other weights: its parts are measured anew or dropped"
            )
    places.result.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        print(f"{part} ...", flush=True)
        result["parts"][part], files = run_part(part, trained, sizes)
        places.assets.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (places.assets / name).write_bytes(content)
        places.result.write_text(json.dumps(result, indent=1) + "\n")
        write_page(places, result)
    return result


def report(places: Target) -> None:
    """The page anew, from the result that it names."""
    found = page.FROM.search(places.page.read_text())
    path = RESULTS / found[1] if found else None
    result = json.loads(path.read_text()) if path is not None and path.exists() else None
    write_page(places, result)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.extractor", description=__doc__)
    parser.add_argument(
        "--weights",
        default=DEFAULT_WEIGHTS,
        metavar="FILE",
        help="the trained extractor, a .safetensors or a shipped name (default: %(default)s)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="everything goes here instead")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, into build/extractor: does it run at all"
    )
    parser.add_argument("--report", action="store_true", help="only the page, from its result")
    args = parser.parse_args(words)
    places = target(args.out, args.quick)
    if args.report:
        report(places)
        return 0
    parts = [part for part in PARTS if args.only is None or part in args.only]
    try:
        result = measure(args.weights, parts, places, QUICK if args.quick else Sizes())
    except (ValueError, OSError) as error:
        print(f"benchmarks.extractor: {error}", file=sys.stderr)
        return 2
    print(page.verdict(result))
    print(f"Written: {places.result}, {places.page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
