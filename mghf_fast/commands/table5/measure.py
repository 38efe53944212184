"""Measures time and true peak memory of a function, in this process or in a fresh one."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..memory import available_memory, peak_memory

MIB = 2**20


@dataclass(frozen=True)
class Measurement:
    """The result of :func:`measure`, or why it failed.

    Attributes:
        seconds: duration of each timed call, in order; empty if the measurement failed.
        peak_bytes: peak rise of the process's resident memory over its level before a call (so
            without the call's inputs), or ``None`` if not measured.
        failure: one line such as ``"timed out after 60 s"``, or ``None``.
    """

    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    failure: str | None = None

    @property
    def median(self) -> float:
        """Median duration of a call in seconds; NaN if there is none."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def spread(self) -> float:
        """(longest - shortest) / median; 0 for a single call, NaN for none."""
        return (max(self.seconds) - min(self.seconds)) / self.median if self.seconds else math.nan


def measure(
    function: Callable[[], object], *, rounds: int = 5, budget: float = 5.0, memory: bool = True
) -> Measurement:
    """Times ``function`` and measures the peak memory of one call.

    The memory is measured in the first call, which is also the timing if it alone used up the
    budget, so that nothing slow runs twice. Warm up (compile, load libraries) before.

    Args:
        function: what to measure, without arguments.
        rounds: maximum number of timed calls, at least 1.
        budget: seconds after which no further call is started.
        memory: whether to measure memory.

    Returns:
        The measurement; ``failure`` is never set.

    Raises:
        ValueError: ``rounds`` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    seconds: list[float] = []

    def timed() -> None:
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)

    peak = peak_memory(timed) if memory else None
    if memory and seconds[0] < budget:
        seconds.clear()  # the call whose memory was measured is slower: the allocator was trimmed
    while not seconds or (len(seconds) < rounds and sum(seconds) < budget):
        timed()
    return Measurement(tuple(seconds), peak)


def measure_apart(
    target: str,
    arguments: dict[str, Any],
    *,
    timeout: float,
    threads: int | None = None,
    rounds: int = 5,
    budget: float = 5.0,
    memory: bool = True,
) -> Measurement:
    """Like :func:`measure`, in a fresh process, unaffected by earlier measurements.

    Args:
        target: ``"module:function"``. Called with ``arguments`` it returns the warmed-up function
            to measure.
        arguments: keyword arguments of the target, passed as JSON.
        timeout: seconds after which the process and its children are killed.
        threads: PyTorch's CPU threads; ``None`` for its default.
        rounds: maximum number of timed calls.
        budget: seconds after which no further call is started.
        memory: whether to measure memory.

    Returns:
        The measurement. Running out of time or memory, and any error, is reported in ``failure``.
    """
    (found,) = _measure_in_child(
        target, [arguments], timeout=timeout, threads=threads, rounds=rounds, budget=budget,
        memory=memory,
    )  # fmt: skip
    return found


def measure_parts_apart(
    target: str, arguments: dict[str, Any], parts: Sequence[str], **options: Any
) -> dict[str, Measurement]:
    """Like :func:`measure_apart` for several functions, one after the other in one fresh process.

    Args:
        target, arguments: as in :func:`measure_apart`; the target is called once for each part,
            with ``part=`` its name.
        parts: names. A failure of one does not keep the next from running, but the time limit is
            for all of them together.
        options: as in :func:`measure_apart`.

    Returns:
        The measurement of each part.
    """
    calls = [arguments | {"part": part} for part in parts]
    return dict(zip(parts, _measure_in_child(target, calls, **options), strict=True))


def _measure_in_child(
    target: str, calls: list[dict[str, Any]], *, timeout: float, **options: Any
) -> list[Measurement]:
    defaults = {"threads": None, "rounds": 5, "budget": 5.0, "memory": True}
    with tempfile.TemporaryDirectory() as folder:
        results, log = Path(folder, "results"), Path(folder, "log.txt")
        results.touch()
        job = {"target": target, "calls": calls, "results": str(results)} | defaults | options
        # The child has this process's search path for modules.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = {**os.environ, "PYTHONPATH": paths}
        failure = None
        with log.open("w") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps(job)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
                start_new_session=True,  # its own group, to kill compiler processes too
            )  # fmt: skip
            try:
                child.wait(timeout)
            except subprocess.TimeoutExpired:
                failure = f"timed out after {timeout:g} s"
            finally:
                _end_group(child)
        if failure is None and child.returncode == -signal.SIGKILL:
            failure = "killed, out of memory"
        elif failure is None:
            last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
            failure = f"exit code {child.returncode}: {last[:160]}"
        # One line per finished call; a line that the end of the process truncated has no \n.
        lines = [line for line in results.read_text().splitlines(True) if line.endswith("\n")]
        found = [Measurement(**json.loads(line)) for line in lines]
    found = [dataclasses.replace(m, seconds=tuple(m.seconds)) for m in found]
    return found + [Measurement(failure=failure)] * (len(calls) - len(found))


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """Kills the child and the processes that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _limit_to_available_memory() -> None:
    """Makes an allocation beyond the machine's memory raise an error in this process, instead of
    causing swapping or the killing of another process."""
    if (available := available_memory()) is not None:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = available if hard == resource.RLIM_INFINITY else min(available, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _failure_text(error: BaseException) -> str:
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200]


def _child(job: dict[str, Any]) -> None:
    _limit_to_available_memory()
    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    module, _, name = job["target"].partition(":")
    options = {key: job[key] for key in ("rounds", "budget", "memory")}
    for arguments in job["calls"]:
        try:
            function = getattr(importlib.import_module(module), name)(**arguments)
            found = measure(function, **options)
        except Exception as error:
            found = Measurement(failure=_failure_text(error))
        function = None  # frees its tensors before the next is made
        with Path(job["results"]).open("a") as results:
            results.write(json.dumps(dataclasses.asdict(found)) + "\n")


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
