"""Registers, shared memory and spills of the CUDA kernels, read from their library.

    python -m tools.native_resources build/cuda/libmghf_fast_cuda.so [--write]

fails where a kernel spills or asks for more shared memory than there is, and tells where they
differ from the committed table of this nvcc, `tools/resources/nvcc-<version>.json`, in the form
of the Triton kernels' tables. That table is of all architectures, takes many minutes, and is made
for a release; which sources it is of is what their fingerprint says. What a launch asks for in
dynamic shared memory depends on the sizes of the problem and on the GPU, and is not in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from tools.resources import TABLES, Table, differences, problems, write

FUNCTION = re.compile(
    r"Function (?P<name>\S+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) "
    r"SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)"
)


def demangled(names: Sequence[str]) -> list[str]:
    """Without namespaces and parameters: `range_of_maps<float, true>`."""
    run = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = []
    for line in run.stdout.splitlines():
        text = re.sub(r"\((?:anonymous namespace|bool|int)\)", "", line)
        text = re.sub(r"(?:\w+::)+", "", text).removeprefix("void ")
        depth, end = 0, len(text)
        for i, letter in enumerate(text):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = i
                break
        short.append(text[:end].removeprefix("::"))
    return short


def parse(text: str) -> Table:
    """Kernel -> architecture -> what it takes, from cuobjdump's list of all architectures."""
    table: Table = {}
    for part in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        architecture = part.split(None, 1)[0]
        found = list(FUNCTION.finditer(part))
        for name, f in zip(demangled([f["name"] for f in found]), found, strict=True):
            table.setdefault(name, {})[architecture] = {
                "registers": int(f["registers"]),
                "spilled_bytes": int(f["stack"]) + int(f["local"]),
                "shared_bytes": int(f["shared"]),
            }
    return dict(sorted(table.items()))


def measure(library: Path) -> Table:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(library)]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


SOURCES = "sources"
"""The row of the table that holds the fingerprint of the sources."""


def fingerprint(folder: Path) -> str:
    """Of the kernels, their headers and nothing else; words in comments do not count."""
    digest = hashlib.sha256()
    shared = (folder.parent / "common").glob("*.h")  # with the CPU's kernels
    for path in sorted([*folder.glob("*.cu"), *folder.glob("*.h"), *shared]):
        code = re.sub(r"//.*", "", path.read_text())
        digest.update(f"{path.name} {' '.join(code.split())}".encode())
    return digest.hexdigest()[:16]


def news(table: Table, committed: dict[str, Any], sources: str) -> list[str]:
    """Where the library is not what the committed table says."""
    rows = {name: row for name, row in committed.items() if name != SOURCES}
    found = differences(table, rows)
    found += [f"{name}: is no more" for name in rows if name not in table]
    if committed.get(SOURCES) != {"fingerprint": sources}:
        found.append("the table was made from other sources")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.native_resources")
    parser.add_argument("library", type=Path, help="libmghf_fast_cuda.so, with its build.json")
    parser.add_argument("--write", action="store_true", help="make the table anew")
    parser.add_argument("--sources", type=Path, default=Path("csrc/cuda"), help="of the library")
    options = parser.parse_args(arguments)
    facts = json.loads(options.library.with_name("build.json").read_text())["cuda"]
    path = TABLES / f"nvcc-{'.'.join(facts['version'].split('.')[:2])}.json"
    table, sources = measure(options.library), fingerprint(options.sources)
    complaints = problems(table)
    if options.write:
        sources_row: dict[str, Any] = {SOURCES: {"fingerprint": sources}}
        write(sources_row | table, path)
    else:
        committed: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if found := news(table, committed, sources):
            print("\n".join(found))
            print(f"`make cuda CUDA_ARCHS=all ARGS=--write` makes {path.name} anew, for a release")
    for text in complaints:
        print(text, file=sys.stderr)
    print(f"{path.name}: {len(table)} kernels for {', '.join(facts['architectures'])}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
