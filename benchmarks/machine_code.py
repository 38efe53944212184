"""The machine code of the CUDA kernels, as nvdisasm prints it, with what ptxas wrote beside each
instruction: after how many cycles the next one may be issued, which scoreboards it waits for, and
which it sets. An instruction of variable latency (a load, MUFU) sets a scoreboard, and those that
need its result wait for it. The encoding of this control word is not documented by NVIDIA; it is
that of compute capability 7.0 to 9.0 as others have published it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

NO_SCOREBOARD = 7

MEMORY: Mapping[str, str] = {
    "ATOM": "global atomic", "ATOMG": "global atomic", "ATOMS": "shared atomic",
    "RED": "global atomic",
    "LD": "shared load", "LDG": "global load", "LDGSTS": "global load", "LDL": "local load",
    "LDS": "shared load", "LDSM": "shared load", "ST": "shared store", "STG": "global store",
    "STL": "local store", "STS": "shared store",
}  # fmt: skip
"""The space and direction by which accesses are counted. Generic addresses, of LD and ST, occur in
functions that are not inlined and get pointers to shared memory."""


@dataclass(frozen=True)
class Control:
    """Cycles to the next instruction, the scoreboards that are set when the result is there and
    when the operands have been read (7: none), and a bit mask of those that it waits for."""

    stall: int = 1
    written: int = NO_SCOREBOARD
    read: int = NO_SCOREBOARD
    waits: int = 0

    @staticmethod
    def of(high: int) -> Control:
        """From the upper 64 bits of an instruction."""
        word = high >> 41
        return Control(word & 15, word >> 5 & 7, word >> 8 & 7, word >> 11 & 63)


@dataclass(frozen=True)
class Instruction:
    """``guard``: the predicate under which it has an effect, as "P0" or "!UP3", or "". ``name``:
    the mnemonic with its suffixes. ``target``: the label of a jump or of a call,
    of a jump by a table the first. ``line``: of the
    source, as "file.h:12", or "" where that was not compiled in."""

    address: int
    guard: str
    name: str
    operands: tuple[str, ...]
    target: str = ""
    control: Control = Control()
    line: str = ""

    @property
    def mnemonic(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(self.name.split(".")[1:])


@dataclass(frozen=True)
class Program:
    """A kernel's instructions in order; ``labels``: the indices of those that others jump to."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_SECTION = re.compile(r"^\.text\.", re.MULTILINE)
_LABEL = re.compile(r"^([.$\w]+):\s*$")
_CODE = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?"
    r"(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)\s*;"
)
_HIGH = re.compile(r"/\* 0x([0-9a-f]{16}) \*/\s*$")
_TARGET = re.compile(r"`\(([^)]*)\)")
_LINE = re.compile(r'^\s*//## File "(?:[^"]*/)?([^"/]+)", line (\d+)')
_NOTE = re.compile(r"\(\*.*?\*\)")
_FIRST = re.compile(r"BRANCH_TARGETS ([.$\w]+)")


def _operands(text: str) -> tuple[tuple[str, ...], str]:
    target = _FIRST.search(text) or _TARGET.search(text)
    text = _NOTE.sub("", text)
    text = _TARGET.sub("", text).replace(".reuse", "")
    parts = (part.strip() for part in text.split(","))
    return tuple(part for part in parts if part), target[1] if target else ""


def programs(text: str) -> Iterator[Program]:
    """The kernels in what ``nvdisasm -c -hex -g`` prints. Without ``-hex`` each instruction has the
    default control word, without ``-g`` no line."""
    for section in _SECTION.split(text)[1:]:
        name, _, body = section.partition(":")
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        lines = body.splitlines()
        source = ""
        for i, line in enumerate(lines):
            if label := _LABEL.match(line.strip()):
                labels[label[1]] = len(instructions)
            elif at := _LINE.match(line):
                source = f"{at[1]}:{at[2]}"
            elif found := _CODE.match(line):
                operands, target = _operands(found["operands"])
                control = Control()
                after = lines[i + 1] if i + 1 < len(lines) else ""
                if (high := _HIGH.search(after)) and not _CODE.match(after):
                    control = Control.of(int(high[1], 16))
                instructions.append(
                    Instruction(
                        int(found["address"], 16),
                        found["guard"] or "",
                        found["name"],
                        operands,
                        target,
                        control,
                        source,
                    )
                )
        yield Program(name, tuple(instructions), labels)


def read(cubin: Path, nvdisasm: Path) -> list[Program]:
    """The kernels of a compiled source."""
    command: list[str | Path] = [nvdisasm, "-c", "-hex", "-g", cubin]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(programs(text))


def local_name(mangled: str) -> str:
    """A kernel's mangled name after its namespaces, which nvcc and other compilers write alike."""
    found = re.search(r"(\d+)(?=_GLOBAL__N_)", mangled)  # the length of the namespace's name
    return mangled[found.end() + int(found[1]) :] if found else mangled


@dataclass(frozen=True)
class Resources:
    """What a block needs: registers a thread and bytes of static shared memory."""

    registers: int
    shared_bytes: int


def resources(log: str) -> dict[str, Resources]:
    """By mangled name, from what ``nvcc -Xptxas -v`` prints."""
    found: dict[str, Resources] = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if used:
            found[name] = Resources(int(used[1]), int(shared[1]) if shared else 0)
    return found
