"""The before/after crops, and the strip that shows them side by side."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..pixels import Pixels
from .output import GENERATOR
from .pipeline import GROUND_TRUTH, L1, MGHF, START, Result

COLUMNS = {
    START: "start",
    L1: "L1 alone",
    MGHF: "L1 + MGHF-c",
    GROUND_TRUTH: "ground truth",
}
"""Label of each method's crop, in the order of showing."""


def crops(result: Result, index: int) -> dict[str, Pixels]:
    """Method -> crop of held-out photograph ``index``, in the order of ``COLUMNS``."""
    photograph = result.held_out[index]
    pictures = {method: each[index] for method, each in result.pictures.items()}
    pictures[GROUND_TRUTH] = photograph.gt
    return {method: photograph.window(pictures[method]) for method in COLUMNS}


def png(pixels: Pixels) -> bytes:
    """``pixels`` as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def comparison_strip(result: Result, zoom: int = 2) -> bytes:
    """All crops in one labelled PNG: a row per photograph, a column per method."""
    gap, header, tile = 6, 30, result.held_out[0].side * zoom
    rows = len(result.held_out)
    size = (4 * tile + 5 * gap, header + rows * (tile + gap))
    strip = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(size=17)
    for row in range(rows):
        for column, (method, crop) in enumerate(crops(result, row).items()):
            x, y = gap + column * (tile + gap), header + row * (tile + gap)
            if row == 0:
                middle = (x + tile / 2, header / 2)
                draw.text(middle, COLUMNS[method], "black", font=font, anchor="mm")
            image = Image.fromarray(np.ascontiguousarray(crop))
            strip.paste(image.resize((tile, tile), Image.Resampling.NEAREST), (x, y))
    about = PngInfo()
    about.add_text("Software", GENERATOR)
    buffer = io.BytesIO()
    strip.save(buffer, "PNG", optimize=True, pnginfo=about)
    return buffer.getvalue()
