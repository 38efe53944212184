"""Processes of `make gpu`: side by side, under a time limit, each with its own log."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

GRACE = 5.0  # seconds for an interrupted process to say what it did
POLL = 2.0  # seconds between calls of `meanwhile`


def run_together(
    commands: Mapping[str, Sequence[str]],
    folder: Path,
    limit: float,
    environment: Mapping[str, str] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> dict[str, str]:
    """Runs commands side by side and returns how each ended: "ok", or why not. Their output goes to
    <name>.log. A command over the limit is interrupted, and a little later killed together with the
    processes that it started. ``meanwhile`` is called now and then as long as they run."""
    children = {}
    for name, command in commands.items():
        with (folder / f"{name}.log").open("w") as output:
            children[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})}, start_new_session=True,
            )  # fmt: skip
    ended = {}
    try:
        in_time = wait_for(children.values(), limit, meanwhile)
        for name, child in children.items():
            if (code := child.poll()) is None:
                ended[name] = f"over {limit:.0f} s"
                send(child, signal.SIGINT)
            else:
                ended[name] = "ok" if code == 0 else f"exit code {code}: {last_line(folder, name)}"
        if not in_time:
            wait_for(children.values(), GRACE)
    finally:
        for child in children.values():
            send(child, signal.SIGKILL)
            child.wait()
    return ended


def wait_for(
    children: Iterable[subprocess.Popen[bytes]],
    limit: float,
    meanwhile: Callable[[], None] | None = None,
) -> bool:
    """Whether all of them ended within the limit."""
    end = time.monotonic() + limit
    for child in children:
        while True:
            left = max(0.0, end - time.monotonic())
            try:
                child.wait(left if meanwhile is None else min(left, POLL))
                break
            except subprocess.TimeoutExpired:
                if left <= POLL and time.monotonic() >= end:
                    return False
            if meanwhile is not None:
                meanwhile()
    return True


def send(child: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to all processes of the child's group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def last_line(folder: Path, name: str) -> str:
    text = (folder / f"{name}.log").read_text(errors="replace")
    return without_folders((text.strip().splitlines() or ["no message"])[-1][:200])


def without_folders(text: str) -> str:
    """The text without paths of this machine, which a result must not contain."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, without an incomplete last one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]
