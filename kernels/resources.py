"""Registers, shared memory and spills of every pinned configuration, without a GPU.

    python -m mghf_fast.kernels.resources            check against the table of this Triton version
    python -m mghf_fast.kernels.resources --write    make the table anew
    python -m mghf_fast.kernels.resources gram dec   only these ops, in either form

Every configuration is compiled ahead of time for each architecture; the tables,
`kernels/resources/triton-<version>.json`, are committed, so that a change of a kernel or of Triton
that costs registers does not pass unnoticed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Configuration

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
OPS = ("content_style", "coupling", "dec", "entropy", "gram", "monce", "patches", "sinkhorn")
TABLES = Path(__file__).parent / "resources"

Resources = dict[str, int]


def configurations(ops: Sequence[str] = OPS) -> Iterator[tuple[str, Configuration]]:
    """Every configuration of the ops with the name of its row."""
    for op in ops:
        module = importlib.import_module(f".{op}", __package__)
        for c in module.CONFIGURATIONS:
            yield f"{op}: {c.kernel.__name__}{f' ({c.label})' if c.label else ''}", c


def compile_for(configuration: Configuration, architecture: int) -> Resources:
    """Registers a thread, bytes spilled a thread, and bytes of shared memory a block."""
    c = configuration
    names = c.kernel.arg_names
    signature = {name: c.types.get(name, "constexpr") for name in names}
    divisible = {n for n in names if signature[n].startswith("*")} | c.divisible
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    source = ASTSource(
        fn=c.kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in c.constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, local = _usage(compiled.asm["cubin"])
    return {
        "registers": registers,
        "spilled_bytes": local,
        "shared_bytes": int(compiled.metadata.shared),
    }


def _usage(binary: bytes) -> tuple[int, int]:
    """Registers, and the stack that the compiler put on top of them, from the object code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        result = subprocess.run(
            [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", result.stdout)
    if found is None:
        raise RuntimeError(f"{tool.name} says nothing of registers: {result.stdout[:200]!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _resources(job: tuple[str, int]) -> Resources:
    name, architecture = job
    return compile_for(dict(configurations([op_of(name)]))[name], architecture)


def op_of(row: str) -> str:
    return row.partition(":")[0]


def measure(ops: Sequence[str] = OPS) -> dict[str, dict[str, Resources]]:
    """Configuration -> architecture -> what it takes."""
    work = [(name, a) for name, _ in configurations(ops) for a in ARCHITECTURES]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(_resources, work))
    table: dict[str, dict[str, Resources]] = {}
    for (name, architecture), resources in zip(work, found, strict=True):
        table.setdefault(name, {})[f"sm_{architecture}"] = resources
    return table


def problems(table: dict[str, Any]) -> list[str]:
    """What no default may do: spill, or ask for more shared memory than there is."""
    found = []
    for name, row in table.items():
        for architecture, r in row.items():
            limit = SHARED_LIMIT[int(architecture.removeprefix("sm_"))]
            if r["spilled_bytes"]:
                found.append(f"{name}, {architecture}: spills {r['spilled_bytes']} bytes")
            if r["shared_bytes"] > limit:
                found.append(f"{name}, {architecture}: shared memory {r['shared_bytes']} > {limit}")
    return found


def differences(table: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Where two tables differ, a line each."""
    rows = sorted({*table, *committed})
    return [
        f"{name}: {committed.get(name, 'new')} -> {table.get(name, 'gone')}"
        for name in rows
        if table.get(name) != committed.get(name)
    ]


def path_of_table() -> Path:
    return TABLES / f"triton-{triton.__version__}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mghf_fast.kernels.resources")
    parser.add_argument("--write", action="store_true", help="make the table anew")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"default: {' '.join(OPS)}")
    options = parser.parse_args(arguments)
    if unknown := [op for op in options.ops if op not in OPS]:
        parser.error(f"op is {unknown[0]!r}; allowed are {', '.join(OPS)}")
    ops = options.ops or OPS
    path, table = path_of_table(), measure(ops)
    committed = json.loads(path.read_text()) if path.exists() else {}
    complaints = problems(table)
    if options.write:
        path.parent.mkdir(exist_ok=True)
        whole = {k: v for k, v in committed.items() if op_of(k) not in ops} | table
        rows = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(whole.items()))
        path.write_text(f"{{\n{rows}\n}}\n")
    elif not committed:
        complaints.append(f"there is no table {path.name}; --write makes it")
    else:
        old = {k: v for k, v in committed.items() if op_of(k) in ops}
        complaints += differences(table, old)
    for text in complaints:
        print(text, file=sys.stderr)
    print(f"{len(table)} configurations on {len(ARCHITECTURES)} architectures, {path.name}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
