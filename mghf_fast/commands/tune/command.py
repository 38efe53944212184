"""``mghf-fast tune``: its options."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to ``parser``."""
    parser.add_argument(
        "--clear",
        action="store_true",
        help="forget what was measured and tried on this machine's GPUs",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures and writes the table, or clears it."""
    from . import measurement

    return measurement.run(arguments.clear)
