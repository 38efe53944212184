"""`mghf-fast tune`: measures which kernels are fastest on this machine's GPU, for the user's cache.

Each op runs, forward and backward, at three sizes in float32 and bfloat16 with every backend's
kernels that can run it; ``"auto"`` then picks the faster one, by rules like those of
:mod:`mghf_fast.preferences`. The reference is not measured, because its memory is too large for
``"auto"`` to prefer it to kernels.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ... import cache, preferences, problems, trials
from ...backends import unavailable_reasons
from ...ops import OPS

KERNELS = ("cuda", "triton")
TYPES = (torch.float32, torch.bfloat16)
SIZES: Mapping[str, Sequence[tuple[int, int]]] = {
    **dict.fromkeys(
        ("coupling", "entropy", "gram", "content_style"), ((8, 32), (1, 256), (1, 512))
    ),
    "patches": ((8, 64), (1, 256), (4, 512)),
    "sinkhorn": ((256, 25), (128, 100), (64, 441)),
    "monce": ((256, 25), (128, 100), (64, 441)),
}
"""Arguments of the problems, from small to large. DECLoss has only one kernel."""
BUDGET = 0.15
"""Seconds of timed calls per row."""
CALLS = 30
SAME = 1.05
"""Times within this ratio count as equal; then the order of the committed table decides."""

Row = dict[str, Any]


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise ValueError(
            "tune measures the kernels on an NVIDIA GPU, and PyTorch finds none here: "
            + (
                "this PyTorch is built without CUDA"
                if torch.version.cuda is None
                else "there is no CUDA device"
            )
        )
    return torch.device("cuda", torch.cuda.current_device())


def candidates(op: str) -> list[str]:
    """The backends whose kernels this installation has for an op."""
    missing = unavailable_reasons()
    return [b for b in KERNELS if b not in missing and OPS[op].why_not(b) is None]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, after two calls to compile and warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def once() -> float:
        wait()
        start = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start

    once()
    rounds = max(3, min(CALLS, int(BUDGET / max(once(), 1e-6))))
    return statistics.median(once() for _ in range(rounds))


def works() -> list[tuple[str, tuple[int, int], torch.dtype, str]]:
    """Op, size, type and backend of every row; ops with a single backend are skipped."""
    return [
        (op, size, dtype, backend)
        for op, sizes in SIZES.items()
        if len(having := candidates(op)) > 1
        for size, dtype, backend in itertools.product(sizes, TYPES, having)
    ]


def measure(device: torch.device, rows: Sequence[Any]) -> Iterator[Row]:
    """Yields rows with ``seconds`` or ``failure``; kernels that fail their trial are not timed."""
    for op, arguments, dtype, backend in rows:
        row: Row = {
            "op": op,
            "dtype": str(dtype).removeprefix("torch."),
            "backend": backend,
        }
        try:
            problem = problems.PROBLEMS[op](*arguments).to(device, dtype)
            row["size"] = preferences.size_of(op, problem.tensors[0].shape)
            if (reason := trials.refusal(op, backend, problem.tensors[0])) is not None:
                row["failure"] = reason
            else:
                call = functools.partial(problem.results, backend)
                row["seconds"] = float(f"{seconds(call, device):.4g}")
        except Exception as error:
            row["failure"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
        yield row


def rules(rows: Sequence[Row]) -> list[Row]:
    """The rows of a table that prefers the faster kernels for each op, type and size; the bound
    between two sizes is their geometric mean. The committed table decides what was not measured."""
    found: list[Row] = []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
        order: list[tuple[int, list[str]]] = []
        for size in sorted({row["size"] for row in mine if "size" in row}):
            times = {
                r["backend"]: r["seconds"] for r in mine if r.get("size") == size and "seconds" in r
            }
            if times:
                committed = preferences.preferred_kernels(
                    op, getattr(torch, dtype), _shape(op, size), preferences.RULES
                )
                best = min(times.values())
                order.append(
                    (
                        size,
                        sorted(times, key=lambda b: (times[b] > SAME * best, committed.index(b))),
                    )
                )
        for i, (size, backends) in enumerate(order):
            least = 0.0 if i == 0 else math.sqrt(order[i - 1][0] * size)
            if found and i and found[-1]["backends"] == backends:
                continue
            if i:
                found[-1]["below"] = least
            found.append(
                {"op": op, "dtypes": [dtype], "backends": backends, "least": least, "below": None}
            )
    return found


def _shape(op: str, size: int) -> tuple[int, ...]:
    return (1, size) if op in ("sinkhorn", "monce") else (size,)


def _bar(done: int, total: int, what: str) -> None:
    if sys.stderr.isatty():
        filled = 30 * done // total
        sys.stderr.write(f"\r[{'#' * filled}{'.' * (30 - filled)}] {done} of {total}  {what:<32}")
        sys.stderr.flush()


def table(rows: Sequence[Row]) -> str:
    """The medians as text."""
    lines = [f"{'op':<15}{'type':<10}{'size':>10}  " + "".join(f"{b:>12}" for b in KERNELS)]
    for op, dtype, size in dict.fromkeys((r["op"], r["dtype"], r.get("size")) for r in rows):
        cells = []
        for backend in KERNELS:
            mine = [
                r
                for r in rows
                if (r["op"], r["dtype"], r.get("size"), r["backend"]) == (op, dtype, size, backend)
            ]
            cells.append(
                f"{1e3 * mine[0]['seconds']:.3f} ms"
                if mine and "seconds" in mine[0]
                else "failed"
                if mine
                else ""
            )
        lines.append(f"{op:<15}{dtype:<10}{size or '?':>10}  " + "".join(f"{c:>12}" for c in cells))
    return "\n".join(lines)


def run(clear: bool) -> int:
    """Measures and writes the table, or with ``clear`` deletes it; returns the exit code."""
    if clear:
        file = cache.clear()
        preferences.forget()
        trials.forget()
        sys.stdout.write(
            f"There was nothing at {cache.path()}.\n" if file is None else f"Deleted: {file}\n"
        )
        return 0
    device = _gpu()
    todo = works()
    if not todo:
        reasons = unavailable_reasons()
        missing = "; ".join(f"{b}: {reasons[b]}" for b in KERNELS if b in reasons)
        sys.stdout.write(f"There is nothing to choose between here. {missing}\n")
        return 0
    found: list[Row] = []
    for row in measure(device, todo):
        found.append(row)
        _bar(len(found), len(todo), f"{row['op']} {row['backend']}")
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    when = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    sys.stdout.write(f"{cache.identity(device)}\n{table(found)}\n")
    try:
        file = cache.write(device, "tuned", {"when": when, "rows": found, "rules": rules(found)})
    except OSError as error:
        raise OSError(
            f"the table cannot be written to {cache.path()} ({error.strerror or error}); the "
            f"environment variable {cache.VARIABLE} names another folder"
        ) from error
    preferences.forget()
    sys.stdout.write(f"Written: {file}\n")
    return 0
