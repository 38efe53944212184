"""``mghf-fast demo``: its options, and what its errors look like."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .settings import FINE_TUNE_STEPS, DemoError, DemoSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to ``parser``."""
    parser.add_argument(
        "--steps",
        type=int,
        default=FINE_TUNE_STEPS,
        metavar="N",
        help="fine-tuning steps of each of the two trainings (default: %(default)s)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="your own pictures: jpg, png, webp, bmp or tiff, searched recursively, at least 2; "
        "some are held out (default: photographs that come with scikit-image and scikit-learn)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="where report.html, metrics.json and comparison.png go (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of everything random: same seed, same numbers (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads for PyTorch (default: its own choice; 1 is often faster if busy)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    try:
        settings = DemoSettings(
            out=args.out,
            images=args.images,
            steps=args.steps,
            seed=args.seed,
            threads=args.threads,
        )
        from . import run as run_demo

        run_demo(settings)
    except DemoError as error:
        print(f"mghf-fast demo: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "mghf_fast":
            raise  # a fault of ours, not a missing package
        print(
            f'mghf-fast demo: the module {error.name} is missing: pip install "mghf_fast[demo]"',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nmghf-fast demo: interrupted", file=sys.stderr)
        return 130
    return 0
