"""The page's curves, ST-LPIPS over PSNR, as an SVG that suits light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from benchmarks.plots import STYLE

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 60, 250, 34, 44
COLOURS = (
    "#218bff", "#e5534b", "#2da44e", "#bf8700", "#8250df", "#d4499a", "#1b9aaa", "#6e7781",
)  # fmt: skip
LEGEND = 18


class Curve(NamedTuple):
    """Points (x, y), the first common to all curves; a ``strong`` curve is drawn thicker."""

    legend: str
    points: Sequence[tuple[float, float]]
    strong: bool = False


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from ``low`` to ``high``."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def curves(title: str, x_name: str, y_name: str, lines: Sequence[Curve]) -> str:
    """An SVG of lines over linear axes, each with its legend at the right."""
    (x0, x1), (y0, y1) = (
        _range([point[i] for line in lines for point in line.points]) for i in (0, 1)
    )
    height = max(HEIGHT, TOP + LEGEND * len(lines) + BOTTOM)
    right, bottom = WIDTH - RIGHT, height - BOTTOM

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (right - LEFT)

    def py(y: float) -> float:
        return bottom - (y - y0) / (y1 - y0) * (bottom - TOP)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
        f"<style>{STYLE}.strong{{stroke-width:3.5}}</style>",
        f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>',
    ]
    for y in _ticks(y0, y1):
        out.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{right}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:.6g}</text>')
    for x in _ticks(x0, x1):
        out.append(f'<path class="grid" d="M{px(x):.1f} {TOP}V{bottom}"/>')
        out.append(f'<text x="{px(x):.1f}" y="{bottom + 16}" text-anchor="middle">{x:.6g}</text>')
    middle = (LEFT + right) / 2
    out.append(
        f'<text x="{middle}" y="{bottom + 34}" text-anchor="middle">{escape(x_name)}</text>'
        f'<text x="{LEFT - 6}" y="{TOP - 4}" text-anchor="end">{escape(y_name)}</text>'
    )
    for i, line in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        dash = ' stroke-dasharray="5 3"' if i >= len(COLOURS) else ""
        strong = ' class="strong"' if line.strong else ""
        places = [(px(x), py(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places)
        level = TOP + 10 + LEGEND * i
        out.append(
            f'<g stroke="{colour}" fill="{colour}"><polyline{strong} points="{path}"{dash}/>{dots}'
            f'<path{strong} d="M{right + 14} {level - 4}h20" stroke-width="2"{dash}/></g>'
            f'<text x="{right + 40}" y="{level}">{escape(line.legend)}</text>'
        )
    return "\n".join([*out, "</svg>\n"])
