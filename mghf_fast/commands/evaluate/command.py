"""``mghf-fast evaluate``: its options."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pictures import Pair

# The names in measures.MEASURES, which --help must not import.
METRICS = (
    "psnr_y, ssim_y, psnr_y_full, psnr_rgb, ssim_rgb, stlpips_alex, stlpips_vgg, niqe, niqe_hr, "
    "hf_error, hf_energy, hf_correlation, sharpness"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to ``parser``."""
    parser.add_argument(
        "sr", type=Path, metavar="SR", help="a super-resolved picture, or a folder of them"
    )
    parser.add_argument(
        "hr",
        type=Path,
        metavar="HR",
        help="its ground truth of the same size, or a folder with a picture of each name (suffixes "
        "such as _x4 or _SR may differ)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="also write all figures as JSON; - for the standard output"
    )
    parser.add_argument(
        "--border",
        type=int,
        default=0,
        metavar="N",
        help="pixels cut off on each side (default: %(default)s; for bicubic benchmarks often "
        "the scale)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=4.0,
        metavar="S",
        help="the super-resolution factor, from which the band of the high frequencies follows "
        "(default: %(default)g)",
    )
    parser.add_argument(
        "--metrics",
        metavar="LIST",
        help=f"comma-separated, among (default: all whose package is installed): {METRICS}",
    )
    parser.add_argument("--force", action="store_true", help="replace the FILE of --json")


def run(args: argparse.Namespace) -> int:
    """Measures every pair and prints the table.

    Raises:
        ValueError, OSError: the user's mistakes, each in a sentence.
        ModuleNotFoundError: a package of the extra ``evaluate`` is missing.
    """
    if args.border < 0:
        raise ValueError(f"--border is {args.border}; it must be at least 0")
    if not (args.scale > 1 and math.isfinite(args.scale)):
        raise ValueError(f"--scale is {args.scale:g}; it must be above 1")

    from ..files import refusal, write_whole
    from . import measures, pictures, report

    target = None if args.json in (None, "-") else Path(args.json)
    selection = measures.select(args.metrics)
    pairs = pictures.pair(args.sr, args.hr)
    if target is not None:
        _check_target(target, args.force, pairs)
    pictures.check_sizes(pairs, args.border)
    meter = measures.Meter(selection.names, args.border, args.scale)

    def show(*lines: str) -> None:
        # Standard output is reserved for the JSON.
        print(*lines, sep="\n", file=sys.stderr if args.json == "-" else sys.stdout, flush=True)

    last = f"mean of {len(pairs)}"
    table = report.Table(selection.names, [*(p.name for p in pairs), last])
    show(*table.heading())
    rows = []
    for p in pairs:
        (sr, clear_sr), (hr, clear_hr) = pictures.read(p.sr), pictures.read(p.hr)
        height, width = hr.shape[:2]
        row = report.Row(
            p.name, str(p.sr), str(p.hr), width, height, meter(sr, hr), clear_sr or clear_hr
        )
        rows.append(row)
        show(table.row(p.name, row.values))
    if len(rows) > 1:
        show(table.row(last, report.mean(rows, selection.names)))
    texts = report.notes(rows, selection, args.border, args.scale)
    show("", *report.notes_text(texts))

    if args.json is not None:
        facts = report.to_json(rows, selection, args.border, args.scale)
        text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
        if target is None:
            sys.stdout.write(text)
        else:
            try:
                write_whole(target, text.encode())
            except OSError as error:
                raise OSError(refusal(target, error)) from error
            show(f"Written: {target}")
    return 0


def _check_target(path: Path, force: bool, pairs: list[Pair]) -> None:
    """Checks that ``--json`` may be written to ``path``, before anything is computed."""
    if path.is_dir():
        raise IsADirectoryError(f"--json {path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--json {path}: there is no folder {path.parent}")
    if not path.exists():
        return
    if any(path.samefile(file) for p in pairs for file in (p.sr, p.hr)):
        raise ValueError(f"--json {path} is one of the pictures")
    if not force:
        raise FileExistsError(f"--json {path} exists already; --force replaces it")
