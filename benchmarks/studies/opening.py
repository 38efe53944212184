"""The test pictures, opened once: every network of the protocol on every picture.

There is a file for each picture, so that it can resume. It refuses to begin while a training of the
protocol is missing, and records what was opened, when, and with which objectives and seeds;
afterwards the folder's study allows no other features, seeds and crops. Objectives may be judged
later, as long as none is dropped: the record says which and when, and earlier results do not
change.

``WHOLE`` is a second record of the same networks, without a crop.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mghf_fast.commands.demo.network import CompactEDSR

from . import extractors, objectives, quality
from .pictures import Pair, degraded, real
from .runs import Study, read_json, slug, write_json

SYNTHETIC = ("Set5", "BSD100", "Kodak24", "Urban12")
REAL = ("RealSR", "DRealSR")
SETS = (*SYNTHETIC, *REAL)
TEST, WHOLE = "test", "whole"
"""Names of the records: the study's own, and that of whole pictures."""
WHOLE_SETS = ("Set5", "BSD100")
"""Test sets whose pictures are small enough to be judged whole in minutes."""


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
    """A picture of a test set, to be judged by its own process."""

    study: Study
    folder: Path
    name: str
    index: int
    crop: int
    record: str = TEST

    def run(self) -> dict[str, dict[str, float]]:
        """``found[network][metric]`` of the picture."""
        pair = pairs(self.folder, self.name, self.crop)[self.index]
        path = self.study.out / self.record / self.name / f"{slug(pair.name)}.json"
        rows: dict[str, dict[str, float]] = read_json(path)["networks"] if path.exists() else {}
        networks, by = _judging(self.study)
        missing = {name: network for name, network in networks.items() if name not in rows}
        if missing:
            found = quality.judge(missing, [pair], by)
            rows |= {name: row[pair.name] for name, row in found.items()}
            write_json(path, {"set": self.name, "picture": pair.name, "networks": rows})
        return rows


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _path(study: Study, record: str) -> Path:
    return study.out / ("opened.json" if record == TEST else f"opened-{record}.json")


def open_test(
    study: Study, folder: Path, crop: int, sets: Sequence[str] = SETS, record: str = TEST
) -> list[Opened]:
    """The pictures that are to be judged; records the opening.

    Raises:
        StillClosed: trainings are missing, or the test was opened with another protocol.
    """
    if missing := study.missing():
        raise StillClosed(
            f"the test stays closed: {len(missing)} trainings of the protocol are missing "
            f"({'; '.join(missing[:3])}{'; ...' if len(missing) > 3 else ''})"
        )
    names = list(study.names)
    facts: dict[str, Any] = {
        "features": extractors.identity(study.features),
        "seeds": list(study.seeds),
        "crop": crop,
        "sets": list(sets),
        "second_judge": quality.Lite2.available(),
    }
    path = _path(study, record)
    known = read_json(path) if path.exists() else None
    if known is not None:
        for key, value in facts.items():
            if known[key] != value:
                raise StillClosed(
                    f"the test was opened on {known['opened']} with {key} {known[key]!r}, here it "
                    f"is {value!r}; it is opened once"
                )
        if dropped := [name for name in judged(known) if name not in names]:
            raise StillClosed(
                f"the test was opened on {known['opened']} with {', '.join(dropped)} too, which "
                "must not be dropped afterwards"
            )
    for name in sets:
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder} lacks the test set {name}")
    counts = {name: len(pairs(folder, name, crop)) for name in sets}
    if known is None:
        write_json(path, {"opened": _now(), "objectives": names, **facts, "pictures": counts})
    elif added := [name for name in names if name not in judged(known)]:
        known.setdefault("added", []).append({"opened": _now(), "objectives": added})
        write_json(path, known)
    return [
        Opened(study, folder, name, index, crop, record)
        for name, count in counts.items()
        for index in range(count)
    ]


def of_whole(study: Study) -> Study:
    """The study of the objectives that are judged on whole pictures."""
    names = (objectives.L1, objectives.VGG, objectives.DEFAULT)
    return dataclasses.replace(study, names=tuple(n for n in study.names if n in names))


def open_whole(study: Study, folder: Path) -> list[Opened]:
    """As :func:`open_test`, for the default and the losses to compare with, on whole pictures."""
    return open_test(of_whole(study), folder, 0, WHOLE_SETS, WHOLE)


def judged(record: dict[str, Any]) -> list[str]:
    """The objectives of an opening's record, with those judged later at the end."""
    later = [name for each in record.get("added", []) for name in each["objectives"]]
    return [*record["objectives"], *later]


def opened(
    study: Study, record: str = TEST
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]] | None:
    """The record of the opening and ``found[set][picture][network][metric]``; None before it, or
    while pictures or networks are missing."""
    path = _path(study, record)
    if not path.exists():
        return None
    facts = read_json(path)
    found: dict[str, dict[str, Any]] = {}
    for name in facts["sets"]:
        rows = [read_json(p) for p in sorted((study.out / record / name).glob("*.json"))]
        if len(rows) < facts["pictures"][name]:
            return None
        held = {network.partition("|")[0] for row in rows[:1] for network in row["networks"]}
        if any(row["networks"].keys() != rows[0]["networks"].keys() for row in rows):
            return None
        if not held >= {*study.names}:
            return None
        found[name] = {row["picture"]: row["networks"] for row in rows}
    return facts, found
