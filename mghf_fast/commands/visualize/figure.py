"""Turns the analysis into sections of panels, for a picture or a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from . import canvas, colours
from .analysis import PATCH, Analysis, Comparison
from .pictures import Picture

GAP = 12

TERM_NAMES = {
    "naive": "MGHF-n",
    "csc_mse": "weighted MSE",
    "csc_correlation": "correlation",
    "csc_gram": "Gram",
    "lip": "LIP",
}


@dataclass(frozen=True)
class Panel:
    """A picture with a caption above it."""

    label: str
    image: Image.Image


@dataclass(frozen=True)
class Section:
    """Panels under a heading, arranged in rows of the page's width."""

    title: str
    text: str
    panels: list[Panel]


def tile_width(width: int, columns: int) -> int:
    return (width - (columns - 1) * GAP) // columns


def sections(pictures: Sequence[Picture], found: Analysis, maps: int, width: int) -> list[Section]:
    """All sections, in order.

    Args:
        pictures: the analysed pictures.
        maps: number of feature maps to show, at least 2.
        width: width of a row of panels, pixels.
    """
    result = [
        _pictures(pictures, found, width),
        _features(pictures, found, maps, width),
        _bars(pictures, found, width),
    ]
    if found.comparison is not None:
        result.append(_terms(pictures, found.comparison, width))
        if found.comparison.links:
            result.append(_links(pictures, found.comparison, width))
    return result


def _pictures(pictures: Sequence[Picture], found: Analysis, page: int) -> Section:
    if found.comparison is None:
        panel = Panel(pictures[0].name, _shown(pictures[0], tile_width(page, 2)))
        return Section("The picture", "", [panel])
    width = tile_width(page, 3)
    gt, sr = (_shown(picture, width) for picture in pictures)
    comparison = found.comparison
    total = comparison.terms["total"]
    rows = [
        (name, _figure(comparison.weighted[term], total), comparison.weighted[term] / total)
        if total
        else (name, "0", 0.0)
        for term, name in TERM_NAMES.items()
        if term in comparison.weighted
    ]
    chart = canvas.shares_chart(rows, width, max(gt.height, 210), f"MGHF-c {total:.4g}, made of")
    return Section(
        "The pictures and their distance",
        "The loss of the second against the first; its terms with the preset's weights.",
        [
            Panel(f"{pictures[0].name} (ground truth)", gt),
            Panel(pictures[1].name, sr),
            Panel("", chart),
        ],
    )


def _figure(value: float, total: float) -> str:
    return f"{value:.3g}  ({100 * value / total:.1f} %)"


def _shown(picture: Picture, width: int) -> Image.Image:
    return canvas.fitted(canvas.photograph(picture.image), width)


def shown_maps(order: Sequence[int], kept: int, count: int) -> list[int]:
    """Positions in ``order`` of the maps to show: mostly the most important kept ones; a quarter
    (at least one) are the least important pruned ones."""
    channels = len(order)
    count = min(count, channels)
    pruned = min(channels - kept, max(1, count // 4))
    first = min(kept, count - pruned)
    return [*range(first), *range(channels - (count - first), channels)]


def _features(pictures: Sequence[Picture], found: Analysis, maps: int, page: int) -> Section:
    features = found.features[0]
    before, after = [], []
    positions = shown_maps(found.order.tolist(), found.kept, maps)
    width = tile_width(page, min(len(positions), 8))
    for position in positions:
        index = int(found.order[position])
        weight = float(found.weights[position])
        values = features[index] - features[index].mean()
        # One scale for both, so that the weight is visible as contrast.
        limit = colours.upper(values, 0.985) * float(found.weights[0])
        raw = canvas.to_image(colours.signed(values, limit))
        before.append(Panel(f"map {index}", canvas.fitted(raw, width)))
        if position < found.kept:
            weighted = canvas.to_image(colours.signed(weight * values, limit))
            after.append(Panel(f"x {weight:.2f}", canvas.fitted(weighted, width)))
        else:
            after.append(Panel("pruned", _blank(width, before[-1].image.height)))
    whose = f" of {pictures[0].name}" if len(pictures) > 1 else ""
    text = (
        f"Detail features{whose} before (above) and after entropy weighting: {found.kept} of "
        f"{len(features)} maps are kept, the most important first; the last ones shown are "
        "pruned. A column has one scale, so that the weight is visible as contrast."
    )
    panels: list[Panel] = []
    for i in range(0, len(before), 8):
        panels += before[i : i + 8] + after[i : i + 8]
    scale = [(colours.SIGNED, "below the map's mean", "above")]
    panels.append(Panel("", canvas.scale_bars(scale, page)))
    return Section("Feature maps and their weights", text, panels)


def _blank(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), "#f1f2f4")
    draw = ImageDraw.Draw(image)
    for x in range(-height, width, 12):
        draw.line([(x, height), (x + height, 0)], "#e0e3e6", width=2)
    return image


def _bars(pictures: Sequence[Picture], found: Analysis, width: int) -> Section:
    order = found.order.tolist()
    entropy = [sum(float(e[i]) for e in found.entropy) / len(found.entropy) for i in order]
    shade = [canvas.BLUE if i < found.kept else canvas.GREY for i in range(len(order))]
    low = max(0.0, min(float(e.min()) for e in found.entropy) - 0.08)
    low = int(low * 10) / 10
    marks = [
        ([float(e[i]) for i in order], colour)
        for e, colour in zip(found.entropy, (canvas.TEXT, canvas.ORANGE), strict=False)
    ]
    step = 0.1 if low > 0.3 else 0.2
    ticks = [low + i * step for i in range(int((1 - low) / step + 1e-6) + 1)]
    entropies = canvas.bars(
        entropy, shade, width, 150, low=low, high=1.0, ticks=[round(t, 3) for t in ticks],
        dots=marks if len(pictures) > 1 else (),
    )  # fmt: skip
    weights = [float(w) for w in found.weights]
    high = max(weights) * 1.04
    step = 0.1 if high < 1.6 else 0.25
    ticks = [round(1 + i * step, 3) for i in range(int((high - 1) / step + 1e-6) + 1)]
    shown = canvas.bars(
        [max(w, 1.0) for w in weights], shade, width, 130, low=1.0, high=max(high, 1.05),
        ticks=ticks,
    )  # fmt: skip
    both = (
        f" (bars: mean of the two; black {pictures[0].name}, orange {pictures[1].name})"
        if len(pictures) > 1
        else ""
    )
    text = (
        f"A bar for each of the {len(order)} maps, most important first: blue are the "
        f"{found.kept} that the loss keeps, grey the pruned ones."
    )
    return Section(
        "Entropy and weight of every map",
        text,
        [
            Panel(f"normalised entropy{both}", entropies),
            Panel("weight (1 + alpha importance)^gamma", shown),
        ],
    )


def _terms(pictures: Sequence[Picture], comparison: Comparison, page: int) -> Section:
    width = tile_width(page, 4)
    picture = pictures[1].image
    panels = []
    for term, name in {**TERM_NAMES, "total": "all of them, weighted"}.items():
        if term not in comparison.shares:
            continue
        over = colours.signed_over if term == "csc_gram" else colours.heat_over
        image = canvas.to_image(over(picture, comparison.shares[term]))
        value = comparison.terms[term]
        panels.append(Panel(f"{name}: {value:.3g}", canvas.fitted(image, width)))
    gradient = canvas.to_image(colours.heat_over(picture, comparison.gradient))
    panels.append(Panel("gradient to the pixels", canvas.fitted(gradient, width)))
    error = (pictures[1].image - pictures[0].image).square().mean(0)
    plain = canvas.to_image(colours.heat_over(picture, error))
    panels.append(Panel(f"pixel MSE: {float(error.mean()):.2g}", canvas.fitted(plain, width)))
    legend = [
        (colours.HEAT, "little", "much"),
        (colours.SIGNED, "Gram: takes back", "adds"),
    ]
    panels.append(Panel("", canvas.scale_bars(legend, page)))
    text = (
        "The mean of a heat map over the picture is its term, without its weight; the one of all "
        "of them is their weighted sum. Every map has its own scale."
    )
    return Section("Where the terms come from", text, panels)


def _links(pictures: Sequence[Picture], comparison: Comparison, page: int) -> Section:
    width = (page - 4 * GAP) // 2
    first, second = (_shown(picture, width) for picture in pictures)
    factor = width / pictures[0].image.shape[2]

    def centre(patch: int) -> tuple[float, float]:
        top, left = comparison.corners[patch]
        return (left + PATCH / 2) * factor, (top + PATCH / 2) * factor

    strengths = [link.strength for link in comparison.links]
    low, high = min(strengths), max(strengths)
    spread = (high - low) or 1.0
    drawn = [
        (centre(link.key), centre(link.query), (link.strength - low) / spread)
        for link in comparison.links
    ]
    panel = canvas.links_panel(first, second, drawn, PATCH * factor, 4 * GAP)
    text = (
        f"Of the {len(comparison.corners)} patches of {pictures[1].name} (right) the "
        f"{len(drawn)} with the strongest link to another place of {pictures[0].name} (left): its "
        "hardest negative. Mean plan of all maps; a uniform plan would give every pair 1, these "
        f"get {low:.2f} (dark) to {high:.2f} (bright)."
    )
    return Section("The transport plan's strongest links", text, [Panel("", panel)])
