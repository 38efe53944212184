"""What a run of `pytest benchmarks` keeps beside pytest-benchmark's own times: the rows.

pytest-benchmark times a part of a row in the session's process. What cannot be known there comes
first. On the CPU a fresh process under the row's time limit finds out how much memory a call takes,
whether there is enough, and how long it takes, so that nothing slow is repeated. On a GPU PyTorch
counts the memory itself.
"""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mghf_fast.commands.memory import available_memory
from mghf_fast.commands.table5.measure import Measurement, measure

from . import cases, results
from .cases import Case, Shape
from .gpu_parts import Gpu, failure

EXPECTED = ("out of memory", "over ", "is not installed")
"""Reasons to skip a row; any other is a fault."""
AGAIN = 50  # timed calls at most of what is timed once more
ROUNDS_ON_GPU = (5, 100)
BUDGET_ON_GPU = 1.0  # seconds of timed calls


class DeviceTimer:
    """pytest-benchmark's timer on a GPU: seconds on the device, by events that it waits for.

    So a duration begins with an idle device and takes in the launches. The clock advances by the
    time from event to event, because the time since the first loses digits.
    """

    def __init__(self, new_event: Callable[[], Any] | None = None) -> None:
        self._new_event = new_event or (lambda: torch.cuda.Event(enable_timing=True))
        self._last: Any = None
        self._now = 0.0

    def __call__(self) -> float:
        event = self._new_event()
        event.record()
        event.synchronize()
        if self._last is not None:
            self._now += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._now


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError as soon as Python runs again after that many seconds, where the system
    has such a signal."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() != threading.main_thread():
        yield
        return

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError(f"over {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason(error: Exception, limit: float) -> str:
    """Why a part could not be timed, as the tables put it."""
    text = str(error) if isinstance(error, TimeoutError) else failure(error)
    memory = isinstance(error, MemoryError) or "can't allocate memory" in text
    return "out of memory" if memory else str(cases.said(text, limit))


class Recorder:
    """The rows of this session, each probed when the first of its parts is asked for."""

    def __init__(self, threads: int, machine: str | None, device: str) -> None:
        self.threads = threads
        self.on_gpu = device != "cpu"
        default = results.slug(torch.cuda.get_device_name()) if self.on_gpu else None
        self.machine = machine or default or results.this_machine(threads)
        self.gpu = Gpu() if self.on_gpu else None
        self.probed: dict[tuple[str, Shape, str], dict[str, Measurement]] = {}
        self.found: dict[tuple[str, Shape, str], dict[str, Measurement]] = {}
        self.rows: dict[tuple[str, Shape, str], results.Row] = {}
        self.told: list[str] = []

    # ---- one part ----

    def earlier(self, op: str, shape: Shape, form: str) -> list[dict[str, Measurement]]:
        """What the form gave at the smaller sizes, in order."""
        smaller = [s for s in cases.SIZES if shape in cases.SIZES and s < shape]
        keys = [(op, s, form) for s in smaller if (op, s, form) in self.probed]
        return [self.probed[key] | self.found.get(key, {}) for key in keys]

    def probe(self, case: Case, shape: Shape, form: str, part: str) -> Measurement:
        """Peak memory and the duration of one call, or why the part is not timed."""
        key = case.op, shape, form
        if key not in self.probed:
            self.probed[key] = cases.probe_row(
                case, shape, form, self.threads, self.earlier(*key), apart=self.gpu is None
            )
        found = self.probed[key][part]
        if self.gpu is None and (found.peak_bytes or 0) > (available_memory() or math.inf):
            return Measurement(failure="out of memory")  # beside what this process holds
        return found

    def prepare(self, case: Case, shape: Shape, form: str, part: str) -> Callable[[], object]:
        gc.collect()
        if case.forms[form].compiled:
            torch.compiler.reset()  # or a shape would be compiled for any size, after another
        return cases.prepare(case.module, case.op, list(shape), form, part)

    def time(self, benchmark: Any, case: Case, shape: Shape, form: str, part: str) -> None:
        """The test of one part: pytest-benchmark times it; skips where it cannot be timed."""
        if benchmark.disabled:
            benchmark(self.prepare(case, shape, form, part))
            return
        probed, limit = self.probe(case, shape, form, part), cases.limit_of(case, form)
        benchmark.extra_info |= results.facts_of_row(case.op, shape, form, self.threads)
        if probed.failure is not None:
            self.give_up(case, shape, form, part, probed.failure)
        try:
            with within(limit):
                peak = self.measured(benchmark, probed, case, shape, form, part)
        except Exception as error:
            self.give_up(case, shape, form, part, reason(error, limit))
        benchmark.extra_info["peak_mib"] = results.mib(peak)
        seconds = tuple(benchmark.stats.stats.data)
        self.note(case.op, shape, form, part, Measurement(seconds, peak))

    def measured(
        self, benchmark: Any, probed: Measurement, case: Case, shape: Shape, form: str, part: str
    ) -> int | None:
        """The peak of memory above the inputs, in bytes, once the part has been timed."""
        step = self.prepare(case, shape, form, part)
        if self.gpu is None:
            rounds = math.ceil(cases.BUDGETS[case.forms[form].kind] / probed.median)
            if rounds < cases.FEW:
                benchmark.pedantic(step, rounds=rounds)
            else:
                benchmark(step)
            return probed.peak_bytes
        step()
        peak = self.gpu.peak(step)  # which waits for the call
        start = time.perf_counter()
        self.gpu.peak(step)
        once = time.perf_counter() - start
        least, most = ROUNDS_ON_GPU
        rounds = max(least, min(most, int(BUDGET_ON_GPU / once)))
        benchmark.pedantic(step, setup=self.gpu.flush, rounds=rounds)
        self.gpu.clear()
        return peak

    def give_up(self, case: Case, shape: Shape, form: str, part: str, text: str) -> None:
        self.note(case.op, shape, form, part, Measurement(failure=text))
        expected = any(known in text for known in EXPECTED)
        (pytest.skip if expected else pytest.fail)(text)

    def note(self, op: str, shape: Shape, form: str, part: str, found: Measurement) -> None:
        key = op, shape, form
        self.found.setdefault(key, {})[part] = found
        self.rows[key] = results.new_row(*key, self.threads, self.found[key])

    # ---- the session ----

    def run(self) -> results.Run:
        return results.new_run(self.machine, self.threads, list(self.rows.values()))

    def partial(self) -> bool:
        """Whether there are rows that this session did not ask for."""
        rows = [{row[:2] for row in case.rows()} for case in cases.load_all().values()]
        return len(self.rows) < sum(map(len, rows))

    def again(self, op: str, shape: Shape, form: str) -> None:
        """Times a row once more, after all others and without pytest-benchmark."""
        case, budget = cases.CASES[op], cases.BUDGETS[cases.CASES[op].forms[form].kind]
        for part, before in self.found[op, shape, form].items():
            if before.failure is None:
                step = self.prepare(case, shape, form, part)
                step()
                found = measure(step, rounds=AGAIN, budget=budget, memory=False)
                self.note(op, shape, form, part, Measurement(found.seconds, before.peak_bytes))

    def compare(self) -> results.Comparison:
        """What is slower must be so a second time, timed again together with its baseline."""
        committed, partial = results.load(self.machine), self.partial()
        found = results.compare(self.run(), committed, partial)
        again = {(op, shape, form) for op, shape, *forms in found.slower for form in forms}
        for op, shape, form in list(self.found):
            if (op, str(shape), form) in again:
                self.again(op, shape, form)
        return results.compare(self.run(), committed, partial) if again else found
