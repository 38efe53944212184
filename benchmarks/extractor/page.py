"""docs/extractor.md from a result: tables, plots and verdicts between its markers.

A block between `<!-- extractor: KIND -->` and `<!-- extractor: end -->` is a function of the result
that the page names in `<!-- extractor: from FILE -->`, a file of benchmarks/results.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.text import table

from . import plots, verdicts
from .finetuning import L1, MATCHED
from .sensitivity import OCTAVES
from .subjects import RANDOM, TRAINED
from .verdicts import PARTS, VERDICTS, select, span

FROM = re.compile(r"<!-- extractor: from (\S+) -->")
BLOCK = re.compile(r"(<!-- extractor: ([a-z-]+) -->\n).*?(<!-- extractor: end -->)", re.S)
NOTHING = "Not measured yet.\n"
IMAGES = {
    "retrieval": ("extractor-retrieval.svg", "Shares of crops told apart"),
    "inversion": ("extractor-inversion.png", "Photographs and what the features give back"),
    "sensitivity": ("extractor-sensitivity.svg", "The loss over the level of a distortion"),
}

Result = Mapping[str, Any]


def verdict(result: Result) -> str:
    found = {
        part: VERDICTS[part](result["parts"][part]) for part in PARTS if part in result["parts"]
    }
    lines = [f"**{verdicts.headline(found)}**\n"]
    for part in PARTS:
        if part in found:
            lines.append(f"* **{part}** ({found[part].outcome}): {found[part].text}")
        else:
            lines.append(f"* **{part}**: not measured.")
    return "\n".join(lines) + "\n"


def weights(result: Result) -> str:
    facts, machine = result["weights"], result["machine"]
    config = ", ".join(f"{key} {value}" for key, value in facts["config"].items())
    name = f"{machine['name']}-extractor.json"
    return (
        f"`{facts['name']}`, {facts['parameters']:,} parameters ({config}), SHA-256 of the weights "
        f"`{facts['sha256'][:16]}`; {machine['cpu']}, torch {machine['torch']}. All figures: "
        f"[benchmarks/results/{name}](../benchmarks/results/{name}).\n"
    )


def _image(part: str) -> str:
    file, alt = IMAGES[part]
    return f'\n<img src="assets/{file}" alt="{alt}">\n'


def retrieval(result: Result) -> str:
    part = result["parts"]["retrieval"]
    rows = []
    for name in dict.fromkeys(row["subject"] for row in part["rows"]):
        cells = [
            span([row[key] for row in select(part, subject=name, images=images)], 1, 100)
            for images in ("grey", "colour")
            for key in verdicts.QUESTIONS
        ]
        rows.append([name, *cells])
    rows.append(["chance", *[f"{100 * part['chance'][key]:.1f}" for key in verdicts.QUESTIONS] * 2])
    head = [f"{key}{suffix}" for suffix in (", no colour", "") for key in verdicts.QUESTIONS]
    return (
        f"{part['crops']} crops of {part['side']} x {part['side']} from {part['regions']} regions "
        f"of {part['photographs']} photographs.\n\n{table(['per cent right', *head], rows)}"
        f"{_image('retrieval')}"
    )


def inversion(result: Result) -> str:
    part = result["parts"]["inversion"]
    rows = []
    for subject, how in dict.fromkeys((row["subject"], row["how"]) for row in part["rows"]):
        found = select(part, subject=subject, how=how)
        each = [span([row["psnr"][i] for row in found], 1) for i in range(len(part["photographs"]))]
        mean = span([statistics.fmean(row["psnr"]) for row in found], 1)
        rows.append([subject, how, mean, *each])
    head = ["features", "way back", "PSNR, dB", *part["photographs"]]
    return (
        f"{part['side']} x {part['side']} pixels of each photograph; {part['budget']} evaluations "
        f"of features and gradient for every descent.\n\n{table(head, rows)}{_image('inversion')}"
    )


def sensitivity(result: Result) -> str:
    part = result["parts"]["sensitivity"]
    kinds = list(dict.fromkeys((row["metric"], row["subject"]) for row in part["rows"]))
    distortions = [name for name in part["rows"][0]["response"] if name != "noise"]
    first, second = [], []
    for metric, subject in kinds:
        rows = select(part, metric=metric, subject=subject)
        label = metric if metric == "MSE" else f"{metric}, {subject}"
        first.append([label, *(span([r["response"][d] for r in rows], 2) for d in distortions)])
        agreed = [
            span([r["order"][d][0] / r["order"][d][1] for r in rows], 1, 100)
            for d in part["levels"]
        ]
        second.append([label, *agreed, span([verdicts.agreement(r) for r in rows], 1, 100)])
    return (
        f"Response at a PSNR of {part['psnr']:g} dB per unit of MSE, relative to white noise "
        f"({len(part['photographs'])} photographs):\n\n{table(['', *distortions], first)}\n"
        "Pairs of levels in the stated order, per cent:\n\n"
        f"{table(['', *part['levels'], 'all'], second)}\n{octaves(part)}{_image('sensitivity')}"
    )


def octaves(part: Mapping[str, Any]) -> str:
    """What the features answer to each octave."""
    rows = []
    for subject in dict.fromkeys(row["subject"] for row in part["octaves"]):
        found = [row["response"] for row in part["octaves"] if row["subject"] == subject]
        rows.append([subject, *(span(each, 3) for each in zip(*found, strict=True))])
    head = [f"1/{round(1 / low)} to 1/{round(1 / high)}" for low, high in OCTAVES]
    return (
        "Square of the features' change by noise of one octave, cycles a pixel, relative to the "
        f"finest:\n\n{table(['features', *head], rows)}"
    )


def fine_tuning(result: Result) -> str:
    part = result["parts"]["fine-tuning"]
    keys = {
        "hf_correlation": ("HF correlation", 3, 1.0),
        "hf_error": ("HF error, dB", 2, 1.0),
        "hf_energy": ("HF energy, %", 1, 100.0),
        "psnr": ("PSNR, dB", 2, 1.0),
        "ssim": ("SSIM", 4, 1.0),
    }
    rows = []
    for objective in (L1, RANDOM, TRAINED, MATCHED):
        found = select(part, objective=objective)
        cells = [span([r[k] for r in found], d, f) for k, (_, d, f) in keys.items()]
        rows.append([objective, span([r["weight"] for r in found], 2), *cells])
    differences = []
    for objective in (TRAINED, MATCHED):
        cells = []
        for key, (_, digits, factor) in keys.items():
            d = [factor * v for v in verdicts.paired(part, objective, RANDOM, key)]
            spread = statistics.stdev(d) if len(d) > 1 else 0.0
            cells.append(f"{statistics.fmean(d):+.{digits}f} ({spread:.{digits}f})")
        differences.append([f"{objective}, less random", "", *cells])
    count = len({row["seed"] for row in part["rows"]})
    seeds = f"{count} seeds" if count > 1 else "1 seed"
    head = ["objective", "weight", *(name for name, *_ in keys.values())]
    return (
        f"{seeds}, {part['pretrain_steps']} steps on L1, then {part['steps']} with each "
        f"objective; held out: {', '.join(part['held_out'])}. Mean and range over the seeds; of "
        f"the paired differences mean and standard deviation.\n\n{table(head, rows + differences)}"
    )


BLOCKS: dict[str, Callable[[Result], str]] = {
    "verdict": verdict,
    "weights": weights,
    "retrieval": retrieval,
    "inversion": inversion,
    "sensitivity": sensitivity,
    "fine-tuning": fine_tuning,
}


def drawings(result: Result) -> dict[str, str]:
    """SVG files by name."""
    found = {"retrieval": plots.retrieval, "sensitivity": plots.sensitivity}
    return {
        IMAGES[part][0]: draw(result["parts"][part])
        for part, draw in found.items()
        if part in result["parts"]
    }


def generate(page: str, result: Result | None) -> str:
    """The page with its blocks as the result gives them; without one they say so."""

    def block(match: re.Match[str]) -> str:
        begin, kind, end = match.groups()
        missing = result is None or (kind in PARTS and kind not in result["parts"])
        content = NOTHING if missing or result is None else BLOCKS[kind](result)
        return begin + content + end

    if result is not None:
        source = f"<!-- extractor: from {result['machine']['name']}-extractor.json -->"
        page = FROM.sub(lambda match: source, page)
    return BLOCK.sub(block, page)
