"""Directories of picture files: with a folder per class (the layout of ImageFolder), or of any
layout."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .pictures import SUFFIXES
from .settings import PROCEDURAL, PretrainError


def _pictures(folder: Path) -> Iterator[Path]:
    for here, subfolders, names in os.walk(folder, followlinks=True):
        subfolders.sort()
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(here) / name


class Folders:
    """The pictures below ``directory``; the class is the name of the top-level folder.

    Raises:
        PretrainError: fewer than two class folders, or one without pictures.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            folders = sorted(
                entry
                for entry in directory.iterdir()
                if entry.is_dir() and not entry.name.startswith(".")
            )
            if len(folders) < 2:
                raise PretrainError(
                    f"--data {directory} has {len(folders)} folders; each class needs one with its "
                    "pictures, and there must be two classes"
                )
            self.classes = tuple(folder.name for folder in folders)
            self.names: list[str] = []
            labels: list[int] = []
            digest = hashlib.sha256()
            for label, folder in enumerate(folders):
                before = len(self.names)
                for path in _pictures(folder):
                    name = path.relative_to(directory).as_posix()
                    self.names.append(name)
                    digest.update(
                        f"{name}\0{path.stat().st_size}\n".encode("utf-8", "surrogateescape")
                    )
                labels += [label] * (len(self.names) - before)
                if len(self.names) == before:
                    raise PretrainError(
                        f"--data {directory}: the class folder {folder.name!r} has no pictures "
                        f"({', '.join(sorted(SUFFIXES))})"
                    )
        except OSError as error:
            raise PretrainError(
                f"--data {directory} cannot be read: {error.filename}: {error.strerror}"
            ) from error
        self.labels = np.array(labels)
        self._digest = digest.hexdigest()

    def read(self, index: int) -> bytes:
        return (self._directory / self.names[index]).read_bytes()

    def description(self) -> dict[str, Any]:
        return {"source": "folders", "digest": self._digest}


class PlainFolders:
    """All pictures below some directories, without classes.

    Raises:
        PretrainError: a directory is missing or has no pictures.
    """

    def __init__(self, directories: list[Path]) -> None:
        self.classes: tuple[str, ...] = ("picture",)
        self.names: list[str] = []
        self._paths: list[Path] = []
        digest = hashlib.sha256()
        for directory in directories:
            if not directory.is_dir():
                raise PretrainError(
                    f"--data {directory}: there is no such directory; for --objective distances "
                    f"{PROCEDURAL!r} or directories of pictures are allowed"
                )
            before = len(self.names)
            try:
                for path in _pictures(directory):
                    name = path.relative_to(directory).as_posix()
                    digest.update(
                        f"{name}\0{path.stat().st_size}\n".encode("utf-8", "surrogateescape")
                    )
                    self._paths.append(path)
                    self.names.append(str(path))
            except OSError as error:
                raise PretrainError(
                    f"--data {directory} cannot be read: {error.filename}: {error.strerror}"
                ) from error
            if len(self.names) == before:
                raise PretrainError(
                    f"--data {directory} has no pictures ({', '.join(sorted(SUFFIXES))})"
                )
        self.labels = np.zeros(len(self.names), dtype=np.int64)
        self._digest = digest.hexdigest()

    def read(self, index: int) -> bytes:
        return self._paths[index].read_bytes()

    def description(self) -> dict[str, Any]:
        return {"source": "pictures", "digest": self._digest}
