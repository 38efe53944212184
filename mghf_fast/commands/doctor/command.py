"""``mghf-fast doctor``: its options."""

from __future__ import annotations

import argparse
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to ``parser``."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints the report; returns 0 if every available backend computes correctly, else 1."""
    from .examination import examine, report

    facts = examine()
    json_text = json.dumps(facts, indent=2) if arguments.json else report(facts)
    sys.stdout.write(json_text + "\n")
    return 0 if facts["usable"] else 1
