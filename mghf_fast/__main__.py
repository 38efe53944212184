"""`python -m mghf_fast` is the command `mghf-fast`."""

import sys

from .commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
