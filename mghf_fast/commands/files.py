"""Atomic writing of files for the commands."""

from __future__ import annotations

import os
from pathlib import Path


def temporary(path: Path) -> Path:
    """The hidden file in the same folder that holds the content until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a complete temporary file to the disk and renames it into place.

    Raises:
        OSError: the system refuses (for example, the disk is full); an earlier file of that name is
            then untouched, and no temporary file is left.
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
    """Writes a renaming to the disk, on systems that can open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refusal(path: Path, error: OSError) -> str:
    """The message for a file that could not be written."""
    return f"{path}: cannot be written ({error.strerror})"


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files of processes that were killed while writing."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
