"""The memory of this process: its peak during a piece of work, and how much is available."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

_HIGH_WATER, _RESIDENT = "VmHWM", "VmRSS"


def _bytes_of(file: str, field: str) -> int | None:
    """A field of a file in /proc, such as ``VmRSS:  1024 kB``; None if it is missing."""
    try:
        for line in Path(file).read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def resident_bytes() -> int | None:
    """Resident memory of this process; None if the system does not report it (not Linux)."""
    return _bytes_of("/proc/self/status", _RESIDENT)


def available_memory() -> int | None:
    """Bytes available without swapping; None if the system does not report it."""
    return _bytes_of("/proc/meminfo", "MemAvailable")


def _return_freed_memory() -> None:
    """Returns the memory that the allocator keeps for reuse to the system; otherwise it would hide
    a later peak."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water() -> bool:
    """Resets the kernel's high-water mark of resident memory to the present level."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


class PeakMemory:
    """Context manager: the largest rise of resident memory over its level at entry.

    It reads the kernel's high-water mark, so short-lived buffers count too. Freed memory is
    returned to the system first, so that earlier work does not hide the rise. There is one mark per
    process: a nested instance would reset it.
    """

    rise: int | None = None
    """Bytes, set after the block; None if the system does not report it."""

    def __enter__(self) -> PeakMemory:
        _return_freed_memory()
        self._told = _reset_high_water()
        self._base = self._peak = resident_bytes() or 0
        return self

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the work in this context, and the freed memory that it leaves."""
        self._note()
        yield
        _return_freed_memory()
        if self._told:
            _reset_high_water()

    def _note(self) -> None:
        if self._told:
            self._peak = max(self._peak, _bytes_of("/proc/self/status", _HIGH_WATER) or 0)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._note()
        if self._told:
            self.rise = self._peak - self._base


def peak_memory(function: Callable[[], object]) -> int | None:
    """Calls ``function`` once and returns by how many bytes the resident memory peaked above its
    level before the call; None if the system does not report it.

    If the high-water mark cannot be reset (not Linux), the result is right only in a process that
    has not used more memory before.
    """
    before = _most_ever()
    with PeakMemory() as memory:
        function()
    after = _most_ever()
    if memory.rise is not None or before is None or after is None:
        return memory.rise
    return after - before


def _most_ever() -> int | None:
    """The highest resident memory since the process began, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
