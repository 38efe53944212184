"""The memory a piece of work adds to the process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int | None:
    """Resident memory of this process; None where the system does not tell (not Linux)."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _return_free_memory() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Context manager: the largest rise of resident memory over its level at entry.

    Sampled every 5 ms, except within :meth:`paused`. Free memory goes back to the system first, so
    that work done earlier does not hide the rise.
    """

    rise: int | None = None
    """Bytes, after the block; None where the system does not tell."""

    def __enter__(self) -> PeakMemory:
        _return_free_memory()
        self._base = resident_bytes()
        self._peak = self._base or 0
        self._watching = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._base is not None:
            self._thread.start()
        return self

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the work within, and what the allocator would keep of its memory."""
        self._watching = False
        yield
        _return_free_memory()
        self._watching = True

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            if self._watching:
                level = resident_bytes() or 0
                if self._watching:  # a pause may have begun before the level was read
                    self._peak = max(self._peak, level)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._base is not None:
            self._stop.set()
            self._thread.join()
            self.rise = self._peak - self._base
