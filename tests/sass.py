"""The instructions to which the CUDA kernels are compiled, read from their library."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURE = "sm_90a"


def tool(name: str) -> str:
    """A program of CUDA's in PATH, or the one that comes with Triton."""
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return shutil.which(name) or str(shipped)


def disassemblies(library: Path, folder: Path) -> Iterator[str]:
    """Those of the library's files for ARCHITECTURE; writes to ``folder``."""
    extract = [tool("cuobjdump"), "-xelf", ARCHITECTURE, library.absolute()]
    subprocess.run(extract, check=True, capture_output=True, cwd=folder)
    for cubin in sorted(folder.glob("*.cubin")):
        command = [tool("nvdisasm"), "-c", cubin]
        yield subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Kernel:
    """Mnemonics in order, without what follows a dot, and the loops among them as the indices of
    their first and last instructions."""

    name: str
    instructions: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]

    @property
    def kibibytes(self) -> float:
        return len(self.instructions) * 16 / 1024

    def count(self, *mnemonics: str) -> int:
        return sum(self.instructions.count(m) for m in mnemonics)

    def tensor_share(self, of_three: bool = False) -> float:
        """Share of tensor instructions in the loops that have any; an instruction belongs to its
        innermost loop. ``of_three``: without the loops that have a third of another's, or of a part
        of one that is unrolled further. They make one product where the other makes three."""
        found: list[Counter[str]] = []
        for first, last in self.loops:
            inner = [
                (a, b)
                for a, b in self.loops
                if first <= a and b <= last and (a, b) != (first, last)
            ]
            own = Counter(
                self.instructions[k]
                for k in range(first, last + 1)
                if not any(a <= k <= b for a, b in inner)
            )
            if products(own):
                found.append(own)
        counts = [own["HMMA"] for own in found]
        if of_three:
            found = [own for own in found if all(n % (3 * own["HMMA"]) for n in counts)]
        total = sum(own.total() for own in found)
        return sum(map(products, found)) / total if total else 0.0


def products(of: Counter[str]) -> int:
    """The tensor cores' instructions."""
    return of["HMMA"] + of["HGMMA"]


def kernels(text: str) -> Iterator[Kernel]:
    for section in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        lines = section.splitlines()
        instructions: list[str] = []
        labels: dict[str, int] = {}
        loops: dict[int, int] = {}
        for line in lines[1:]:
            if label := re.match(r"\s*(\.L_\w+):", line):
                labels[label[1]] = len(instructions)
                continue
            found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+)", line)
            if found is None:
                continue
            if found[1] == "BRA" and (to := re.search(r"`\((\.L_\w+)\)", line)):
                start = labels.get(to[1])  # only backward jumps are loops
                if start is not None:
                    loops[start] = len(instructions)
            instructions.append(found[1])
        name = lines[0].split(":", 1)[0]
        yield Kernel(name, tuple(instructions), tuple(sorted(loops.items())))
