"""Registers, shared memory and spills of every Triton kernel as it is launched, without a GPU.

    python -m tools.resources            every kernel once for each architecture
    python -m tools.resources --all      every launch of tools/cases.py, with all its options
    python -m tools.resources gram dec   only these ops, in either form

Prints each kernel's resources, and fails if one spills or needs more shared memory than the
architecture has. The numbers are not compared: they change with every edit and every Triton.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .cases import CASES, Launch, launches
from .limits import Resources, Table, cuobjdump, tell

ARCHITECTURES = (80, 90, 100)


# ---- what is compiled ----


@functools.cache
def rows(op: str, architecture: int) -> dict[str, Launch]:
    """The launches of an op, each by a name of op, kernel and case."""
    found: dict[str, Launch] = {}
    for launch in launches(op, architecture):
        name = f"{op}: {launch.kernel.__name__}, {launch.case}"
        again = sum(other == name or other.startswith(f"{name} #") for other in found)
        found[f"{name} #{again + 1}" if again else name] = launch
    return found


def op_of(row: str) -> str:
    return row.partition(":")[0]


def to_compile(ops: Sequence[str], every: bool) -> list[tuple[str, int]]:
    """(row, architecture): the first row of each kernel, or every row."""
    jobs: list[tuple[str, int]] = []
    for op in ops:
        for architecture in ARCHITECTURES:
            first: dict[str, str] = {}
            for name, launch in rows(op, architecture).items():
                first.setdefault(name if every else launch.kernel.__name__, name)
            jobs += [(name, architecture) for name in first.values()]
    return jobs


# ---- compiling ----


def compile_row(job: tuple[str, int]) -> Resources:
    name, architecture = job
    launch = rows(op_of(name), architecture)[name]
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    registers, local = _usage(compiled.asm["cubin"])
    return Resources(registers, local, int(compiled.metadata.shared))


def _usage(binary: bytes) -> tuple[int, int]:
    """Registers, and the bytes of stack to which the compiler spilled, from the object code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        text = cuobjdump(path)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text[:200]!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def compile_rows(jobs: Sequence[tuple[str, int]]) -> Table:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(compile_row, jobs)
        return {(name, f"sm_{a}"): r for (name, a), r in zip(jobs, compiled, strict=True)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.resources")
    parser.add_argument("--all", action="store_true", help="compile every launch")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"default: {' '.join(CASES)}")
    options = parser.parse_args(arguments)
    if unknown := [op for op in options.ops if op not in CASES]:
        parser.error(f"op is {unknown[0]!r}; allowed are {', '.join(CASES)}")
    jobs = to_compile(options.ops or tuple(CASES), options.all)
    return tell(compile_rows(jobs), f"Triton {triton.__version__}")


if __name__ == "__main__":
    sys.exit(main())
