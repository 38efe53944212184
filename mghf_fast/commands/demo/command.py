"""``mghf-fast demo``: its options."""

from __future__ import annotations

import argparse
from pathlib import Path

from .settings import FINE_TUNE_STEPS, DemoSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to ``parser``."""
    parser.add_argument(
        "--steps",
        type=int,
        default=FINE_TUNE_STEPS,
        metavar="N",
        help="fine-tuning steps of each training (default: %(default)s)",
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
        "--from-scratch",
        action="store_true",
        help="train the start network first, briefly, instead of using the shipped one",
    )
    parser.add_argument(
        "--ablation",
        action="store_true",
        help="instead of the comparison: the rows of the paper's Tables 4 and 6 (each term of the "
        "loss alone and together, a VGG loss, LPIPS), 11 trainings in all; writes ablation.json",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of everything random: same seed, same numbers (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads for PyTorch (default: its own choice; 1 is often faster if busy)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo; returns 0. A user's mistakes raise errors, which the command line reports."""
    settings = DemoSettings(
        out=args.out,
        images=args.images,
        steps=args.steps,
        seed=args.seed,
        threads=args.threads,
        from_scratch=args.from_scratch,
    )
    from . import run as run_demo
    from . import run_ablation

    if args.ablation:
        run_ablation(settings)
    else:
        run_demo(settings)
    return 0
