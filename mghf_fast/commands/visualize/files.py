"""Writes the sections as a picture or a page."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from ..files import refusal, write_whole
from . import canvas
from .figure import GAP, Panel, Section

GENERATOR = "mghf-fast visualize"
SUFFIXES = (".png", ".html")
MARGIN = 28
LABEL, BODY, HEADING, TITLE = 13, 14, 20, 26


def check_target(path: Path, force: bool, inputs: list[Path]) -> None:
    """Checks that the result may be written to ``path``, before anything is computed.

    Raises:
        ValueError: another kind of file, or one of the pictures themselves.
        OSError: ``path`` exists and ``force`` is not given, or its folder does not exist.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out must end in .png or .html, got {str(path)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"--out {path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: there is no folder {path.parent}")
    if any(path.exists() and source.exists() and path.samefile(source) for source in inputs):
        raise ValueError(f"--out {path} is one of the pictures")
    if path.exists() and not force:
        raise FileExistsError(f"--out {path} exists already; --force replaces it")


@dataclass(frozen=True)
class Document:
    """The result to write; ``width`` is the width of a row of panels in pixels, ``small`` limits
    pictures to 256 colours."""

    title: str
    text: str
    sections: list[Section]
    width: int
    small: bool = False

    def save(self, path: Path) -> None:
        """Writes the picture or the page atomically.

        Raises:
            OSError: the system refuses.
        """
        content = page(self) if path.suffix.lower() == ".html" else picture(self)
        try:
            write_whole(path, content)
        except OSError as error:
            raise OSError(refusal(path, error)) from error


def _png(image: Image.Image, small: bool) -> bytes:
    about = PngInfo()
    about.add_text("Software", GENERATOR)
    buffer = io.BytesIO()
    if small:
        image = image.quantize(palette=_palette(image), dither=Image.Dither.NONE)
    image.save(buffer, "PNG", optimize=True, pnginfo=about)
    return buffer.getvalue()


def _palette(image: Image.Image) -> Image.Image:
    """White and 255 colours chosen from about every ninth pixel; using all would take 10 s."""
    size = (image.width // 3 + 1, image.height // 3 + 1)
    sample = image.resize(size, Image.Resampling.NEAREST)
    colours = sample.quantize(255, Image.Quantize.MEDIANCUT, kmeans=2).getpalette() or []
    # Pillow maps colours only approximately, but the background must be white.
    triples = [colours[i : i + 3] for i in range(0, len(colours), 3)]
    others = [value for triple in triples if min(triple) < 245 for value in triple]
    palette = Image.new("P", (1, 1))
    palette.putpalette([255, 255, 255, *others])
    return palette


def picture(document: Document) -> bytes:
    """One PNG."""
    whole = document.width + 2 * MARGIN
    height = 2 * MARGIN + _draw(None, document)
    image = Image.new("RGB", (whole, height), canvas.PAGE)
    _draw(image, document)
    return _png(image, document.small)


def _draw(image: Image.Image | None, document: Document) -> int:
    """Draws everything and returns its height; with None it only measures the height."""
    draw = None if image is None else ImageDraw.Draw(image)
    width = document.width
    y = MARGIN

    def lines(content: str, size: int, colour: str) -> None:
        nonlocal y
        for line in canvas.wrapped(content, size, width):
            if draw is not None:
                canvas.write(draw, (MARGIN, y), line, size, colour)
            y += canvas.line_height(size)

    lines(document.title, TITLE, canvas.TEXT)
    lines(document.text, BODY, canvas.MUTED)
    for section in document.sections:
        y += 26
        if draw is not None:
            draw.line([(MARGIN, y), (MARGIN + width, y)], canvas.RULE)
        y += 18
        lines(section.title, HEADING, canvas.TEXT)
        if section.text:
            lines(section.text, BODY, canvas.MUTED)
        y += 8
        for row in rows(section, width):
            labelled = any(panel.label for panel in row)
            below = y + (canvas.line_height(LABEL) + 2 if labelled else 0)
            x = MARGIN
            for panel in row:
                if draw is not None and image is not None:
                    if panel.label:
                        label = canvas.wrapped(panel.label, LABEL, panel.image.width)
                        shown = label[0] + ("..." if len(label) > 1 else "")
                        canvas.write(draw, (x, y), shown, LABEL, canvas.MUTED)
                    image.paste(panel.image, (x, below))
                x += panel.image.width + GAP
            y = below + max(panel.image.height for panel in row) + GAP
    return y - MARGIN


def rows(section: Section, width: int) -> list[list[Panel]]:
    """The panels in rows, as many per row as fit."""
    result: list[list[Panel]] = []
    used = width + 1
    for panel in section.panels:
        if used + panel.image.width > width:
            result.append([])
            used = 0
        result[-1].append(panel)
        used += panel.image.width + GAP
    return result


CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #f4f5f6; color: #1d2126;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: var(--width); margin: 0 auto; padding: 28px; background: #fff; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 34px 0 4px; padding-top: 18px; border-top: 1px solid #dfe3e7; }
p { margin: 4px 0 12px; color: #5d6670; overflow-wrap: anywhere; }
.panels { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-end; }
figure { margin: 0; max-width: 100%; }
figcaption { font-size: .85rem; color: #5d6670; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: auto; }
"""


def page(document: Document) -> bytes:
    """One self-contained HTML file."""
    parts = []
    for section in document.sections:
        figures = "".join(_figure(section, panel, document.small) for panel in section.panels)
        parts.append(
            f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>"
            f'<div class="panels">{figures}</div>'
        )
    title = html.escape(document.title)
    style = f":root {{ --width: {document.width}px; }}{CSS}"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{GENERATOR}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>
<h1>{title}</h1><p>{html.escape(document.text)}</p>
{"".join(parts)}
</main></body></html>
""".encode()


def _figure(section: Section, panel: Panel, small: bool) -> str:
    data = base64.b64encode(_png(panel.image, small)).decode()
    caption = f"<figcaption>{html.escape(panel.label)}</figcaption>" if panel.label else ""
    width = panel.image.width
    # The caption is as wide as its picture, so that it widens no row.
    return (
        f'<figure style="width:{width}px">{caption}<img src="data:image/png;base64,{data}" '
        f'width="{width}" height="{panel.image.height}" '
        f'alt="{html.escape(panel.label or section.title)}"></figure>'
    )
