"""The before/after crops: where they are taken, and the strip that shows them side by side."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .metrics import luminance
from .output import GENERATOR
from .photographs import Pixels
from .pipeline import BICUBIC, L1, MGHF, Result

CROP = 96
"""Side of a crop, pixels."""
COLUMNS = (("LR, bicubic", BICUBIC), ("L1", L1), ("MGHF-c", MGHF), ("ground truth", None))


def busiest_window(gt: Pixels, side: int = CROP) -> tuple[int, int]:
    """Top and left of the window with the largest sum of gradient magnitudes.

    It looks at the ground truth alone, so no method's result can choose what is shown.
    """
    dy, dx = np.gradient(luminance(gt))
    sums = np.pad(np.hypot(dy, dx).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    window = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(np.argmax(window), window.shape)
    return int(top), int(left)


def crops(result: Result, index: int) -> list[tuple[str, Pixels]]:
    """Label and crop, in the order of ``COLUMNS``, of held-out photograph ``index``."""
    gt = result.held_out[index].gt
    top, left = busiest_window(gt)
    shown = []
    for label, method in COLUMNS:
        picture = gt if method is None else result.pictures[method][index]
        shown.append((label, picture[top : top + CROP, left : left + CROP]))
    return shown


def png(pixels: Pixels) -> bytes:
    """``pixels`` as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def comparison_strip(result: Result, zoom: int = 2) -> bytes:
    """All crops in one labelled PNG: a row for each photograph, a column for each method."""
    gap, header, tile = 6, 30, CROP * zoom
    rows = len(result.held_out)
    size = (4 * tile + 5 * gap, header + rows * (tile + gap))
    strip = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(size=17)
    for row in range(rows):
        for column, (label, crop) in enumerate(crops(result, row)):
            x, y = gap + column * (tile + gap), header + row * (tile + gap)
            if row == 0:
                draw.text((x + tile / 2, header / 2), label, "black", font=font, anchor="mm")
            image = Image.fromarray(np.ascontiguousarray(crop))
            strip.paste(image.resize((tile, tile), Image.Resampling.NEAREST), (x, y))
    about = PngInfo()
    about.add_text("Software", GENERATOR)
    buffer = io.BytesIO()
    strip.save(buffer, "PNG", optimize=True, pnginfo=about)
    return buffer.getvalue()
