"""``mghf-fast table5``: its options."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cost import ROWS

ROUNDS = 5
LIMIT = 90.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to ``parser``."""
    add = parser.add_argument
    rows = ", ".join(ROWS)
    add(
        "--size",
        type=int,
        default=512,
        metavar="N",
        help="image side, pixels (default: %(default)s)",
    )
    add("--rows", nargs="+", metavar="ROW", choices=ROWS, help=f"of {rows} (default: all)")
    add("--rounds", type=int, default=ROUNDS, metavar="N",
        help="timed steps at most (default: %(default)s)")  # fmt: skip
    add("--threads", type=int, metavar="N",
        help="CPU threads for PyTorch (default: its own choice)")  # fmt: skip
    add("--limit", type=float, default=LIMIT, metavar="S",
        help="seconds a variant may take, with compiling (default: %(default).0f)")  # fmt: skip
    add("--skip-memory", action="store_true", help="measure time alone")
    add("--skip-compile", action="store_true", help="leave torch.compile out")
    add("--json", metavar="FILE", help="write everything as JSON; - prints it instead of the table")


def run(arguments: argparse.Namespace) -> int:
    """Counts, measures and prints.

    Raises:
        ValueError: an option's value that is not allowed.
    """
    _check(arguments)
    from . import table

    return table.run(arguments)


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("size", 32), ("rounds", 1), ("threads", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    if not arguments.limit > 0:
        raise ValueError(f"--limit is {arguments.limit}; it must be above 0 seconds")
    if arguments.json not in (None, "-") and not Path(arguments.json).resolve().parent.is_dir():
        raise ValueError(f"--json is {arguments.json!r}; its folder does not exist")
