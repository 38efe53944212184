"""The measurements that a process of `make gpu` makes: ceilings, rows of an op, profiles, values of
all ops, Table 5.

Each part writes its results line by line as it gets them, ours and the most important shapes first,
so that a process that is ended early loses only the remaining ones.
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

from mghf_fast.backends import current_backend, use_backend
from mghf_fast.commands.table5 import cost, workloads
from mghf_fast.commands.table5.measure import Measurement
from mghf_fast.ops import OPS, _dispatch
from mghf_fast.precision import product_precision

from . import cases, gpu_profile, gpu_variants, results
from .cases import Case, Form, Shape
from .text import part_of

PAPER, LATENTS = Shape(1, 512), Shape(32, 64)
SIZES = (PAPER, Shape(1, 256), Shape(1, 1024), Shape(1, 2048))  # the paper's first
TRAINING = (Shape(4, 512), Shape(16, 256), LATENTS)
TINY = Shape(1, 64)
STEPS = (PAPER, Shape(1, 1024), Shape(16, 256), LATENTS, Shape(4, 512), Shape(1, 256))
"""Shapes at which the losses are measured, those that people train with first."""
OPS_AT = (PAPER, Shape(1, 1024), Shape(16, 256), LATENTS)
WHOLE = ("mghf_c", "mghf_n")
COMPILED_OPS = ("coupling", "content_style", "gram", "patches", "entropy", "dec")
"""Ops whose reference compiles in seconds; the Sinkhorn of 50 unrolled iterations does not."""
COMPILED_ROWS = ("gram", "correlation", "awdfe_mse", "dfe_mse", "dfe", "vgg16")
"""Rows of Table 5 whose losses also compile in seconds."""

AUTOTUNED, CAPTURED = " max-autotune", " CUDA graph"
OURS = "mghf_fast"
FORCED = {"cuda": "mghf_fast CUDA C++", "triton": "mghf_fast Triton"}
IN_BFLOAT16 = " bfloat16"
BUDGET = 0.12  # seconds of timed calls for a part of a row
SLOW = 2.0  # seconds; a call that takes longer is not repeated
CALLS = 100  # timed calls at most
AHEAD = 6_000_000  # cycles, 3 ms at 2 GHz: longer than Python takes for a step
CALLS_AHEAD = 30  # timed calls at most, each of which waits for that
TOLERANCE = 2e-3  # largest error of the part `values`, against the reference in float32

Write = Callable[[dict[str, Any]], None]
Function = Callable[[], object]

# ---- clocks ----


class Event(Protocol):
    def record(self) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        """Milliseconds."""
        ...


class Gpu:
    """Measures device time between events, and the peak of allocated memory."""

    def __init__(self) -> None:
        self.cache = torch.empty(64 << 20, dtype=torch.int32)

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def flush(self) -> None:
        """Overwrites the second-level cache: a training step would not find its inputs there."""
        self.cache.zero_()

    def ahead(self) -> None:
        """Keeps the device busy while Python launches what comes next, so that an event after this
        sees the device's time alone."""
        torch.cuda._sleep(AHEAD)

    def clear(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def peak(self, function: Function) -> int:
        """The peak of allocated bytes during the call, above those before it."""
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
    """The same on a CPU, for tests of this code: no cache is flushed, nothing is captured."""

    def event(self) -> Event:
        return HostEvent()

    def synchronize(self) -> None: ...

    def flush(self) -> None: ...

    def ahead(self) -> None: ...

    def clear(self) -> None:
        gc.collect()

    def peak(self, function: Function) -> None:
        function()

    def captured(self, function: Function) -> Function:
        return function


Clock = Gpu | Host


def timed(
    clock: Clock,
    function: Function,
    budget: float = BUDGET,
    memory: bool = True,
    ahead: bool = False,
) -> Measurement:
    """Durations on the device after two calls that compile, load and warm up, the second of which
    gives the peak memory. Where the device waits for Python, that counts, unless Python is
    ``ahead``."""
    function()
    clock.synchronize()
    start = time.perf_counter()
    peak = clock.peak(function)
    once = time.perf_counter() - start
    if once > SLOW:
        return Measurement((once,), peak if memory else None)
    most = min(CALLS, CALLS_AHEAD) if ahead else CALLS
    rounds = max(3, min(most, int(budget / max(once, 1e-6))))
    events = [(clock.event(), clock.event()) for _ in range(rounds)]
    function()
    for begin, end in events:
        clock.flush()
        if ahead:
            clock.ahead()
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
    found |= launches(clock)
    return {name: float(f"{value:.4g}") for name, value in found.items()}


LAUNCHES = 200


def launches(clock: Clock) -> dict[str, float]:
    """The cost of a kernel that does next to nothing, launched from Python and from a graph."""
    x = torch.zeros(1)

    def many() -> None:
        for _ in range(LAUNCHES):
            x.add_(1)

    return {
        name: 1e6 * min(timed(clock, function, memory=False).seconds) / LAUNCHES
        for name, function in (("launch_us", many), ("graph_kernel_us", clock.captured(many)))
    }


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
    """The form, on the given backend."""

    def make() -> Callable[..., Tensor]:
        function = form.make()

        def call(*inputs: Tensor) -> Tensor:
            with use_backend(backend):
                return function(*inputs)

        return call

    return dataclasses.replace(form, make=make, kind="forced")


def forced_forms(case: Case) -> dict[str, Form]:
    """Forms of the kernels between which "auto" chooses by a table, in two dtypes."""
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


VGG16_BEST = "VGG-16 channels_last bfloat16"


def vgg16_in_bfloat16() -> workloads.VGG16Perceptual:
    loss = workloads.VGG16Perceptual().to(torch.bfloat16)
    loss.features.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return loss


def on_gpu(case: Case) -> Case:
    """The case with the forms that only a GPU has."""
    forms = dict(case.forms) | forced_forms(case)
    if case.op == "mghf_c":
        forms[VGG16_BEST] = best = Form(
            vgg16_in_bfloat16, "peer", channels_last=True, dtype="bfloat16", inputs=torch.bfloat16
        )
        forms[VGG16_BEST + " compile"] = dataclasses.replace(best, compiled=True)
        alex = functools.partial(workloads.LPIPSLayout, "alex")
        forms["LPIPS AlexNet"] = Form(alex, "peer")
        forms["LPIPS VGG-16"] = Form(functools.partial(workloads.LPIPSLayout, "vgg"), "peer")
        forms["LPIPS AlexNet compile"] = Form(alex, "peer", compiled=True)
    for name, form in list(forms.items()):
        if form.compiled:
            forms[name + AUTOTUNED] = form
        if form.kind == "ours":
            forms[name + CAPTURED] = form
    return dataclasses.replace(case, forms=forms)


OWN, OTHERS, COMPILE = "own", "others", "compile"


def shapes_of(op: str, quick: bool, which: str) -> list[Shape]:
    """The shapes of an op's rows: for our kernels those that people train with, the paper's first;
    for others these and 2048 x 2048."""
    whole = op in WHOLE
    if quick:
        return [PAPER, LATENTS] if whole else [PAPER]
    if op == "dec":
        return [PAPER, *(s for s in cases.CASES[op].shapes if s not in cases.SIZES)]
    return [*(STEPS if whole else OPS_AT), *(SIZES[3:] if which == OTHERS else ())]


def rows_of(case: Case, quick: bool, which: str) -> list[tuple[Shape, str]]:
    """The rows of an op in the order of measurement: its own, launched and as a captured graph;
    other libraries' (those for one op at the paper's size, the losses that this one replaces at
    every size); compiled forms, at the paper's size."""
    forms = case.forms
    if which == COMPILE:
        allowed = (*WHOLE, *COMPILED_OPS)
        names = [name for name, form in forms.items() if form.compiled]
        names.sort(key=lambda name: (name.endswith(AUTOTUNED), forms[name].kind != "peer"))
        return [(PAPER, name) for name in names if case.op in allowed]
    kinds = ("ours",) if which == OWN else ("eager", "peer")
    return [
        (shape, name)
        for shape in shapes_of(case.op, quick, which)
        for name, form in forms.items()
        if form.kind in kinds
        and not form.compiled
        and (form.kind != "peer" or case.op in WHOLE or shape == PAPER)
    ]


@contextlib.contextmanager
def chosen(found: dict[str, str]) -> Iterator[None]:
    """Records which backend every op takes in this context."""
    choose = _dispatch.Op.choose

    def watch(op: _dispatch.Op, backend: str, *tensors: Tensor, **options: Any) -> Any:
        implementation = choose(op, backend, *tensors, **options)
        names = (n for n, i in op._implementations.items() if i is implementation)
        found[op.name] = next(names)
        return implementation

    _dispatch.Op.choose = watch  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        _dispatch.Op.choose = choose  # type: ignore[method-assign]


def measure_part(
    clock: Clock,
    case: Case,
    shape: Shape,
    name: str,
    part: str,
    backends: dict[str, str] | None = None,
) -> Measurement:
    """Measures a part of a row; ``backends`` receives the backend that each op took."""
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
        # A captured graph, which max-autotune uses too, has its memory before it runs.
        if form.kind == "ours":
            with chosen({} if backends is None else backends):
                step()
        measured = clock.captured(step) if captured else step
        return timed(clock, measured, memory=not (captured or autotuned))
    except Exception as error:
        return Measurement(failure=failure(error))


def measure_op(clock: Clock, op: str, rows: list[tuple[Shape, str]], write: Write) -> None:
    case = cases.CASES[op]
    for shape, name in rows:
        # Compiling is slow: compiled forms are only measured for the parts that the tables show.
        parts = [part_of(op)] if case.forms[name].compiled else case.parts_of(name)
        found: dict[str, Measurement] = {}
        backends: dict[str, str] = {}
        for part in parts:
            clock.clear()
            found[part] = measure_part(clock, case, shape, name, part, backends)
        row = results.new_row(op, shape, name, torch.get_num_threads(), found)
        if case.forms[name].kind == "ours":
            device = torch.get_default_device().type
            row |= {"backend": current_backend(), "backends": backends}
            row["precision"] = product_precision("auto", device)
        write(row)


# ---- values and Table 5 ----


def values(write: Write) -> None:
    """Compares every op's result and gradient with the reference in float32, at a tiny size."""
    for op in OPS:
        case = cases.CASES[op]
        ours = [name for name in (OURS, *FORCED.values()) if name in case.forms]
        for name, part in itertools.product(ours, case.parts_of(OURS)):
            found: dict[str, Any] = {"op": op, "form": name, "part": part}
            try:
                outcomes = []
                for form in (name, "eager"):
                    torch.manual_seed(0)  # for the upstream gradient
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
    """The rows of Table 5 with their counts, and the measured time of a step of each."""
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
    """Runs one part on the default device. For tests ``size`` replaces all sizes by a small one."""
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
        elif part == "flash":
            from . import gpu_flash  # which needs the clocks of this module

            gpu_flash.compare(clock, write, size)
        elif part == "profile":
            shapes = (PAPER,) if quick else (PAPER, Shape(1, 1024))
            gpu_profile.profiles(shapes if size is None else [Shape(1, size)], write)
        elif part == "counters":
            step = gpu_profile.whole_step(cases.CASES["mghf_c"], Shape(1, size or PAPER.size))
            for _ in range(2):
                step()
        else:
            name, _, which = part.partition("-")
            for op in OPS if name in ("own", "ops") else (name,):
                rows = rows_of(cases.CASES[op], quick, which or OWN)
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
    parser.add_argument("--older", nargs="+", default=(), help="ops to run older CUDA kernels")
    options = parser.parse_args()
    torch.set_default_device(options.device)
    if options.older:
        with contextlib.suppress(RuntimeError):  # without CUDA kernels there is nothing to switch
            gpu_variants.use_older(options.older)

    def write(row: dict[str, Any]) -> None:
        with options.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    run(options.part, write, quick=options.quick, backend=options.backend, size=options.size)


if __name__ == "__main__":
    main()
