"""Registers, shared memory and spills of every kernel as it is launched, without a GPU.

    python -m tools.resources            check against the table of this Triton version
    python -m tools.resources --write    compile what has changed into the table
    python -m tools.resources gram dec   only these ops, in either form

A row of the table, `tools/resources/triton-<version>.json`, keeps a fingerprint of what was
compiled: the kernel's source and all that its launch specialises it to. The check fails where a
fingerprint is not the table's, and compiles every kernel once for each architecture, in the first
of its rows; with --all, every row.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import CodeType
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tools.cases import CASES, Launch, launches

ARCHITECTURES = (80, 90, 100)
# Of a block. Code for sm_80 runs on sm_86 and sm_89 too, which have less of it than sm_80.
SHARED_LIMIT = {80: 99 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10,
                120: 99 << 10}  # fmt: skip
TABLES = Path(__file__).parent / "resources"

Resources = dict[str, Any]
Table = dict[str, dict[str, Resources]]
"""Row -> architecture -> what was compiled, and what it takes."""


# ---- compiling ----


@functools.cache
def rows(op: str, architecture: int) -> dict[str, Launch]:
    """The launches of an op by the names of their rows."""
    found: dict[str, Launch] = {}
    for launch in launches(op, architecture):
        name = f"{op}: {launch.kernel.__name__}, {launch.case}"
        again = sum(other == name or other.startswith(f"{name} #") for other in found)
        found[f"{name} #{again + 1}" if again else name] = launch
    return found


def fingerprint(launch: Launch) -> str:
    """Of everything that the compiled code depends on but Triton."""
    specialised = (launch.signature, launch.constants, launch.attributes, launch.options)
    text = f"{sorted(_sources(launch.kernel).items())} {[sorted(s.items()) for s in specialised]}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _sources(kernel: Any) -> dict[str, str]:
    """Of a kernel and of all functions it calls, and the constants that they use."""
    found: dict[str, str] = {}
    left = [kernel]
    while left:
        function = left.pop()
        if function.__qualname__ in found:
            continue
        found[function.__qualname__] = function.src
        for name in _names(function.fn.__code__):
            value = function.__globals__.get(name)
            if isinstance(value, triton.JITFunction):
                left.append(value)
            elif isinstance(value, tl.constexpr):
                found[name] = repr(value.value)
    return found


def _names(code: CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def compile_row(job: tuple[str, int]) -> Resources:
    """Registers a thread, bytes spilled a thread, and bytes of shared memory a block."""
    name, architecture = job
    launch = rows(op_of(name), architecture)[name]
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    registers, local = _usage(compiled.asm["cubin"])
    return {
        "of": fingerprint(launch),
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


def compile_rows(jobs: Sequence[tuple[str, int]]) -> Table:
    table: Table = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (name, architecture), found in zip(jobs, pool.map(compile_row, jobs), strict=True):
            table.setdefault(name, {})[f"sm_{architecture}"] = found
    return table


# ---- the table ----


def op_of(row: str) -> str:
    return row.partition(":")[0]


def path_of_table() -> Path:
    return TABLES / f"triton-{triton.__version__}.json"


def entry(table: Table, row: str, architecture: int) -> Resources:
    return table.get(row, {}).get(f"sm_{architecture}", {})


def changed(table: Table, ops: Sequence[str]) -> list[tuple[str, int]]:
    """Rows that the table does not have, or has of another source or launch."""
    return [
        (name, architecture)
        for op in ops
        for architecture in ARCHITECTURES
        for name, launch in rows(op, architecture).items()
        if entry(table, name, architecture).get("of") != fingerprint(launch)
    ]


def to_compile(table: Table, ops: Sequence[str], every: bool) -> list[tuple[str, int]]:
    """What has changed, and the first row of each kernel or every one."""
    jobs = dict.fromkeys(changed(table, ops))
    for op in ops:
        for architecture in ARCHITECTURES:
            first: dict[str, str] = {}
            for name, launch in rows(op, architecture).items():
                first.setdefault(name if every else launch.kernel.__name__, name)
            jobs.update(dict.fromkeys((name, architecture) for name in first.values()))
    return list(jobs)


def without_gone(table: Table, ops: Sequence[str]) -> Table:
    """The table without rows of these ops that no case launches any more."""
    known = {(name, f"sm_{a}") for op in ops for a in ARCHITECTURES for name in rows(op, a)}
    kept = {
        name: {a: found for a, found in row.items() if (name, a) in known or op_of(name) not in ops}
        for name, row in table.items()
    }
    return {name: row for name, row in kept.items() if row}


def problems(table: Table) -> list[str]:
    """What no default may do: spill, or ask for more shared memory than there is."""
    found = []
    for name, row in table.items():
        for architecture, r in row.items():
            limit = SHARED_LIMIT[int(architecture.removeprefix("sm_").rstrip("a"))]
            if r["spilled_bytes"]:
                found.append(f"{name}, {architecture}: spills {r['spilled_bytes']} bytes")
            if r["shared_bytes"] > limit:
                found.append(f"{name}, {architecture}: shared memory {r['shared_bytes']} > {limit}")
    return found


def differences(compiled: Table, committed: Table) -> list[str]:
    """Where what was compiled is not what the table says, a line each."""
    return [
        f"{name}, {architecture}: {old or 'not in the table'} -> {new}"
        for name, row in compiled.items()
        for architecture, new in row.items()
        if (old := committed.get(name, {}).get(architecture)) != new
    ]


def merged(table: Table, more: Table) -> Table:
    return {
        name: dict(sorted((table.get(name, {}) | more.get(name, {})).items()))
        for name in sorted({*table, *more})
    }


def write(table: Mapping[str, Any], path: Path) -> None:
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in table.items())
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{{\n{lines}\n}}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.resources")
    parser.add_argument("--write", action="store_true", help="compile changes into the table")
    parser.add_argument("--all", action="store_true", help="compile every row")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"default: {' '.join(CASES)}")
    options = parser.parse_args(arguments)
    if unknown := [op for op in options.ops if op not in CASES]:
        parser.error(f"op is {unknown[0]!r}; allowed are {', '.join(CASES)}")
    ops, path = options.ops or tuple(CASES), path_of_table()
    committed: Table = json.loads(path.read_text()) if path.exists() else {}
    kept = without_gone(committed, ops)
    if options.write:
        compiled = compile_rows(to_compile(kept, ops, True) if options.all else changed(kept, ops))
        table, complaints = merged(kept, compiled), []
        write(table, path)
    else:
        compiled = compile_rows(to_compile(kept, ops, options.all))
        table, complaints = kept, differences(compiled, committed)
        if kept != committed:
            complaints.append(f"{path.name} has rows of what is launched no more")
        if complaints:
            complaints.append("the table has changed: --write writes it anew")
    complaints += problems(table)
    for text in complaints:
        print(text, file=sys.stderr)
    count = sum(map(len, compiled.values()))
    print(f"{path.name}: {count} compiled, {sum(map(len, table.values()))} in the table")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
