"""Checks wheels before they are published: `python tools/audit_wheels.py dist/*.whl`.

A wheel with kernels may depend on the C++ runtime, on libtorch's C functions, and on nothing of
libtorch's C++, which changes from release to release; its CUDA kernels bring CUDA's runtime along.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MOST_BYTES = 10 << 20
LIBRARIES = {
    "libmghf_fast_cpu.so": {"libtorch_cpu.so"},
    "libmghf_fast_cuda.so": {"libtorch_cpu.so", "libtorch_cuda.so"},
}
SYSTEM = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"}
UNSTABLE = re.compile(r"\b(?:c10|at|caffe2|torch)::")
NAME = re.compile(r"mghf_fast-[\d.]+(?:\+(cpu|cu\d+))?-py3-none-(any|manylinux\w+)\.whl")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def problems_of_library(library: Path) -> list[str]:
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-dW", str(library))))
    found = [f"needs {name}" for name in sorted(needed - SYSTEM - LIBRARIES[library.name])]
    symbols = output("nm", "-D", "--undefined-only", "--demangle", str(library))
    return found + [
        f"uses {s.split(None, 1)[1]}" for s in symbols.splitlines() if UNSTABLE.search(s)
    ]


def problems_of_wheel(wheel: Path, folder: Path) -> list[str]:
    if (name := NAME.fullmatch(wheel.name)) is None:
        return ["is not named as a wheel of this project that may be given away"]
    kind, platform = name.groups()
    if (kind is None) != (platform == "any"):
        return [f"is for {platform}, and has {'no kernels' if kind is None else 'kernels'}"]
    found = [f"has {wheel.stat().st_size} bytes"] if wheel.stat().st_size > MOST_BYTES else []
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    expected = {} if kind is None else dict(list(LIBRARIES.items())[: 1 + (kind != "cpu")])
    having = {path.name: path for path in folder.rglob("*.so*")}
    if having.keys() != expected.keys():
        return [*found, f"has the libraries {sorted(having)}, not {sorted(expected)}"]
    for name_of, library in having.items():
        found += [f"{name_of} {problem}" for problem in problems_of_library(library)]
    if kind is not None:
        facts = json.loads(next(folder.rglob("build.json")).read_text())["cuda"]
        version = None if facts is None else "cu" + "".join(facts["version"].split(".")[:2])
        if (version or "cpu") != kind:
            found.append(f"was built for {version or 'no CUDA'}")
    return found


def main(wheels: list[str]) -> int:
    failed = False
    for wheel in map(Path, wheels):
        with tempfile.TemporaryDirectory() as folder:
            found = problems_of_wheel(wheel, Path(folder))
        failed |= bool(found)
        print(f"{wheel.name}: {'; '.join(found) or f'{wheel.stat().st_size / 2**20:.1f} MiB, ok'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
