"""Tables and plots of README and docs/benchmarks.md, from the committed results:
`python -m benchmarks.report`.

A block between `<!-- benchmarks: KIND of MACHINE -->` and `<!-- benchmarks: end -->` is a function
of `results/MACHINE.json` alone; while there is no such file it stays as it is. The blocks "on GPUs"
and "short on GPUs" are of all results that `make gpu` wrote, and say so while there are none.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

from . import gpu_tables, short
from .cases import PAPER, SIZES, TRAINING, Shape
from .plots import Line, figure
from .results import Row, Run, exponent, fastest, load, select, value
from .text import TITLES, cell, part_of, speed, table

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- benchmarks: (\w+) of (\S+) -->\n).*?(<!-- benchmarks: end -->)", re.S)
ON_GPUS = re.compile(
    r"(<!-- benchmarks: (short )?on GPUs -->\n).*?(<!-- benchmarks: end -->)", re.S
)
PAGES = ("README.md", "docs/benchmarks.md")

PAPER_ROWS: list[tuple[str, str, Shape, str]] = [
    ("Sinkhorn plan, forward", "sinkhorn", PAPER, "forward"),
    ("invertible block, forward", "coupling", PAPER, "forward"),
    ("DECLoss, 8192 patches", "dec", Shape(2, 512), "step"),
    *[(title, op, PAPER, part_of(op)) for op, title in TITLES.items() if op != "dec"],
]
PAPER_ROWS.sort(key=lambda row: list(TITLES).index(row[1]))

# ---- rows of a run ----

Pick = Callable[[Run, str, Shape, str], Row | None]


def ours(run: Run, op: str, shape: Shape, part: str, form: str = "mghf_fast") -> Row | None:
    return fastest(select(run, op=op, shape=str(shape), form=form), part)


def best(run: Run, op: str, shape: Shape, part: str, kind: str) -> Row | None:
    return fastest(select(run, op=op, shape=str(shape), kind=kind), part)


def vgg16(run: Run, op: str, shape: Shape, part: str, compiled: bool = False) -> Row | None:
    rows = [row for row in select(run, op=op, shape=str(shape)) if "VGG-16" in row["form"]]
    return fastest([row for row in rows if row["form"].endswith("compile") == compiled], part)


LINES: list[tuple[str, str, Pick]] = [
    ("mghf_fast", "a", ours),
    ("eager", "b", functools.partial(best, kind="eager")),
    ("torch.compile", "c", functools.partial(best, kind="compile")),
    ("VGG-16", "d", vgg16),
]


def line(run: Run, op: str, key: str, name: str) -> tuple[list[tuple[Shape, float]], float | None]:
    """One figure of a form over the sizes, and its exponent."""
    part, pick = part_of(op), {n: p for n, _, p in LINES}[name]
    found = [(shape, value(pick(run, op, shape, part), part, key)) for shape in SIZES]
    points = [(shape, y) for shape, y in found if y]
    return points, exponent([(shape.size**2, y) for shape, y in points])


# ---- blocks ----


def paper(run: Run) -> str:
    """The ops and the steps at the paper's size."""
    rows = []
    for title, op, shape, part in PAPER_ROWS:
        own = ours(run, op, shape, part)
        others = [best(run, op, shape, part, kind) for kind in ("eager", "compile")]
        faster = ", ".join(filter(None, (speed(other, own, part) for other in others)))
        text = [cell(row, part) for row in (*others, own)]
        rows.append([title, *text[:2], f"**{text[2]}**" if text[2] else "", faster])
    step = (run, "mghf_c", PAPER, "step")
    half = ours(*step, "mghf_fast bfloat16")
    rows.append(["the same in bfloat16", "", "", cell(half, "step"), ""])
    vgg = [cell(vgg16(*step, compiled), "step") for compiled in (False, True)]
    rows.append(["VGG-16 perceptual step, for comparison", *vgg, "", ""])
    own, machine = ours(run, "sinkhorn", PAPER, "forward"), run["machine"]
    peers = [
        f"{row['form']} {cell(row, 'forward')} ({speed(row, own, 'forward')})"
        for row in select(run, op="sinkhorn", shape=str(PAPER), kind="peer")
    ]
    file = f"benchmarks/results/{machine['name']}.json"
    return (
        table(["512 x 512", "best eager", "torch.compile", "mghf_fast", "faster than each"], rows)
        + f"\n{machine['cpu']} ({machine['isa']}), {machine['threads']} threads, torch "
        f"{machine['torch']}, float32, one pair of images, 128 feature maps. Medians of forward "
        "and backward, forward alone where it says so and for the entropy; the memory is the peak "
        "above the inputs. Eager is the reference under autograd, in NCHW or channels_last, "
        "whichever is faster. Other Sinkhorns, forward: "
        f"{'; '.join(peers) or 'none'}. All rows: [{file}]({file}).\n"
    )


def sizes(run: Run) -> str:
    """Every op over image sizes and at a training shape, with the fitted exponents."""
    rows = []
    for op, title in TITLES.items():
        for name, _, pick in LINES:
            found = [pick(run, op, shape, part_of(op)) for shape in (*SIZES, TRAINING)]
            cells = [cell(row, part_of(op), "<br>") for row in found]
            if any(cells):
                fits = [line(run, op, key, name)[1] for key in ("median_s", "peak_mib")]
                text = ", ".join(f"{p:.2f}" for p in fits if p is not None)
                label = f"{title}, {name}" if pick is ours else name
                rows.append([label, *cells, text])
    head = ["", *(f"{s.size} x {s.size}" for s in SIZES), "8 x 128 x 128", "exponents"]
    return (
        "<details><summary>Every op over image sizes: time, peak memory, exponents</summary>\n\n"
        + table(head, rows)
        + "\nForward and backward (entropy: forward). Time, then memory, grow as pixels to the "
        "power of the exponent, a fit over the single images.\n\n</details>\n"
    )


def panel(run: Run, op: str, key: str) -> tuple[str, str, list[Line]]:
    what, unit = {"median_s": ("time", "s"), "peak_mib": ("peak memory", "MiB")}[key]
    lines = []
    for name, style, pick in LINES:
        points, p = line(run, op, key, name)
        rows = [(shape.size, pick(run, op, shape, part_of(op))) for shape in SIZES]
        missing = [f", {cell(row, part_of(op))} at {size}" for size, row in rows
                   if row is not None and value(row, part_of(op)) is None]  # fmt: skip
        legend = name + ("" if p is None else f", exponent {p:.2f}") + "".join(missing[:1])
        if points:
            lines.append(Line(legend, style, [(shape.size, y) for shape, y in points]))
    return f"{TITLES[op].strip('*')}: {what}", unit, lines


def plots(run: Run) -> dict[str, str]:
    """SVG files by name."""
    both, name = ("median_s", "peak_mib"), run["machine"]["name"]
    ops = [op for op in TITLES if not op.startswith("mghf")]
    return {
        f"{name}-step.svg": figure([panel(run, "mghf_c", key) for key in both], 2),
        f"{name}-ops.svg": figure([panel(run, op, key) for key in both for op in ops], 4),
    }


def pictures(run: Run) -> str:
    text = "time and peak memory over the side of the image"
    return "".join(
        f'<img src="docs/assets/{file}" alt="{file.split("-")[-1][:-4]}: {text}">\n'
        for file in plots(run)
    )


BLOCKS = {"paper": paper, "sizes": sizes, "plots": pictures, "short": short.short}


def linked(text: str, page: str) -> str:
    """A block's links, which are those of the top folder, as a page has them."""
    if not page.startswith("docs/"):
        return text
    return text.replace("](benchmarks/", "](../benchmarks/").replace('src="docs/', 'src="')


def generate(text: str, page: str = "README.md") -> tuple[str, dict[str, str]]:
    """A page with its blocks as the committed results give them, and the plots by file name."""
    files: dict[str, str] = {}

    def block(match: re.Match[str]) -> str:
        begin, kind, machine, end = match.groups()
        if (run := load(machine)) is None:
            return match[0]
        files.update(plots(run))
        return begin + linked(BLOCKS[kind](run), page) + end

    def of_gpus(match: re.Match[str]) -> str:
        content = short.on_gpus() if match[2] else gpu_tables.block()
        return match[1] + linked(content, page) + match[3]

    return MARKED.sub(block, ON_GPUS.sub(of_gpus, text)), files


def update() -> None:
    """Rewrites the pages and the plots."""
    for page in PAGES:
        path = ROOT / page
        text, files = generate(path.read_text(), page)
        path.write_text(text)
        for name, svg in files.items():
            (ROOT / "docs" / "assets" / name).write_text(svg)


if __name__ == "__main__":
    update()
