"""The table of ``mghf-fast evaluate`` and its JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ... import __version__
from .measures import DETAIL, MEASURES, NIQE_WARNING, Selection
from .metrics import EQUAL

LONGEST_NAME = 32
WIDTH = 110

Values = dict[str, float | None]


@dataclass(frozen=True)
class Row:
    """One pair's values."""

    name: str
    sr: str
    hr: str
    width: int
    height: int
    values: Values
    transparent: bool = False


def mean(rows: Sequence[Row], names: Sequence[str]) -> Values:
    """The mean of each measure over the pictures that have it; None if none has."""
    result: Values = {}
    for name in names:
        found = [value for row in rows if (value := row.values[name]) is not None]
        result[name] = sum(found) / len(found) if found else None
    return result


class Table:
    """Lines of text with columns under headings.

    Args:
        names: the measures.
        labels: the lines' labels, for the width of their column.
    """

    def __init__(self, names: Sequence[str], labels: Sequence[str]) -> None:
        self._names = tuple(names)
        self._label = min(LONGEST_NAME, max(map(len, labels)))
        self._widths = [max(6, *map(len, MEASURES[name].heading)) for name in names]

    def _line(self, label: str, cells: Sequence[str]) -> str:
        if len(label) > self._label:
            label = label[: self._label - 3] + "..."
        padded = (f"{cell:>{width}}" for cell, width in zip(cells, self._widths, strict=True))
        return f"{label:<{self._label}}  {'  '.join(padded)}"

    def heading(self) -> list[str]:
        """Two lines of names, and one of which values are good."""
        labels = ("", "", "better")
        return [
            self._line(label, [MEASURES[name].heading[i] for name in self._names])
            for i, label in enumerate(labels)
        ]

    def row(self, label: str, values: Values) -> str:
        cells = [
            "-" if (value := values[name]) is None else f"{value:.{MEASURES[name].digits}f}"
            for name in self._names
        ]
        return self._line(label, cells)


def notes(rows: Sequence[Row], selection: Selection, border: int, scale: float) -> list[str]:
    """What a reader of the figures must know."""
    names = selection.names
    cut = "no border is cut" if border == 0 else f"{border} pixels are cut on each side"
    found = [
        f"Y: the papers' convention, luma of BT.601 within 16 to 235; Y full: the same of 0 to "
        f"255. {cut[0].upper()}{cut[1:]}."
    ]
    if set(names) & set(DETAIL):
        found.append(
            f"HF: the frequencies that a resolution of 1/{scale:g} cannot represent; error in dB, "
            "energy as SR / HR, correlation of SR and HR; sharpness: gradients, SR / HR."
        )
    if "niqe" in names:
        found.append(NIQE_WARNING)
    for reason in dict.fromkeys(selection.missing.values()):
        without = [n for n, why in selection.missing.items() if why == reason]
        found.append(f"Not measured: {', '.join(without)}: {reason}.")
    for name in names:
        lacking = [row.name for row in rows if row.values[name] is None]
        if lacking:
            found.append(
                f"{name} has no value for {len(lacking)} of {len(rows)} pictures, which are too "
                f"small or flat (first: {lacking[0]}); its mean is over the others."
            )
    if equal := [row.name for row in rows if row.values.get("psnr_y") == EQUAL]:
        found.append(
            f"SR and HR are equal in {len(equal)} of {len(rows)} pictures (first: {equal[0]}); "
            f"{EQUAL:g} dB stands for that."
        )
    if shown := [row.name for row in rows if row.transparent]:
        found.append(
            f"Transparent pictures were laid on white: {len(shown)} of {len(rows)} (first: "
            f"{shown[0]})."
        )
    return found


def notes_text(texts: Sequence[str]) -> list[str]:
    return [textwrap.fill(t, WIDTH, initial_indent="* ", subsequent_indent="  ") for t in texts]


def to_json(rows: Sequence[Row], selection: Selection, border: int, scale: float) -> dict[str, Any]:
    """The content of ``--json``."""
    return {
        "generator": f"mghf-fast evaluate {__version__}",
        "border": border,
        "scale": scale,
        "measures": {name: MEASURES[name].text for name in selection.names},
        "not_measured": selection.missing,
        "mean": mean(rows, selection.names),
        "pictures": [
            {
                "name": row.name, "sr": row.sr, "hr": row.hr,
                "width": row.width, "height": row.height, **row.values,
            }
            for row in rows
        ],
        "notes": notes(rows, selection, border, scale),
    }  # fmt: skip
