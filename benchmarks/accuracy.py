"""Errors of every op whose products have a precision, against float64, on small problems.

    python -m benchmarks.accuracy --backend cpu cuda --write
    TRITON_INTERPRET=1 python -m benchmarks.accuracy --backend triton --write

Without a GPU the CUDA kernels run in the emulator (`make cuda-host`), whose tensor cores cut off
factors and sums as a GPU's do, and Triton's in its interpreter, where a single product in TF32 or
bfloat16 has a GPU's factors, while products in three parts, and all sums, are NumPy's in float32.
With a GPU both run there. `--write` puts the errors into accuracy.json and a table of all backends
into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mghf_fast.ops
from mghf_fast import problems
from mghf_fast.precision import PRECISIONS

ROOT = Path(__file__).parents[1]
ERRORS = Path(__file__).with_name("accuracy.json")
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

Errors = dict[str, dict[str, dict[str, list[float]]]]
"""Where it ran -> op -> precision -> relative L2 errors of the result and its gradient."""


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


def _install(backend: str, host_modules: Path) -> tuple[str, torch.device]:
    """Makes a backend run here; where it does, and the device of its tensors."""
    if backend == "cpu":
        return "CPU", torch.device("cpu")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return f"{'CUDA C++' if backend == 'cuda' else 'Triton'}, {name}", torch.device("cuda")
    sys.path.insert(0, str(ROOT / "tests"))
    if backend == "cuda":
        os.environ["MGHF_CUDA_HOST"] = str(host_modules.resolve())
        importlib.import_module("emulated").install()
        return "CUDA C++, emulated", torch.device("cpu")
    interpreter = importlib.import_module("interpreter")
    interpreter.hasten()
    interpreter.round_bfloat16()
    interpreter.cut_tf32()
    return "Triton, interpreted", torch.device("cpu")


def table(errors: Errors) -> str:
    """The page's part between the marks: a row for each op and place."""
    lines = [f"| op | ran on | {' | '.join(PRECISIONS)} |", "|---" * (2 + len(PRECISIONS)) + "|"]
    for op in SIZES:
        for place, of_ops in sorted(errors.items()):
            if op in of_ops:
                cells = [", ".join(f"{e:.1e}" for e in of_ops[op][p]) for p in PRECISIONS]
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
    for backend in options.backend:
        place, device = _install(backend, options.host_modules)
        found: dict[str, Any] = {}
        for op in SIZES:
            if (reason := mghf_fast.ops.OPS[op].why_not(backend, torch.zeros(1))) is not None:
                print(f"{backend} cannot run {op}: {reason}", file=sys.stderr)
                return 2
            found[op] = errors_of(op, backend, device)
            print(f"{place}: {op} {found[op]}", flush=True)
        known[place] = found
    if options.write:
        ERRORS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        PAGE.write_text(replaced(PAGE.read_text(), known))
    return 0


if __name__ == "__main__":
    sys.exit(main())
