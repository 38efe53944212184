"""Warnings that point at the user's line, however many modules it called the library through."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

import torch

# As in the code objects: a path that was normalised might not be the prefix of theirs.
_INSIDE = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))


def warn_caller(message: str) -> None:
    """Gives a `UserWarning` at the innermost line that is neither this library's nor PyTorch's,
    whose `nn.Module` puts its own calls in between; without such a line at the outermost one.

    Python 3.12 could do it by ``skip_file_prefixes``.
    """
    level, frame = 1, sys._getframe()
    outer: FrameType | None = frame
    while outer is not None and outer.f_code.co_filename.startswith(_INSIDE):
        outer = outer.f_back
        level += outer is not None
    warnings.warn(message, UserWarning, stacklevel=level)
