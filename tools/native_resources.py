"""Registers, shared memory and spills of the CUDA kernels, read from their library.

    python -m tools.native_resources build/cuda/libmghf_fast_cuda.so

prints each kernel's resources, and fails if one spills or needs more shared memory than there is.
A launch's dynamic shared memory, which depends on the sizes of the problem and on the GPU, is not
included.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .limits import Resources, Table, cuobjdump, tell

FUNCTION = re.compile(
    r"Function (?P<name>\S+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) "
    r"SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)"
)


def demangled(names: Sequence[str]) -> list[str]:
    """The names without namespaces and parameters: `range_of_maps<float, true>`."""
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
    """The table of all kernels and architectures in cuobjdump's list. Kernels of different files
    may have the same name, because they are in unnamed namespaces; later ones are numbered."""
    table: dict[tuple[str, str], Resources] = {}
    for part in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        architecture = part.split(None, 1)[0]
        found = list(FUNCTION.finditer(part))
        for name, f in zip(demangled([f["name"] for f in found]), found, strict=True):
            spilled = int(f["stack"]) + int(f["local"])
            resources = Resources(int(f["registers"]), spilled, int(f["shared"]))
            again = sum(other.partition(" #")[0] == name for other, a in table if a == architecture)
            table[f"{name} #{again + 1}" if again else name, architecture] = resources
    return dict(sorted(table.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.native_resources")
    parser.add_argument("library", type=Path, help="libmghf_fast_cuda.so, with its build.json")
    options = parser.parse_args(arguments)
    facts = json.loads(options.library.with_name("build.json").read_text())["cuda"]
    compiler = f"nvcc {facts['version']} for {', '.join(facts['architectures'])}"
    return tell(parse(cuobjdump(options.library)), compiler)


if __name__ == "__main__":
    sys.exit(main())
