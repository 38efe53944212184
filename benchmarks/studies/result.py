"""Collects the study's files in ``--out`` into its one JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.results import this_machine
from mghf_fast.commands.machine import machine_facts

from . import equal, extractors, objectives, opening, quality
from .runs import TARGETS, Study, read_json

GROUPS = {"synthetic": opening.SYNTHETIC, "real": opening.REAL}
L1 = objectives.L1
EQUAL, CHOSEN = "equal", "chosen"
"""At equal PSNR, and the networks chosen on the validation pictures as they are."""


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {k: round(math.fsum(r[k] for r in rows) / len(rows), 5) for k in rows[0]}


def validation(study: Study, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each objective whose seeds are all matched: means over the seeds."""
    rows = []
    for name in names:
        files = [study.match_file(name, seed) for seed in study.seeds]
        if not all(path.exists() for path in files):
            continue
        found = [read_json(path) for path in files]
        rows.append(
            {
                "objective": name,
                "ratio": found[0]["ratio"],
                "weight": float(f"{found[0]['weight']:.4g}"),
                "full_loss": round(
                    math.fsum(r["l1_psnr"] - r["psnr"] for r in found) / len(found), 4
                ),
                "alphas": [
                    round(math.fsum(r["alphas"][i] for r in found) / len(found), 3)
                    for i in range(len(TARGETS))
                ],
                "reached": [sum(r["reached"][i] for r in found) for i in range(len(TARGETS))],
                "l1": _mean([r["l1"] for r in found]),
                "points": [_mean([r["points"][i] for r in found]) for i in range(len(TARGETS))],
                "seconds_per_step": _mean([{"s": r["seconds_per_step"]} for r in found])["s"],
            }
        )
    return rows


def _networks(study: Study) -> Iterator[tuple[str, float | None, list[str]]]:
    """Objective, target and the test's names of its networks, one for each seed."""
    yield "start", None, ["start"]
    yield L1, None, [f"{L1}|{seed}|" for seed in study.seeds]
    for name in study.compared:
        for target in TARGETS:
            yield name, target, [f"{name}|{seed}|{target:g}" for seed in study.seeds]


def _points() -> Iterator[tuple[str, int | None, float]]:
    """How the networks are compared, the place among a curve's networks, and the target."""
    for place, target in enumerate(TARGETS, 1):
        yield EQUAL, None, target
        yield CHOSEN, place, target


def test_pictures(study: Study, which: str = opening.TEST) -> dict[str, Any] | None:
    """Means over every set and differences at equal PSNR; None while the test is closed."""
    opened = opening.opened(study, which)
    if opened is None:
        return None
    record, found = opened
    metrics = [quality.PRIMARY] + ([quality.SECOND] if record["second_judge"] else [])
    means = [
        {
            "objective": name,
            "target": target,
            "set": each,
            **_mean([row[n] for row in pictures.values() for n in networks]),
        }
        for name, target, networks in _networks(study)
        for each, pictures in found.items()
    ]
    differences = []
    for group, sets in GROUPS.items():
        held = [each for each in sets if each in found]
        for metric in metrics if held else ():
            curves = {
                name: equal.curves(found, held, name, study.seeds, TARGETS, metric)
                for name in study.compared
            }
            for name in study.compared:
                for against in (L1, objectives.VGG):
                    if against == name or (against != L1 and against not in curves):
                        continue
                    theirs = None if against == L1 else curves[against]
                    for how, place, target in _points():
                        d = equal.difference(curves[name], theirs, target, chosen=place)
                        differences.append(
                            {
                                "objective": name,
                                "against": against,
                                "group": group,
                                "metric": metric,
                                "how": how,
                                "target": target,
                                **{k: round(v, 5) for k, v in d._asdict().items()},
                                "outcome": d.outcome(),
                            }
                        )
    counts = {each: len(pictures) for each, pictures in found.items()}
    return {
        **{k: record[k] for k in ("opened", "crop", "second_judge")},
        "added": record.get("added", []),
        "pictures": counts,
        "means": means,
        "differences": differences,
    }


def collect(study: Study) -> dict[str, Any]:
    """Everything that has been measured so far."""
    facts = machine_facts(1)
    titles = {row.name: row.title for row in objectives.STUDY}
    result: dict[str, Any] = {
        "machine": {
            "name": this_machine(1),
            **{key: facts[key] for key in ("cpu", "cores", "isa", "torch", "mghf_fast")},
        },
        "protocol": {
            **read_json(study.out / "protocol.json"),
            "features": extractors.identity(study.features),
            "seeds": list(study.seeds),
        },
        "titles": {name: titles.get(name, f"+ {name}") for name in study.names},
        "validation": validation(study, study.compared),
        "ablation": [
            {"title": row.title, **found}
            for row in objectives.ABLATION
            for found in validation(study.of_one_seed(), [row.name])
        ]
        or None,
        "test": test_pictures(study),
        "whole": test_pictures(opening.of_whole(study), opening.WHOLE),
    }
    for part in ("minimiser", "cost", "terms", "grid"):
        path = study.out / f"{part}.json"
        result[part] = read_json(path) if path.exists() else None
    return result
