"""The result files: written atomically, and never over a file that the demo did not write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import refusal, temporary, write_whole
from .settings import DemoError

GENERATOR = "mghf-fast demo"
"""Marks the beginning of every file that the demo writes, so that it recognises its own."""

REPORT, METRICS, COMPARISON = "report.html", "metrics.json", "comparison.png"
ABLATION = "ablation.json"


def prepare(out: Path, names: Sequence[str] = (REPORT, METRICS, COMPARISON)) -> None:
    """Makes ``out`` if it is missing, and checks that the results can be written there.

    Args:
        names: names of the files that will be written.

    Raises:
        DemoError: ``out`` is not a directory, cannot be written to, or holds a file with the name
            of a result that the demo did not write.
    """
    if out.exists() and not out.is_dir():
        raise DemoError(f"--out {out}: this is a file; a directory is needed")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = temporary(out / "probe")
        probe.touch()
        probe.unlink()
        for name in names:
            path = out / name
            if path.exists() and not (path.is_file() and _is_ours(path)):
                raise DemoError(f"--out {out}: {name} is there and is not the demo's; not replaced")
    except OSError as error:
        raise DemoError(f"--out {out}: cannot be written to ({error.strerror})") from error


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(1024)


def write(out: Path, name: str, content: bytes) -> Path:
    """Writes ``out / name`` atomically.

    Raises:
        DemoError: the system refuses; an earlier file of that name is then untouched.
    """
    path = out / name
    try:
        write_whole(path, content)
    except OSError as error:
        raise DemoError(refusal(path, error)) from error
    return path
