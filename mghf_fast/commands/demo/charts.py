"""Line charts as inline SVG. Colours are CSS classes, so that they suit light and dark pages."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 42


@dataclass(frozen=True)
class Line:
    """One curve; ``style`` is its CSS class, ``faint`` draws it thin and without a legend."""

    label: str
    style: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average; the window shrinks at both ends."""
    half = window // 2
    smoothed = []
    for i in range(len(values)):
        part = values[max(0, i - half) : i + half + 1]
        smoothed.append(sum(part) / len(part))
    return smoothed


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about ``count`` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return low - pad, high + pad


def _label(value: float) -> str:
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    description: str,
    band: tuple[float, float, str] | None = None,
) -> str:
    """An SVG element with axes, grid, legend and the curves.

    Args:
        description: text for screen readers.
        band: start and end on the x axis of a shaded part, and its label.
    """
    x_low, x_high = (f([v for line in lines for v in line.x]) for f in (min, max))
    if x_high <= x_low:
        x_high = x_low + 1
    y_low, y_high = _range([v for line in lines for v in line.y if math.isfinite(v)] or [0.0])

    def px(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(value: float) -> float:
        return TOP + (y_high - value) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    floor = HEIGHT - BOTTOM
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(description)}">'
    ]
    if band is not None:
        start, end, text = band
        parts.append(
            f'<rect class="band" x="{px(start):.1f}" y="{TOP}" '
            f'width="{px(end) - px(start):.1f}" height="{floor - TOP}"/>'
            f'<text x="{px(end) - 6:.1f}" y="{TOP + 16}" text-anchor="end">'
            f"{html.escape(text)}</text>"
        )
    for tick in ticks(y_low, y_high):
        y = py(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>'
        )
    for tick in ticks(x_low, x_high):
        parts.append(
            f'<text x="{px(tick):.1f}" y="{floor + 16}" text-anchor="middle">{_label(tick)}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>"
        f'<text transform="translate(13 {(TOP + floor) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>"
    )
    for line in lines:
        points = " ".join(
            f"{px(x):.1f},{py(y):.1f}"
            for x, y in zip(line.x, line.y, strict=True)
            if math.isfinite(y)
        )
        style = f"{line.style} faint" if line.faint else line.style
        parts.append(f'<polyline class="line {style}" points="{points}"/>')
    parts.append("</svg>")
    legend = "".join(
        f'<span><i class="{line.style}"></i>{html.escape(line.label)}</span>'
        for line in lines
        if not line.faint
    )
    return f'{"".join(parts)}<div class="legend">{legend}</div>'
