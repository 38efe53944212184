"""How commands write files: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def temporary(path: Path) -> Path:
    """Where this process puts a file's content until it is complete: beside the file, hidden."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file by bringing a complete one to the disk and renaming it into place.

    Raises:
        OSError: the system refuses (a full disk, for one); the earlier file of that name is then
            untouched, and nothing else is left behind.
    """
    unfinished = temporary(path)
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """The renaming itself to the disk, where the system knows folders as files."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refusal(path: Path, error: OSError) -> str:
    """What a user is told of a file that could not be written."""
    return f"{path}: cannot be written ({error.strerror})"


def remove_leftovers(folder: Path) -> None:
    """Removes unfinished files of a process that was killed while it wrote."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
