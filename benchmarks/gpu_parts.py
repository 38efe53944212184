"""What a process of `make gpu` measures: ceilings, rows of an op, values of all ops, Table 5.

Each part writes its results line by line as it gets them, ours and the most wanted shapes first, so
that whatever ends the process loses only what it had not come to.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mghf_fast import cost, workloads
from mghf_fast.backends import use_backend
from mghf_fast.measure import Measurement
from mghf_fast.ops import OPS

from . import cases, results
from .cases import Case, Form, Shape
from .text import part_of

PAPER, LATENTS = Shape(1, 512), Shape(32, 64)
SIZES = (PAPER, Shape(1, 256), Shape(1, 1024), Shape(1, 2048))  # the paper's first
TRAINING = (Shape(4, 512), Shape(16, 256), LATENTS)
TINY = Shape(1, 64)
WHOLE = ("mghf_c", "mghf_n")
COMPILED_OPS = ("coupling", "content_style", "gram", "patches", "entropy", "dec")
"""Ops whose reference compiles in seconds; the Sinkhorn of 50 unrolled iterations does not."""
COMPILED_ROWS = ("gram", "correlation", "awdfe_mse", "dfe_mse", "dfe", "vgg16")
"""Rows of Table 5 of which the same is true."""

AUTOTUNED, CAPTURED = " max-autotune", " CUDA graph"
OURS = "mghf_fast"
FORCED = {"cuda": "mghf_fast CUDA C++", "triton": "mghf_fast Triton"}
IN_BFLOAT16 = " bfloat16"
BUDGET = 0.25  # seconds of timed calls for a part of a row
SLOW = 2.0  # seconds; a call that takes longer is the only one
CALLS = 100  # timed calls at most
TOLERANCE = 2e-3  # of the part `values`, against the reference in float32

Write = Callable[[dict[str, Any]], None]
Function = Callable[[], object]

# ---- clocks ----


class Event(Protocol):
    def record(self) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        """Milliseconds."""
        ...


class Gpu:
    """Device time between events, and the peak of allocated memory."""

    def __init__(self) -> None:
        self.cache = torch.empty(64 << 20, dtype=torch.int32)

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def flush(self) -> None:
        """Overwrites the second-level cache, which a training step would not find filled either."""
        self.cache.zero_()

    def clear(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def peak(self, function: Function) -> int:
        """Bytes allocated above those before the call."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def captured(self, function: Function) -> Function:
        """The function as a CUDA graph, which launches all its kernels at once."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()

        def replay() -> object:
            graph.replay()
            return result

        return replay


class HostEvent:
    at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: HostEvent) -> float:
        return 1e3 * (other.at - self.at)


class Host:
    """The same on a CPU, where this code is tested: no cache is flushed, nothing is captured."""

    def event(self) -> Event:
        return HostEvent()

    def synchronize(self) -> None: ...

    def flush(self) -> None: ...

    def clear(self) -> None:
        gc.collect()

    def peak(self, function: Function) -> None:
        function()

    def captured(self, function: Function) -> Function:
        return function


Clock = Gpu | Host


def timed(
    clock: Clock, function: Function, budget: float = BUDGET, memory: bool = True
) -> Measurement:
    """Durations on the device after two calls that compile, load and warm up; the second of them
    gives the peak memory."""
    function()
    clock.synchronize()
    start = time.perf_counter()
    peak = clock.peak(function)
    once = time.perf_counter() - start
    if once > SLOW:
        return Measurement((once,), peak if memory else None)
    rounds = max(3, min(CALLS, int(budget / max(once, 1e-6))))
    events = [(clock.event(), clock.event()) for _ in range(rounds)]
    function()
    for begin, end in events:
        clock.flush()
        begin.record()
        function()
        end.record()
    clock.synchronize()
    seconds = tuple(begin.elapsed_time(end) / 1e3 for begin, end in events)
    return Measurement(seconds, peak if memory else None)


def failure(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"


# ---- ceilings ----


def ceilings(clock: Clock, values: int = 1 << 29, side: int = 8192) -> dict[str, float]:
    """Memory bandwidth, bytes read and written, and rates of matrix products of random numbers."""

    def best(function: Function) -> float:
        return min(timed(clock, function).seconds)

    source, target = torch.randn(2, values)
    found = {"copy_tb_per_s": 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e12}
    for name, dtype, tf32 in (
        ("bfloat16_tflop_per_s", torch.bfloat16, False),
        ("tf32_tflop_per_s", torch.float32, True),
        ("float32_tflop_per_s", torch.float32, False),
    ):
        with tf32_products(tf32):
            a, b = torch.randn(2, side, side).to(dtype)
            seconds = best(functools.partial(torch.matmul, a, b))
        found[name] = 2 * side**3 / seconds / 1e12
    return {name: float(f"{value:.4g}") for name, value in found.items()}


@contextlib.contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# ---- rows ----


def with_backend(backend: str, form: Form) -> Form:
    """The form on a backend of its own."""

    def make() -> Callable[..., Tensor]:
        function = form.make()

        def call(*inputs: Tensor) -> Tensor:
            with use_backend(backend):
                return function(*inputs)

        return call

    return dataclasses.replace(form, make=make, kind="forced")


def forced_forms(case: Case) -> dict[str, Form]:
    """Those kernels, in two types, between which "auto" chooses by a table."""
    if case.op not in OPS or any(OPS[case.op].why_not(backend) for backend in FORCED):
        return {}
    forms = {}
    for backend, name in FORCED.items():
        form = with_backend(backend, case.forms[OURS])
        forms[name] = form
        forms[name + IN_BFLOAT16] = dataclasses.replace(
            form, dtype="bfloat16", inputs=torch.bfloat16
        )
    return forms


def on_gpu(case: Case) -> Case:
    """The case with the forms that only a GPU has."""
    forms = dict(case.forms) | forced_forms(case)
    if case.op == "mghf_c":
        alex = functools.partial(workloads.LPIPSLayout, "alex")
        forms["LPIPS AlexNet"] = Form(alex, "peer")
        forms["LPIPS VGG-16"] = Form(functools.partial(workloads.LPIPSLayout, "vgg"), "peer")
        forms["LPIPS AlexNet compile"] = Form(alex, "peer", compiled=True)
    for name, form in list(forms.items()):
        if form.compiled:
            forms[name + AUTOTUNED] = form
        if case.op in WHOLE and form.kind == "ours":
            forms[name + CAPTURED] = form
    return dataclasses.replace(case, forms=forms)


def shapes_of(op: str, case: Case, quick: bool) -> list[Shape]:
    """The paper's size first, then what people train with."""
    whole = op in WHOLE
    if quick:
        return [PAPER, LATENTS] if whole else [PAPER]
    own = [s for s in case.shapes if s not in (*cases.SIZES, cases.TRAINING)]
    return [PAPER, *(TRAINING if whole else ()), *SIZES[1:], *own]


def rows_of(case: Case, quick: bool, compiled: bool) -> list[tuple[Shape, str]]:
    """The rows of an op in the order of measurement. torch.compile and other libraries are measured
    at the paper's size, a captured graph where launches cost, kernels in bfloat16 at the paper's
    size and the training shape, and the losses that this one is to replace everywhere."""
    if compiled:
        allowed = (*WHOLE, *COMPILED_OPS)
        names = [name for name, form in case.forms.items() if form.compiled]
        names.sort(key=lambda name: (case.forms[name].kind == "peer", name.endswith(AUTOTUNED)))
        return [(PAPER, name) for name in names if case.op in allowed]
    return [
        (shape, name)
        for shape in shapes_of(case.op, case, quick)
        for name, form in case.forms.items()
        if not form.compiled
        and (not name.endswith(CAPTURED) or shape in TRAINING)
        and (form.kind != "peer" or case.op in WHOLE or shape == PAPER)
        and (form.inputs == torch.float32 or shape in (PAPER, *TRAINING))
    ]


def measure_part(clock: Clock, case: Case, shape: Shape, name: str, part: str) -> Measurement:
    form = case.forms[name]
    if form.package is not None and cases.package_version(form.package) is None:
        return Measurement(failure=f"{form.package} is not installed")
    autotuned, captured = name.endswith(AUTOTUNED), name.endswith(CAPTURED)
    try:
        function: Callable[..., Tensor] = form.make()
        if form.compiled:
            torch.compiler.reset()
            mode = "max-autotune" if autotuned else "default"
            function = torch.compile(function, mode=mode)
        step = case.step(function, shape, name, part)
        # A captured graph, of which max-autotune makes use too, has its memory beforehand.
        measured = clock.captured(step) if captured else step
        return timed(clock, measured, memory=not (captured or autotuned))
    except Exception as error:
        return Measurement(failure=failure(error))


def measure_op(clock: Clock, op: str, rows: list[tuple[Shape, str]], write: Write) -> None:
    case = cases.CASES[op]
    for shape, name in rows:
        # Compiling takes the time: of compiled forms only what the tables show.
        parts = [part_of(op)] if case.forms[name].compiled else case.parts_of(name)
        found = {}
        for part in parts:
            clock.clear()
            found[part] = measure_part(clock, case, shape, name, part)
        write(results.new_row(op, shape, name, torch.get_num_threads(), found))


# ---- values and Table 5 ----


def values(write: Write) -> None:
    """Every op's result and gradient against the reference in float32, at a tiny size."""
    for op in OPS:
        case = cases.CASES[op]
        ours = [name for name in (OURS, *FORCED.values()) if name in case.forms]
        for name, part in itertools.product(ours, case.parts_of(OURS)):
            found: dict[str, Any] = {"op": op, "form": name, "part": part}
            try:
                outcomes = []
                for form in (name, "eager"):
                    torch.manual_seed(0)  # of the gradient that comes in
                    result = case.step(case.forms[form].make(), TINY, form, part)()
                    (tensor,) = result if isinstance(result, tuple) else [result]
                    outcomes.append(tensor.double())
                got, expected = outcomes
                error = float((got - expected).norm() / expected.norm())
                found |= {"error": float(f"{error:.2g}"), "passed": error <= TOLERANCE}
            except Exception as error:
                found |= {"failure": failure(error), "passed": False}
            write(found)


def table5(clock: Clock, size: int, quick: bool, write: Write) -> None:
    """The rows of Table 5 with their counts, and what a step of each takes here."""
    for row in cost.table5(size, size):
        variants = ["mghf_fast"] if workloads.ROW_OPS[row.key] else []
        variants += ["reference"]
        variants += ["compile"] if row.key in COMPILED_ROWS and not quick else []
        found = {}
        for variant in variants:
            clock.clear()
            try:
                measured = timed(clock, workloads.workload(row.key, variant, size))
            except Exception as error:
                measured = Measurement(failure=failure(error))
            found[variant] = results.part_facts(measured)
        write(
            {
                "key": row.key,
                "name": row.name,
                "paper_gflop": row.paper[0],
                "published_gmacs": round(row.published.gmacs, 3),
                "ours_gmacs": round(row.ours.gmacs, 3),
                "measured": found,
            }
        )


# ---- the process ----


def run(part: str, write: Write, *, quick: bool, backend: str, size: int | None = None) -> None:
    """One part on the default device; ``size`` replaces all sizes with a small one, in tests."""
    clock: Clock = Gpu() if torch.get_default_device().type == "cuda" else Host()
    for op, case in cases.load_all().items():
        cases.CASES[op] = on_gpu(case)
    with use_backend(backend):
        if part == "ceilings":
            write(ceilings(clock) if size is None else ceilings(clock, size**2, size))
        elif part == "values":
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                values(write)
        elif part == "table5":
            table5(clock, size or PAPER.size, quick, write)
        else:
            name, _, suffix = part.partition("-")
            for op in OPS if name == "ops" else (name,):
                rows = rows_of(cases.CASES[op], quick, suffix == "compile")
                if size is not None:
                    rows = [(Shape(1, size), form) for shape, form in rows if shape == PAPER]
                measure_op(clock, op, rows, write)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--size", type=int)
    options = parser.parse_args()
    torch.set_default_device(options.device)

    def write(row: dict[str, Any]) -> None:
        with options.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    run(options.part, write, quick=options.quick, backend=options.backend, size=options.size)


if __name__ == "__main__":
    main()
