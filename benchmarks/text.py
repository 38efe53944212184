"""Figures of a run as text, and tables of them in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .results import Row, value

TITLES = {
    "sinkhorn": "Sinkhorn plan",
    "monce": "MoNCE, exact plan gradient",
    "entropy": "entropy",
    "gram": "Gram matrices",
    "patches": "patch projection",
    "content_style": "content-style terms",
    "coupling": "invertible block",
    "dec": "DECLoss",
    "mghf_n": "**whole MGHF-n step**",
    "mghf_c": "**whole MGHF-c step**",
}


def part_of(op: str) -> str:
    return "forward" if op == "entropy" else "step"


def duration(seconds: float) -> str:
    if seconds < 0.995e-4:
        return f"{seconds * 1e6:#.2g} us" if seconds < 0.995e-5 else f"{seconds * 1e6:.0f} us"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms" if seconds >= 0.00995 else f"{seconds * 1e3:.2g} ms"
    return f"{seconds:.0f} s" if seconds >= 99.95 else f"{seconds:#.3g} s"


def cell(row: Row | None, part: str, join: str = ", ") -> str:
    """Time and peak memory, or why there are none, or nothing."""
    if row is None or part not in row["parts"]:
        return ""
    if (seconds := value(row, part)) is None:
        return str(row["parts"][part]["failure"])
    mib = value(row, part, "peak_mib")
    memory = "" if mib is None else f"{join}{mib:,.0f} MiB" if mib >= 10 else f"{join}{mib} MiB"
    return duration(seconds) + memory


def speed(slower: Row | None, row: Row | None, part: str) -> str:
    a, b = value(slower, part), value(row, part)
    return "" if not a or not b else f"{a / b:.0f}x" if a / b >= 9.5 else f"{a / b:.1f}x"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
