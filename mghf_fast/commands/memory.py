"""The memory of this process: how far a piece of work raises it, and how much is to be had."""

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
    """A line of a file below /proc, such as ``VmRSS:  1024 kB``; None where there is none."""
    try:
        for line in Path(file).read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def resident_bytes() -> int | None:
    """Resident memory of this process; None where the system does not tell (not Linux)."""
    return _bytes_of("/proc/self/status", _RESIDENT)


def available_memory() -> int | None:
    """Bytes a new allocation may take without swapping; None where the system is silent."""
    return _bytes_of("/proc/meminfo", "MemAvailable")


def _return_freed_memory() -> None:
    """Hands what the allocator keeps for reuse back to the system, or a later peak would hide in
    it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water() -> bool:
    """Lets the kernel's mark of the highest resident memory start from the present level."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


class PeakMemory:
    """Context manager: the largest rise of resident memory over its level at entry.

    It is the kernel's high-water mark, so a short-lived buffer counts as much as a lasting one.
    Free memory goes back to the system first, so that work done earlier does not hide the rise.
    The mark is the process's: another one of these within the block would reset it.
    """

    rise: int | None = None
    """Bytes, after the block; None where the system does not tell."""

    def __enter__(self) -> PeakMemory:
        _return_freed_memory()
        self._told = _reset_high_water()
        self._base = self._peak = resident_bytes() or 0
        return self

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the work within, and what the allocator would keep of its memory."""
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
    level before the call. None where the system does not tell.

    Where the high-water mark cannot be reset (not Linux), the result is right only in a process
    that has not used more memory before.
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
