"""``python -m mghf_fast.demo``."""

from __future__ import annotations

import argparse

from .command import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="mghf-fast demo")
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
