"""How a benchmark is declared: an op, its shapes, and the forms that compute the same thing.

A row is one form at one shape. Its parts, which pytest-benchmark times one by one: `forward`, the
function alone without a graph, and `step`, forward and backward to the first input. On the CPU a
fresh process goes before (`probe_row`), under a time limit and within the machine's free memory: it
measures the memory, and keeps what cannot work away from the session.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mghf_fast.commands.memory import available_memory
from mghf_fast.commands.table5.measure import Measurement, measure_parts_apart
from mghf_fast.commands.table5.workloads import CHANNELS, PATCH_SIZE, STRIDE

LIMITS = {"ours": 300.0, "eager": 100.0, "compile": 360.0, "peer": 100.0}  # seconds for a row
FEW = 5  # rounds
# Seconds after which no call of a part is started, if fewer than FEW calls fill them; what is
# faster is timed as pytest-benchmark is told. A single call pays for fresh memory too; so ours and
# the peers, with which it is compared, get more.
BUDGETS = {"ours": 2.0, "eager": 1.0, "compile": 1.0, "peer": 3.0}


class Shape(NamedTuple):
    """The images' shape, (batch, 3, size, size), on whose features the op works."""

    batch: int
    size: int

    def __str__(self) -> str:
        return f"{self.batch}x3x{self.size}x{self.size}"

    @property
    def patches(self) -> int:
        """N, of one feature map."""
        return ((self.size - PATCH_SIZE) // STRIDE + 1) ** 2


SIZES = tuple(Shape(1, size) for size in (128, 256, 512, 1024, 2048))
PAPER, TRAINING, QUICK, WARM_UP = Shape(1, 512), Shape(8, 128), Shape(1, 256), Shape(1, 64)
COMPILED = (PAPER, TRAINING)  # compiling takes longer than running
BOTH = ("forward", "step")


@dataclass(frozen=True)
class Form:
    """One way to compute an op.

    ``make`` gives the function of the op's inputs, in the measuring process; ``kind`` is "ours",
    "forced" (ours on a backend that "auto" might not take), "eager" (the reference under autograd),
    "compile" (torch.compile of that) or "peer" (what else a user might take, from ``package``);
    ``inputs`` is their type; ``shapes`` and ``parts`` say where to measure it, if not everywhere;
    ``graded`` makes the function with products of a precision, where it has one.
    """

    make: Callable[[], Callable[..., Tensor]]
    kind: str
    compiled: bool = False
    channels_last: bool = False
    dtype: str = "float32"
    inputs: torch.dtype = torch.float32
    package: str | None = None
    shapes: Sequence[Shape] | None = None
    parts: Sequence[str] = BOTH
    graded: Callable[[str], Callable[..., Tensor]] | None = None


def standard_forms(
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *,
    images: bool = True,
    compiled: Sequence[Shape] = COMPILED,
    compiled_parts: Sequence[str] = BOTH,
    graded: bool = False,
) -> dict[str, Form]:
    """The forms of every op, in both layouts if the inputs are ``images`` (torch.compile in NCHW,
    in which it is faster, and eager at 2048 x 2048 too, to save minutes). ``graded``: whether
    ``ours`` takes a precision."""
    by_grade = (lambda grade: functools.partial(ours, precision=grade)) if graded else None
    forms = {
        "mghf_fast": Form(lambda: ours, "ours", channels_last=images, graded=by_grade),
        "eager": Form(lambda: reference, "eager"),
        "compile": Form(lambda: reference, "compile", True, shapes=compiled, parts=compiled_parts),
    }
    if images:
        shapes = (*SIZES[:4], TRAINING)
        forms["eager channels_last"] = Form(
            lambda: reference, "eager", channels_last=True, shapes=shapes
        )
        forms["mghf_fast NCHW"] = Form(lambda: ours, "ours", shapes=(PAPER,), graded=by_grade)
    return forms


@dataclass(frozen=True, eq=False)
class Case:
    """An op with its forms, declared in ``module``; ``output`` is its result's shape, none for a
    scalar, and ``ops`` are the ops that run, if not the one of that name."""

    op: str
    module: str
    inputs: Callable[[Shape], tuple[Tensor, ...]]
    forms: Mapping[str, Form]
    output: Callable[[Shape], tuple[int, ...]] | None = None
    shapes: Sequence[Shape] = (*SIZES, TRAINING)
    parts: Sequence[str] = BOTH
    ops: Sequence[str] = ()

    def rows(self, quick: bool = False) -> list[tuple[Shape, str, str]]:
        """(shape, form, part) in the order of measurement."""
        return [
            (shape, name, part)
            for shape in ((QUICK,) if quick else self.shapes)
            for name, form in self.forms.items()
            if (form.shapes is None or shape in form.shapes) and not (quick and form.compiled)
            for part in self.parts_of(name)
        ]

    def parts_of(self, form: str) -> list[str]:
        return [part for part in self.parts if part in self.forms[form].parts]

    def step(self, function: Callable[..., Tensor], shape: Shape, form: str, part: str) -> Any:
        """The function of no arguments that is timed; part "gradient" is the step without its
        forward, which runs once, here."""
        how = self.forms[form]
        layout = torch.channels_last if how.channels_last else torch.contiguous_format

        def laid_out(x: Tensor) -> Tensor:
            x = x.to(how.inputs) if x.is_floating_point() else x
            return x.contiguous(memory_format=layout) if x.dim() == 4 else x

        leaf, *others = (laid_out(x.detach()) for x in self.inputs(shape))
        if part == "forward":
            return lambda: torch.no_grad()(function)(leaf, *others)
        upstream = None if self.output is None else laid_out(torch.rand(self.output(shape)))
        if part == "gradient":
            result = function(leaf.requires_grad_(), *others)
            return lambda: torch.autograd.grad(result, leaf, upstream, retain_graph=True)
        return lambda: torch.autograd.grad(function(leaf.requires_grad_(), *others), leaf, upstream)


CASES: dict[str, Case] = {}


def measured(op: str, module: str, *arguments: Any, **options: Any) -> Callable[..., None]:
    """Declares a case and returns the test that times it; conftest.py gives it its rows."""
    case = CASES[op] = Case(op, module, *arguments, **options)

    def test(measure: Callable[..., None], shape: Shape, form: str, part: str) -> None:
        measure(case, shape, form, part)

    test.case = case  # type: ignore[attr-defined]
    return test


def load_all() -> dict[str, Case]:
    """Every case, after importing every bench_*.py."""
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        importlib.import_module(f"benchmarks.{path.stem}")
    return CASES


def prepare(module: str, op: str, shape: list[int], form: str, part: str) -> Callable[[], object]:
    """The warmed-up step of one part of a row, in the process that measures it."""
    importlib.import_module(module)
    case = CASES[op]
    function = case.forms[form].make()
    if case.forms[form].compiled:
        step = case.step(torch.compile(function), Shape(*shape), form, part)
        step()
        return step
    case.step(function, WARM_UP, form, part)()  # loads every library and starts the threads
    return case.step(function, Shape(*shape), form, part)


def limit_of(case: Case, form: str) -> float:
    """Seconds that all parts of a row may take together."""
    return LIMITS[case.forms[form].kind]


def probe_row(
    case: Case,
    shape: Shape,
    form: str,
    threads: int,
    earlier: Sequence[Mapping[str, Measurement]],
    apart: bool = True,
) -> dict[str, Measurement]:
    """What is to be known of every part of a row before it is timed: peak memory, the duration of
    one call, or why it will not be timed.

    ``earlier``: what the form gave at the smaller sizes, in order; a part that failed there, or
    surely would take too long here, is not tried. Without ``apart`` nothing is: a part that may be
    timed has neither memory nor duration.
    """
    how, parts, limit = case.forms[form], case.parts_of(form), limit_of(case, form)
    if how.package is not None and package_version(how.package) is None:
        return dict.fromkeys(parts, Measurement(failure=f"{how.package} is not installed"))
    reasons = {part: hopeless([row[part] for row in earlier], limit) for part in parts}
    found = {part: Measurement(failure=reason) for part, reason in reasons.items()}
    rest = [part for part in parts if reasons[part] is None]
    if apart and rest:
        arguments = {"module": case.module, "op": case.op, "shape": shape, "form": form}
        found |= measure_parts_apart(
            "benchmarks.cases:prepare", arguments, rest,
            timeout=limit, threads=threads, rounds=1, budget=BUDGETS[how.kind],
        )  # fmt: skip
    return {p: dataclasses.replace(m, failure=said(m.failure, limit)) for p, m in found.items()}


def said(failure: str | None, limit: float) -> str | None:
    """A failure as the tables put it."""
    if failure is not None and failure.startswith("timed out"):
        return f"over {limit:.0f} s"
    return "out of memory" if failure is not None and "out of memory" in failure else failure


def hopeless(earlier: Sequence[Measurement], limit: float) -> str | None:
    """Why the next size, with four times the pixels, need not be tried; ``None`` to try it. What
    may not fit the memory is tried, however slow: it finds that out sooner."""
    if not earlier or earlier[-1].failure is not None:
        return earlier[-1].failure if earlier else None
    ratios = [b.median / a.median for a, b in itertools.pairwise(earlier)]
    slow = earlier[-1].median * max([4.0, *ratios[-1:]]) > limit
    fits = 4 * (earlier[-1].peak_bytes or 0) < (available_memory() or math.inf)
    return f"over {limit:.0f} s" if slow and fits else None


def package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# Numbers are drawn on the CPU, the same ones for every device.


@functools.cache
def _block(side: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, CHANNELS, side, side, generator=generator, device="cpu")


def features(shape: Shape, seed: int = 0) -> Tensor:
    """(B, C, H, W), standard normal. One block of at most 256 x 256 is drawn and repeated: drawing
    all of a large stack takes longer than the ops."""
    side = min(shape.size, 256)
    block = _block(side, seed).to(torch.get_default_device())
    return block.repeat(shape.batch, 1, *[shape.size // side] * 2)


def embeddings(shape: Shape) -> tuple[Tensor, Tensor]:
    """Unit query and key embeddings that belong together, as in training: (B C, N, 64) each."""
    generator = torch.Generator().manual_seed(0)
    size = (2, shape.batch * CHANNELS, shape.patches, 64)
    numbers = torch.randn(size, generator=generator, device="cpu")
    query, noise = numbers.to(torch.get_default_device())
    return F.normalize(query, dim=2), F.normalize(query + 0.5 * noise, dim=2)
