"""Tar files in webdataset's layout: each sample is a picture and its label in ``.cls`` under the
same name. The headers are read once; then pictures can be read in any order, so that shuffling and
resuming work as for single files."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from .pictures import SUFFIXES
from .settings import PretrainError

LABEL_SUFFIX = ".cls"
MOST_CLASSES = 1_000_000


class _Place(NamedTuple):
    """Where the bytes of a picture are."""

    shard: int
    start: int
    length: int


def _samples(path: Path) -> Iterator[tuple[str, tarfile.TarInfo, int]]:
    """Name, picture and label of each sample of a shard.

    Raises:
        PretrainError: the tar file is compressed, broken or truncated, or a label is not a number.
    """
    pictures: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isreg():
                    continue
                name = PurePosixPath(member.name)
                # In webdataset a sample's name ends at the first dot of the last path component.
                stem, _, suffix = name.name.partition(".")
                key = str(name.with_name(stem)) if stem else member.name
                suffix = f".{suffix.lower()}"
                if suffix in SUFFIXES:
                    pictures[key] = member
                elif suffix == LABEL_SUFFIX:
                    file = shard.extractfile(member)
                    text = b"" if file is None else file.read(64)
                    try:
                        labels[key] = int(text)
                    except ValueError:
                        raise PretrainError(
                            f"{path}: the label {member.name} is {text[:20]!r}; it must be a whole "
                            "number"
                        ) from None
                    if not 0 <= labels[key] < MOST_CLASSES:
                        raise PretrainError(
                            f"{path}: the label {member.name} is {labels[key]}; allowed are 0 to "
                            f"{MOST_CLASSES - 1}"
                        )
            end = max((m.offset_data + m.size for m in pictures.values()), default=0)
            if end > path.stat().st_size:
                raise PretrainError(f"{path} is not a whole tar file")
    except tarfile.TarError as error:
        raise PretrainError(f"{path} is not a whole, uncompressed tar file: {error}") from error
    except OSError as error:
        raise PretrainError(f"{path} cannot be read: {error.strerror or error}") from error
    for key, picture in pictures.items():
        if key not in labels:
            raise PretrainError(f"{path}: {picture.name} has no label {key}{LABEL_SUFFIX}")
        yield key, picture, labels[key]


class Shards:
    """The samples of tar files; the classes are the numbers from 0 to the largest label.

    Raises:
        PretrainError: a shard is not a complete tar file, a picture has no label, or a class has no
            pictures.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._places: list[_Place] = []
        self.names: list[str] = []
        labels: list[int] = []
        digest = hashlib.sha256()
        for number, path in enumerate(self._paths):
            for key, picture, label in _samples(path):
                self._places.append(_Place(number, picture.offset_data, picture.size))
                self.names.append(f"{path.name}:{picture.name}")
                labels.append(label)
                digest.update(
                    f"{key}\0{label}\0{picture.size}\n".encode("utf-8", "surrogateescape")
                )
        self.labels = np.array(labels, dtype=np.int64)
        counts = np.bincount(self.labels) if labels else np.zeros(0, dtype=np.int64)
        if len(counts) < 2:
            raise PretrainError(
                f"--data: {len(counts)} classes in the shards; at least 2 are needed"
            )
        if not counts.all():
            empty = int(np.flatnonzero(counts == 0)[0])
            raise PretrainError(
                f"--data: class {empty} has no pictures, though there are labels up to "
                f"{len(counts) - 1}"
            )
        self.classes = tuple(str(label) for label in range(len(counts)))
        self._digest = digest.hexdigest()

    def read(self, index: int) -> bytes:
        place = self._places[index]
        # Opened for each picture, so that processes do not share a file position.
        with self._paths[place.shard].open("rb") as file:
            file.seek(place.start)
            return file.read(place.length)

    def description(self) -> dict[str, Any]:
        return {"source": "shards", "digest": self._digest}
