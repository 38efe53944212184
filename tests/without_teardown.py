"""Runs a script as one of several processes, and ends without gloo's teardown, which occasionally
aborts a finished process (torch 2.13): `python without_teardown.py SCRIPT ARGUMENTS`.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist


def leave() -> NoReturn:
    """Ends this process once all others get here, without tearing anything down."""
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> NoReturn:
    script, *sys.argv = sys.argv[1], *sys.argv[1:]
    sys.path[0] = str(Path(script).parent)
    dist.destroy_process_group = lambda group=None: None
    runpy.run_path(script, run_name="__main__")
    leave()


if __name__ == "__main__":
    main()
