"""Warnings that point at the user's line, however many modules it called the library through."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from types import FrameType

import torch

# As in the code objects: a path that was normalised might not be the prefix of theirs. The last is
# what torch.compile's graphs are called.
_FOLDERS = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))
_INSIDE = (*_FOLDERS, "<eval_with_key>")
_THREADS = threading.Thread.run.__code__.co_filename


def _is_inside(frame: FrameType) -> bool:
    """Whether the code is this library's or PyTorch's. What Inductor writes lies in any folder, but
    is a module of PyTorch's by name."""
    module = str(frame.f_globals.get("__name__", ""))
    return frame.f_code.co_filename.startswith(_INSIDE) or module.startswith("torch.")


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Gives a warning at the innermost line that is neither this library's nor PyTorch's, whose
    `nn.Module` puts its own calls in between. A thread that runs nothing else has no such line:
    there it is the outermost one of these, not the standard library's that started the thread.

    Python 3.12 could do it by ``skip_file_prefixes``.
    """
    level, frame = 1, sys._getframe()
    while _is_inside(frame):
        if (outer := frame.f_back) is None or outer.f_code.co_filename == _THREADS:
            break
        level, frame = level + 1, outer
    warnings.warn(message, category, stacklevel=level)
