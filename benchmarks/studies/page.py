"""Generates docs/features.md from the study's result: tables, a plot and verdicts.

Each block between `<!-- features: KIND -->` and `<!-- features: end -->` is generated from the
result that the page names in `<!-- features: from FILE -->`, a file of benchmarks/results.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.text import table

from . import objectives, opening, plots, quality, verdicts
from .minimiser import CANDIDATES
from .result import CHOSEN, EQUAL, GROUPS
from .runs import TARGETS

FROM = re.compile(r"<!-- features: from (\S+) -->")
BLOCK = re.compile(r"(<!-- features: ([a-z-]+) -->\n).*?(<!-- features: end -->)", re.S)
NOTHING = "Not measured yet.\n"
PLOT = "features-curves.svg"
HOW = {
    EQUAL: " (\\*: not every seed's network loses so much PSNR; the figure is where it ends)",
    CHOSEN: ", the networks as chosen on the validation pictures, whatever PSNR they have here",
}

Result = Mapping[str, Any]


def protocol(result: Result) -> str:
    facts, machine = result["protocol"], result["machine"]
    name = f"{machine['name']}-features.json"
    seeds = len(facts["seeds"])
    return (
        f"Trained features: `{facts['features']}`. {seeds} seed{'s' if seeds > 1 else ''}, "
        f"{facts['steps']} steps of {facts['batch']} crops of {facts['patch']} x {facts['patch']}; "
        f"start network `{facts['start'][:16]}`; {machine['cpu']}, torch {machine['torch']}. All "
        f"figures: [benchmarks/results/{name}](../benchmarks/results/{name}).\n"
    )


def minimiser(result: Result) -> str:
    rows = result["minimiser"]
    cases = list(dict.fromkeys((row["side"], row["shift"]) for row in rows))
    body = []
    for name in dict.fromkeys(row["features"] for row in rows):
        by_case = {(r["side"], r["shift"]): r for r in rows if r["features"] == name}
        body.append(
            [
                name,
                *(
                    f"{by_case[c]['hf_energy']:.2f}, {by_case[c]['psnr']:.2f}, "
                    f"{by_case[c]['curvature']:.3g}"
                    if c in by_case
                    else ""
                    for c in cases
                ),
            ]
        )
    head = ["features", *(f"{side} pixels, shifts to {shift:g}" for side, shift in cases)]
    return (
        f"{CANDIDATES} candidates a crop. In each cell: high-frequency energy of the minimiser "
        "relative to the candidates' own; its PSNR to the nearest, dB; curvature.\n\n"
        f"{table(head, body)}"
    )


def validation(result: Result) -> str:
    rows = result["validation"]
    seeds = len(result["protocol"]["seeds"])
    return _validation(rows, result["titles"], seeds) if rows else NOTHING


def ablation(result: Result) -> str:
    """As :func:`validation`, for MGHF-c without each term and for each term alone; one seed."""
    rows = result["ablation"]
    titles = {objectives.L1: "L1", **{row["objective"]: row["title"] for row in rows}}
    return _validation(rows, titles, 1)


def _validation(rows: list[dict[str, Any]], titles: Mapping[str, str], seeds: int) -> str:
    body = [[titles[objectives.L1], "", "", f"{rows[0]['l1'][quality.PRIMARY]:.4f}", ""]]
    for row in rows:
        cells = []
        for i, _ in enumerate(TARGETS):
            point = row["points"][i]
            loss = row["l1"]["psnr"] - point["psnr"]
            short = "" if row["reached"][i] == seeds else f" ({loss:.2f} dB lost)"
            cells.append(f"{point[quality.PRIMARY]:.4f}{short}")
        body.append(
            [
                titles[row["objective"]],
                f"{row['ratio']:g}",
                f"{row['full_loss']:.2f}",
                *cells,
            ]
        )
    head = ["objective", "gradient, times L1's", "PSNR lost by the whole network, dB"]
    head += [f"ST-LPIPS at -{t:g} dB" for t in TARGETS]
    return table(head, body)


def _difference(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    (row,) = rows
    star = "" if row["reached"] >= 1 else " *"
    return f"{row['mean']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f}){star}"


def test_pictures(result: Result) -> str:
    """Differences at equal PSNR, for the real degradations also as chosen, and the curves."""
    facts = result["test"]
    parts = []
    for group, how in ((g, h) for g in GROUPS for h in (EQUAL, CHOSEN)):
        if group == "synthetic" and how == CHOSEN:
            continue
        if not verdicts.select(result, group=group):
            continue
        count = sum(facts["pictures"].get(name, 0) for name in GROUPS[group])
        for metric in (quality.PRIMARY, quality.SECOND):
            if not verdicts.select(result, group=group, metric=metric):
                continue
            body = [
                [
                    title,
                    *(
                        _difference(
                            verdicts.select(
                                result, objective=name, against=against, group=group,
                                metric=metric, target=target, how=how,
                            )
                        )
                        for against in (objectives.L1, objectives.VGG)
                        for target in TARGETS
                    ),
                ]
                for name, title in result["titles"].items()
                if name != objectives.L1
            ]  # fmt: skip
            head = ["objective"]
            head += [f"less {o}'s, -{t:g} dB" for o in ("L1", "the VGG loss") for t in TARGETS]
            judge = "ST-LPIPS" if metric == quality.PRIMARY else "Lite2's distance"
            parts.append(
                f"{judge}, {group} degradation, {count} pictures{HOW[how]}:\n\n{table(head, body)}"
            )
    crop = f", the middle {facts['crop']} x {facts['crop']} pixels" if facts["crop"] else ""
    later = "".join(
        f" Added on {each['opened']}, with all that was judged before left as it "
        + "was: "
        + "; ".join(result["titles"][name] for name in each["objectives"])
        + "."
        for each in facts["added"]
    )
    return (
        f"Opened on {facts['opened']}{crop}.{later}\n\n"
        + "\n".join(parts)
        + f'\n<img src="assets/{PLOT}" alt="ST-LPIPS over PSNR">\n'
    )


def whole(result: Result) -> str:
    """Differences at equal PSNR on whole pictures."""
    facts = result["whole"]
    head = ["objective, judge"]
    head += [f"less {o}'s, -{t:g} dB" for o in ("L1", "the VGG loss") for t in TARGETS]
    body = [
        [
            f"{result['titles'][name]}, {judge}",
            *(
                _difference(
                    verdicts.select(
                        result, "whole", objective=name, against=against, metric=metric,
                        target=target, how=EQUAL,
                    )
                )
                for against in (objectives.L1, objectives.VGG)
                for target in TARGETS
            ),
        ]
        for metric, judge in ((quality.PRIMARY, "ST-LPIPS"), (quality.SECOND, "Lite2"))
        for name in (objectives.VGG, objectives.DEFAULT)
        if name in result["titles"]
    ]  # fmt: skip
    count = sum(facts["pictures"].values())
    return f"{count} pictures, opened on {facts['opened']}:\n\n{table(head, body)}"


def grid(result: Result) -> str:
    """The power at the grid's frequencies over that around them."""
    facts = result["grid"]
    titles = {"gt": "truth", **result["titles"]}
    rows = {(row["objective"], row["target"]): row["ratio"] for row in facts["rows"]}
    body = [
        [
            titles[name],
            *(
                f"{rows[name, target]:.2f}" if (name, target) in rows else ""
                for target in (None, *TARGETS)
            ),
        ]
        for name in dict.fromkeys(row["objective"] for row in facts["rows"])
    ]
    return table(["network", "as it is", *(f"-{t:g} dB" for t in TARGETS)], body)


def sets(result: Result) -> str:
    """The means of every set."""
    means = result["test"]["means"]
    names = list(result["test"]["pictures"])
    titles = {"start": "start network", **result["titles"]}
    body = []
    for objective, target in dict.fromkeys((r["objective"], r["target"]) for r in means):
        rows = {r["set"]: r for r in means if (r["objective"], r["target"]) == (objective, target)}
        title = titles[objective] + ("" if target is None else f", -{target:g} dB")
        cells = [
            f"{r['psnr']:.2f}, {r['ssim']:.3f}, {r[quality.PRIMARY]:.4f}"
            for r in (rows[name] for name in names)
        ]
        body.append([title, *cells])
    return "PSNR in dB, SSIM and ST-LPIPS:\n\n" + table(["network", *names], body)


def cost(result: Result) -> str:
    facts = result["cost"]
    body = [
        [
            result["titles"].get(row["objective"], row["objective"]),
            f"{1e3 * row['median_s']:.3g}",
            f"{100 * row['spread']:.0f} %",
            f"{row['of_vgg']:.2g}" if "of_vgg" in row else "",
        ]
        for row in facts["rows"]
    ]
    return (
        f"{facts['batch']} pictures of {facts['side']} x {facts['side']}, {facts['threads']} "
        f"thread, median of {facts['rounds']}.\n\n"
        + table(["loss", "forward and gradient, ms", "spread", "times the VGG loss's"], body)
    )


TERMS = ("naive", "csc_mse", "csc_correlation", "csc_gram", "lip", "total")


def terms(result: Result) -> str:
    """The lengths of the terms' gradients by size of the crops."""
    facts = result["terms"]
    body = [
        [
            f'`"{row["preset"]}"`',
            f"{row['side']}",
            *(f"{row[name]:.3g}" if name in row else "" for name in TERMS),
        ]
        for row in sorted(facts["rows"], key=lambda row: row["preset"])
    ]
    return (
        "Length of a weighted term's gradient in the picture over that of L1's, at weight 1 beside "
        f"it; {facts['batches']} batches of {facts['batch']} crops.\n\n"
        + table(["preset", "crop", *TERMS], body)
    )


BLOCKS: dict[str, Callable[[Result], str]] = {
    "verdict": verdicts.verdict,
    "protocol": protocol,
    "minimiser": minimiser,
    "validation": validation,
    "test": test_pictures,
    "sets": sets,
    "cost": cost,
    "terms": terms,
    "ablation": ablation,
    "whole": whole,
    "grid": grid,
}
NEEDS = {
    "minimiser": "minimiser", "test": "test", "sets": "test", "cost": "cost", "terms": "terms",
    "ablation": "ablation", "whole": "whole", "grid": "grid",
}  # fmt: skip
"""The part of the result that each block needs."""


def plot(result: Result) -> str | None:
    """The curves on the pooled synthetic test sets or, before the test, on the validation set."""
    lines: list[plots.Curve] = []
    facts = result["test"]
    if facts is not None:
        counts = {n: c for n, c in facts["pictures"].items() if n in opening.SYNTHETIC}
        where = "test pictures" if counts else ""
        points: dict[tuple[str, float | None], tuple[float, float]] = {}
        for row in facts["means"]:
            share = counts.get(row["set"], 0) / max(1, sum(counts.values()))
            x, y = points.get((row["objective"], row["target"]), (0.0, 0.0))
            points[row["objective"], row["target"]] = (
                x + share * row["psnr"],
                y + share * row[quality.PRIMARY],
            )
        found = {
            name: [points[objectives.L1, None], *(points[name, t] for t in TARGETS)]
            for name in result["titles"]
            if name != objectives.L1
        }
    else:
        where = "validation pictures"
        found = {
            row["objective"]: [(p["psnr"], p[quality.PRIMARY]) for p in (row["l1"], *row["points"])]
            for row in result["validation"]
        }
    if not found or not where:
        return None
    for name, line in found.items():
        strong = name in (objectives.VGG, objectives.DEFAULT)
        lines.append(plots.Curve(result["titles"][name], line, strong))
    title = f"ST-LPIPS over PSNR, {where}: lower and to the right is better"
    return plots.curves(title, "PSNR, dB", "ST-LPIPS", lines)


def generate(page: str, result: Result | None) -> str:
    """The page with its blocks generated from the result; without one they say so."""

    def block(match: re.Match[str]) -> str:
        begin, kind, end = match.groups()
        missing = result is None or (kind in NEEDS and result[NEEDS[kind]] is None)
        content = NOTHING if missing or result is None else BLOCKS[kind](result)
        return begin + content + end

    if result is not None:
        source = f"<!-- features: from {result['machine']['name']}-features.json -->"
        page = FROM.sub(lambda match: source, page)
    return BLOCK.sub(block, page)
