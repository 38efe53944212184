"""Log-log plots as small SVG files, without a library; equal numbers give equal bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, LEGEND = 380, 250, 74, 50, 34, 30, 15
COLOURS = {"a": "#218bff", "b": "#e5534b", "c": "#bf8700", "d": "#2da44e"}  # on white and on black
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#818b98}.title{font-size:13px;font-weight:600}"
    ".grid{stroke:#8888;stroke-width:.5}polyline{fill:none;stroke-width:2}"
) + "".join(f".{name}{{stroke:{c};fill:{c}}}" for name, c in COLOURS.items())


class Line(NamedTuple):
    """A curve of (x, y) points; ``style`` is a key of COLOURS."""

    legend: str
    style: str
    points: Sequence[tuple[float, float]]


def figure(panels: Sequence[tuple[str, str, Sequence[Line]]], columns: int) -> str:
    """An SVG file of (title, unit of y, lines) panels."""
    width, height = columns * WIDTH, math.ceil(len(panels) / columns) * HEIGHT
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    parts = [
        f'<g transform="translate({i % columns * WIDTH} {i // columns * HEIGHT})">{panel(*p)}</g>'
        for i, p in enumerate(panels)
    ]
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def panel(title: str, unit: str, lines: Sequence[Line]) -> str:
    out = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>']
    xs = sorted({x for line in lines for x, _ in line.points})
    ys = [math.log10(y) for line in lines for _, y in line.points]
    low, high = math.floor(min(ys, default=0)), math.floor(max(ys, default=0)) + 1
    span = math.log10(xs[-1] / xs[0]) if len(xs) > 1 else 1
    top = TOP + LEGEND * len(lines)

    def px(x: float) -> float:
        return LEFT + math.log10(x / xs[0]) / span * (WIDTH - LEFT - RIGHT)

    def py(logarithm: float) -> float:
        return top + (high - logarithm) / (high - low) * (HEIGHT - BOTTOM - top)

    for power in range(low, high + 1):
        y = py(power)
        text = f"{10.0**power:,.10g} {unit}"
        out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for x in xs:
        out.append(f'<text x="{px(x):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{x:g}</text>')
    for i, (legend, style, points) in enumerate(lines):
        y = TOP + LEGEND * i
        places = [f"{px(x):.1f},{py(math.log10(v)):.1f}" for x, v in points]
        dots = "".join('<circle cx="{}" cy="{}" r="2.5"/>'.format(*p.split(",")) for p in places)
        out.append(f'<g class="{style}"><path d="M{LEFT} {y - 4}h14" stroke-width="3"/>')
        out.append(f'<polyline points="{" ".join(places)}"/>{dots}</g>')
        out.append(f'<text x="{LEFT + 19}" y="{y}">{escape(legend)}</text>')
    return "\n".join(out)
