"""The limits of compiled kernels: no spilled registers, no more shared memory than there is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import triton

# Bytes that a block may have. Code for sm_80 also runs on sm_86 and sm_89, which have less.
SHARED_LIMIT = {80: 99 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10,
                120: 99 << 10}  # fmt: skip


class Resources(NamedTuple):
    """Registers and spilled bytes per thread, bytes of shared memory per block."""

    registers: int
    spilled_bytes: int
    shared_bytes: int

    def __str__(self) -> str:
        text = f"{self.registers} registers, {self.shared_bytes} bytes of shared memory"
        return text + (f", {self.spilled_bytes} bytes spilled" if self.spilled_bytes else "")


Table = Mapping[tuple[str, str], Resources]
"""(kernel, with its case if there are several; architecture such as "sm_90a") -> its resources."""


def cuobjdump(path: Path) -> str:
    """The resources of every function of an object file, by the tool that ships with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def problems(table: Table) -> list[str]:
    """A sentence for every kernel that is beyond a limit."""
    found = []
    for (name, architecture), r in table.items():
        limit = SHARED_LIMIT[int(architecture.removeprefix("sm_").rstrip("a"))]
        if r.spilled_bytes:
            found.append(f"{name}, {architecture}: spills {r.spilled_bytes} bytes")
        if r.shared_bytes > limit:
            found.append(f"{name}, {architecture}: shared memory {r.shared_bytes} > {limit}")
    return found


def tell(table: Table, compiler: str) -> int:
    """Prints the table and the problems, and returns the exit status. An empty table is a
    problem."""
    for (name, architecture), resources in table.items():
        print(f"{name}, {architecture}: {resources}")
    complaints = problems(table)
    for text in complaints:
        print(text, file=sys.stderr)
    print(f"{compiler}: {len(table)} compiled, {len(complaints)} beyond the limits")
    return 1 if complaints or not table else 0
