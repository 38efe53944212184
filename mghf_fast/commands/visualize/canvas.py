"""Drawing with Pillow: text that wraps, pictures fitted into a width, bars, links over a pair."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .colours import HEAT, Colours, scale

PAGE, TEXT, MUTED, RULE = "#ffffff", "#1d2126", "#5d6670", "#dfe3e7"
BLUE, ORANGE, GREY = "#2463c9", "#d4500c", "#b6bdc5"
FINE = 3
"""Lines and bars are drawn at this scale and then reduced, because Pillow's are jagged."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@lru_cache
def font(size: int) -> Font:
    return ImageFont.load_default(size=size)


def to_image(colours: Colours) -> Image.Image:
    """(H, W, 3) in [0, 1]."""
    return Image.fromarray((np.clip(colours, 0, 1) * 255).round().astype(np.uint8))


def photograph(picture: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1]."""
    return to_image(picture.permute(1, 2, 0).cpu().numpy())


def fitted(image: Image.Image, width: int) -> Image.Image:
    """``image`` resized to a width: enlarged by repeating pixels if the factor is an integer, else
    by interpolation; reduced by averaging."""
    height = max(1, round(image.height * width / image.width))
    if width < image.width:
        return image.resize((width, height), Image.Resampling.BOX)
    whole = width % image.width == 0
    return image.resize(
        (width, height), Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC
    )


def wrapped(text: str, size: int, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` pixels; longer words are split."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            while font(size).getlength(word) > width and len(word) > 1:
                fits = next(
                    n for n in range(len(word) - 1, 0, -1)
                    if font(size).getlength(word[:n]) <= width or n == 1
                )  # fmt: skip
                lines += [line] if line else []
                lines.append(word[:fits])
                line, word = "", word[fits:]
            longer = f"{line} {word}".strip()
            if font(size).getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def line_height(size: int) -> int:
    return round(size * 1.45)


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    colour: str = TEXT,
    anchor: str = "la",
) -> None:
    draw.text(place, text, colour, font=font(size), anchor=anchor)


def _fine(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width * FINE, height * FINE), PAGE)
    return image, ImageDraw.Draw(image)


def _reduced(image: Image.Image) -> Image.Image:
    size = (image.width // FINE, image.height // FINE)
    return image.resize(size, Image.Resampling.BOX)


def bars(
    values: Sequence[float],
    colours: Sequence[str],
    width: int,
    height: int,
    *,
    low: float,
    high: float,
    ticks: Sequence[float],
    dots: Sequence[tuple[Sequence[float], str]] = (),
) -> Image.Image:
    """A bar per value, starting at ``low``, with grid lines at ``ticks`` and a mark over every bar
    for each of ``dots``."""
    left, top, bottom = 38, 8, 6

    def y(value: float) -> float:
        share = (value - low) / (high - low)
        return top + (1 - share) * (height - top - bottom)

    fine, draw = _fine(width, height)
    for tick in ticks:
        draw.line([(left * FINE, y(tick) * FINE), (width * FINE, y(tick) * FINE)], RULE, width=FINE)
    step = (width - left) / len(values)
    gap = min(2.0, step * 0.2)
    for i, (value, colour) in enumerate(zip(values, colours, strict=True)):
        x = left + i * step
        box = [x * FINE, y(value) * FINE, (x + step - gap) * FINE, y(low) * FINE]
        draw.rectangle(box, colour)
    for marks, colour in dots:
        radius = max(1.3, min(2.4, step / 3)) * FINE
        for i, value in enumerate(marks):
            x, centre = (left + (i + 0.5) * step - gap / 2) * FINE, y(value) * FINE
            draw.ellipse([x - radius, centre - radius, x + radius, centre + radius], colour)
    image = _reduced(fine)
    draw = ImageDraw.Draw(image)
    for tick in ticks:
        write(draw, (left - 6, y(tick)), f"{tick:g}", 12, MUTED, "rm")
    return image


def shares_chart(
    rows: Sequence[tuple[str, str, float]], width: int, height: int, title: str
) -> Image.Image:
    """A horizontal bar per (name, figure, share of the whole from 0 to 1)."""
    fine, draw = _fine(width, height)
    head, row = 30, (height - 30) / len(rows)
    largest = max((share for *_, share in rows), default=1) or 1
    for i, (_, _, share) in enumerate(rows):
        top = head + i * row + 20
        length = max(share, 0) / largest * width
        draw.rectangle([0, top * FINE, width * FINE, (top + 9) * FINE], "#eef0f2")
        draw.rectangle([0, top * FINE, length * FINE, (top + 9) * FINE], ORANGE)
    image = _reduced(fine)
    draw = ImageDraw.Draw(image)
    write(draw, (0, 4), title, 15)
    for i, (name, figure, _) in enumerate(rows):
        top = head + i * row
        write(draw, (0, top), name, 13)
        write(draw, (width, top), figure, 13, MUTED, "ra")
    return image


def scale_bars(scales: Sequence[tuple[tuple[str, ...], str, str]], width: int) -> Image.Image:
    """Colour scales side by side, each with the meanings of its two ends."""
    image = Image.new("RGB", (width, 18), PAGE)
    draw = ImageDraw.Draw(image)
    place = np.linspace(0, 1, 120, dtype=np.float32)[None].repeat(9, 0)
    x = 0
    for colours, low, high in scales:
        ramp = to_image(scale(place, colours))
        write(draw, (x, 9), low, 12, MUTED, "lm")
        x += round(font(12).getlength(low)) + 8
        image.paste(ramp, (x, 4))
        x += ramp.width + 8
        write(draw, (x, 9), high, 12, MUTED, "lm")
        x += round(font(12).getlength(high)) + 36
    return image


def heat_colour(share: float) -> tuple[int, int, int]:
    """The colour at ``share``, 0 to 1, of the scale's warm half."""
    colour = scale(np.array([[0.35 + 0.65 * share]], dtype=np.float32), HEAT)[0, 0]
    r, g, b = (round(float(c) * 255) for c in colour)
    return r, g, b


def links_panel(
    first: Image.Image,
    second: Image.Image,
    links: Sequence[tuple[tuple[float, float], tuple[float, float], float]],
    patch: float,
    gap: int,
) -> Image.Image:
    """The pair side by side in grey, with a curve for each link from the first to the second.

    Args:
        links: (x, y) of the patch's centre in the first and in the second picture, in pixels of the
            given pictures, and the strength, 0 to 1; the strongest is drawn last.
        patch: side of a patch in the same pixels.
    """
    width, height = first.width + gap + second.width, first.height
    fine = Image.new("RGB", (width * FINE, height * FINE), PAGE)
    for picture, left in ((first, 0), (second, first.width + gap)):
        grey = picture.convert("L").convert("RGB")
        dim = Image.blend(grey, picture, 0.25).point(lambda v: round(v * 0.55))
        size = (picture.width * FINE, picture.height * FINE)
        fine.paste(dim.resize(size, Image.Resampling.BICUBIC), (left * FINE, 0))
    draw = ImageDraw.Draw(fine)
    for place1, place2, share in sorted(links, key=lambda link: link[2]):
        colour = heat_colour(share)
        x1, y1 = place1
        x2, y2 = place2[0] + first.width + gap, place2[1]
        for x, y in ((x1, y1), (x2, y2)):
            box = [v * FINE for v in (x - patch / 2, y - patch / 2, x + patch / 2, y + patch / 2)]
            draw.rectangle(box, outline=colour, width=round((1 + share) * FINE))
        curve = []
        for step in range(41):
            t = step / 40
            ease = t * t * (3 - 2 * t)
            curve.append(((x1 + (x2 - x1) * t) * FINE, (y1 + (y2 - y1) * ease) * FINE))
        draw.line(curve, colour, width=round((1.0 + 1.4 * share) * FINE), joint="curve")
    return _reduced(fine)
