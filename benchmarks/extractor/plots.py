"""The page's drawings, as SVG that suits light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from benchmarks.plots import STYLE, Line, figure

from .sensitivity import UNITS
from .subjects import RANDOM, TRAINED
from .verdicts import select

WIDTH, LEFT, ROW, HEAD = 640, 170, 26, 34
COLOUR = {TRAINED: "a", RANDOM: "b"}


class Bar(NamedTuple):
    """A bar of the mean of ``values``, in per cent, with their range."""

    label: str
    style: str
    values: Sequence[float]


def bars(groups: Mapping[str, Sequence[Bar]]) -> str:
    """Groups of horizontal bars, 0 to 100 %."""
    height = sum(HEAD + ROW * len(group) for group in groups.values()) + 10
    scale = (WIDTH - LEFT - 60) / 100
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
        f"<style>{STYLE}.back{{fill:#8882}}</style>",
    ]
    y = 0
    for title, group in groups.items():
        out.append(f'<text class="title" x="0" y="{y + 20}">{escape(title)}</text>')
        y += HEAD
        for bar in group:
            mean = sum(bar.values) / len(bar.values)
            low, high = min(bar.values), max(bar.values)
            middle = y + 9
            out.append(
                f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(bar.label)}</text>'
                f'<rect class="back" x="{LEFT}" y="{y}" width="{100 * scale:.1f}" height="18"/>'
                f'<rect class="{bar.style}" x="{LEFT}" y="{y}" width="{mean * scale:.1f}" '
                f'height="18" stroke="none"/>'
            )
            if len(bar.values) > 1:
                a, b = LEFT + low * scale, LEFT + high * scale
                out.append(
                    f'<path d="M{a:.1f} {middle}H{b:.1f}M{a:.1f} {middle - 5}v10M{b:.1f} '
                    f'{middle - 5}v10" stroke="#818b98" stroke-width="1.5"/>'
                )
            end = LEFT + max(high, mean) * scale + 8
            out.append(f'<text x="{end:.1f}" y="{y + 13}">{mean:.1f} %</text>')
            y += ROW
    return "\n".join([*out, "</svg>\n"])


def retrieval(part: Mapping[str, Any]) -> str:
    groups: dict[str, list[Bar]] = {}
    names = list(dict.fromkeys(row["subject"] for row in part["rows"]))
    titles = {
        "region": "Nearest neighbour of the same region",
        "photograph": "Nearest neighbour of another region, of the same photograph",
        "probe": "Linear probe for the photograph",
    }
    for key, title in titles.items():
        groups[f"{title}, without colour"] = [
            Bar(
                name,
                COLOUR.get(name, "c"),
                [100 * row[key] for row in select(part, subject=name, images="grey")],
            )
            for name in names
        ]
    return bars(groups)


def sensitivity(part: Mapping[str, Any]) -> str:
    """The loss over the level of each distortion, relative to the strongest level."""
    panels = []
    for distortion, levels in part["levels"].items():
        lines = []
        for name, style, metric in (
            (f"MGHF-n, {TRAINED}", "a", "MGHF-n"),
            (f"MGHF-n, {RANDOM}", "b", "MGHF-n"),
            ("MSE", "c", "MSE"),
        ):
            subject = name.rpartition(", ")[2]
            rows = select(part, subject=subject, metric=metric)
            means = [
                sum(row["curve"][distortion][i] for row in rows) / len(rows)
                for i in range(len(levels))
            ]
            points = [(x, y) for x, y in zip(levels, means, strict=True) if y > 0]
            lines.append(Line(name, style, points))
        panels.append((f"{distortion} ({UNITS[distortion]})", "", lines))
    return figure(panels, len(panels))
