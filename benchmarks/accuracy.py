"""Errors of every op whose products have a precision, against float64, on small problems.

    python -m benchmarks.accuracy --backend cpu cuda --write
    TRITON_INTERPRET=1 python -m benchmarks.accuracy --backend triton --write

Without a GPU the CUDA kernels run in the emulator (`make cuda-host`), those for compute capability
9.0 and those for 8.0; its tensor cores cut off factors and sums as a GPU's do. Triton's run in its
interpreter, where a single product in TF32 or bfloat16 has a GPU's factors, while products in three
parts, and all sums, are NumPy's in float32. With a GPU both run there. `--write` puts the errors
into results/accuracy.json and a table of all backends into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mghf_fast.ops
from mghf_fast import problems
from mghf_fast.precision import PRECISIONS

from . import results

ROOT = Path(__file__).parents[1]
ERRORS = results.RESULTS / "accuracy.json"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- accuracy: begin -->\n", "<!-- accuracy: end -->\n"
BACKENDS = ("cpu", "cuda", "triton")
SIZES = {
    "coupling": (1, 11),
    "gram": (1, 19),
    "content_style": (1, 24),
    "patches": (1, 56),
    "monce": (2, 30),
}
"""Op -> the size of its problem: small enough for the emulator."""

GPUS = {"9.0": (227 << 10, True), "8.0": (163 << 10, False)}
"""Compute capability -> what the emulator has of such a GPU: bytes of a block's shared memory, and
whether there are clusters and products of warpgroups."""

Errors = dict[str, dict[str, Any]]
"""Where it ran -> ``machine``, ``torch`` and ``errors``: op -> precision -> relative L2 errors of
the result and its gradient."""
Place = tuple[str, torch.device, Callable[[], object]]
"""Where a backend runs, the device of its tensors, and what must be called before."""


def _problem(op: str) -> problems.Problem:
    problem = problems.PROBLEMS[op](*SIZES[op])
    if op != "content_style":
        return problem

    def gram_term(tensors: tuple[Tensor, ...], *chosen: str) -> Tensor:
        return problem.run(tensors, *chosen)[3:]

    # The other terms have no products.
    return dataclasses.replace(problem, run=gram_term)


def errors_of(op: str, backend: str, device: torch.device) -> dict[str, list[float]]:
    """By precision the errors of the op's result and of its gradient."""
    problem = _problem(op).to(device, torch.float32)
    exact = problem.to(device, torch.float64).results("reference")

    def relative(got: Tensor, want: Tensor) -> float:
        return float(f"{float((got.double() - want).norm() / want.norm()):.1e}")

    return {
        precision: [
            relative(got, want)
            for got, want in zip(problem.results(backend, precision=precision), exact, strict=True)
        ]
        for precision in PRECISIONS
    }


_FOR_GOOD = contextlib.ExitStack()


def _places(backend: str, host_modules: Path) -> list[Place]:
    """Makes a backend run here."""
    cpu = torch.device("cpu")
    if backend == "cpu":
        return [("CPU", cpu, lambda: None)]
    language = "CUDA C++" if backend == "cuda" else "Triton"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return [(f"{language}, {name}", torch.device("cuda"), lambda: None)]
    sys.path.insert(0, str(ROOT / "tests"))
    if backend == "cuda":
        os.environ["MGHF_CUDA_HOST"] = str(host_modules.resolve())
        emulated = importlib.import_module("emulated")
        _FOR_GOOD.enter_context(emulated.installed())
        host = importlib.import_module("cuda_host").load(str(emulated.module("plain")))
        return [
            (f"{language}, {capability} emulated", cpu, functools.partial(host.set_gpu, *gpu))
            for capability, gpu in GPUS.items()
        ]
    interpreter = importlib.import_module("interpreter")
    interpreter.hasten()
    interpreter.round_bfloat16()
    interpreter.cut_tf32()
    return [(f"{language}, interpreted", cpu, lambda: None)]


def table(errors: Errors) -> str:
    """The page's part between the marks: a row for each op and place."""
    lines = [f"| op | ran on | {' | '.join(PRECISIONS)} |", "|---" * (2 + len(PRECISIONS)) + "|"]
    for op in SIZES:
        for place, found in sorted(errors.items()):
            if (of_op := found["errors"].get(op)) is not None:
                cells = [", ".join(f"{e:.1e}" for e in of_op[p]) for p in PRECISIONS]
                lines.append(f"| {op} | {place} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def replaced(page: str, errors: Errors) -> str:
    """The page with the table of these errors between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(errors)}{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["cpu"])
    parser.add_argument(
        "--host-modules",
        type=Path,
        default=Path("build/cuda-host"),
        help="folder of the CUDA kernels' host build, for the backend cuda without a GPU",
    )
    parser.add_argument("--write", action="store_true", help=f"rewrite {ERRORS.name} and the page")
    options = parser.parse_args(arguments)
    known: Errors = json.loads(ERRORS.read_text()) if ERRORS.exists() else {}
    facts = {"machine": results.this_machine(torch.get_num_threads()), "torch": torch.__version__}
    for backend in options.backend:
        for place, device, prepare in _places(backend, options.host_modules):
            prepare()
            found: dict[str, Any] = {}
            for op in SIZES:
                reason = mghf_fast.ops.OPS[op].why_not(backend, torch.zeros(1))
                if reason is not None:
                    print(f"{backend} cannot run {op}: {reason}", file=sys.stderr)
                    return 2
                found[op] = errors_of(op, backend, device)
                print(f"{place}: {op} {found[op]}", flush=True)
            known[place] = facts | {"errors": found}
    if options.write:
        ERRORS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        PAGE.write_text(replaced(PAGE.read_text(), known))
    return 0


if __name__ == "__main__":
    sys.exit(main())
