"""The test pictures, opened once: every network of the protocol on every picture.

A file for each picture, so that it resumes. It refuses to begin while a training of the protocol is
missing, and keeps what was opened, when, and by which objectives and seeds; afterwards the folder's
study is closed to others.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mghf_fast.demo.network import CompactEDSR

from . import extractors, quality
from .pictures import Pair, degraded, real
from .runs import Study, read_json, slug, write_json

SYNTHETIC = ("Set5", "BSD100", "Kodak24", "Urban12")
REAL = ("RealSR", "DRealSR")
SETS = (*SYNTHETIC, *REAL)


class StillClosed(ValueError):
    """The test must not be opened yet; the message says what is missing."""


@functools.lru_cache(maxsize=1)
def pairs(folder: Path, name: str, crop: int) -> list[Pair]:
    """The pictures of a test set, with the demo's degradation or the camera's own."""
    return real(folder / name, crop) if name in REAL else degraded(folder / name, crop)


@functools.lru_cache(maxsize=1)
def _judging(study: Study) -> tuple[dict[str, CompactEDSR], dict[str, quality.Judge]]:
    torch.set_num_threads(1)
    return study.networks(), quality.judges(second=quality.Lite2.available())


@dataclass(frozen=True)
class Opened:
    """A picture of a test set to be judged by a process of its own."""

    study: Study
    folder: Path
    name: str
    index: int
    crop: int

    def run(self) -> dict[str, dict[str, float]]:
        """``found[network][metric]`` of the picture."""
        pair = pairs(self.folder, self.name, self.crop)[self.index]
        path = self.study.out / "test" / self.name / f"{slug(pair.name)}.json"
        if path.exists():
            return read_json(path)["networks"]
        networks, by = _judging(self.study)
        found = quality.judge(networks, [pair], by)
        rows = {name: row[pair.name] for name, row in found.items()}
        write_json(path, {"set": self.name, "picture": pair.name, "networks": rows})
        return rows


def open_test(study: Study, folder: Path, crop: int, sets: Sequence[str] = SETS) -> list[Opened]:
    """What is to be judged; records the opening.

    Raises:
        StillClosed: trainings are missing, or it was opened by another protocol.
    """
    if missing := study.missing():
        raise StillClosed(
            f"the test stays closed: {len(missing)} trainings of the protocol are missing "
            f"({'; '.join(missing[:3])}{'; ...' if len(missing) > 3 else ''})"
        )
    facts: dict[str, Any] = {
        "objectives": list(study.names),
        "features": extractors.identity(study.features),
        "seeds": list(study.seeds),
        "crop": crop,
        "sets": list(sets),
        "second_judge": quality.Lite2.available(),
    }
    path = study.out / "opened.json"
    if path.exists():
        known = read_json(path)
        for key, value in facts.items():
            if known[key] != value:
                raise StillClosed(
                    f"the test was opened on {known['opened']} with {key} {known[key]!r}, here it "
                    f"is {value!r}; it is opened once"
                )
    for name in sets:
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder} lacks the test set {name}")
    counts = {name: len(pairs(folder, name, crop)) for name in sets}
    if not path.exists():
        now = datetime.datetime.now(datetime.timezone.utc)
        write_json(
            path, {"opened": now.strftime("%Y-%m-%d %H:%M UTC"), **facts, "pictures": counts}
        )
    return [
        Opened(study, folder, name, index, crop)
        for name, count in counts.items()
        for index in range(count)
    ]


def opened(study: Study) -> tuple[dict[str, Any], dict[str, dict[str, Any]]] | None:
    """The record of the opening and ``found[set][picture][network][metric]``; None before it, or
    while pictures are missing."""
    path = study.out / "opened.json"
    if not path.exists():
        return None
    record = read_json(path)
    found: dict[str, dict[str, Any]] = {}
    for name in record["sets"]:
        rows = [read_json(p) for p in sorted((study.out / "test" / name).glob("*.json"))]
        if len(rows) < record["pictures"][name]:
            return None
        found[name] = {row["picture"]: row["networks"] for row in rows}
    return record, found
