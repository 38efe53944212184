"""Counts what the CUDA kernels of a step execute, without a GPU: predict.py makes times of it.

The host build of the kernels records each launch with its parameters, nvcc compiles the same
sources to machine code, and walk.py goes through that as some threads of the launch. What is
counted are a warp's instructions by the unit that executes them, the bytes that it moves, and its
cycles alone on the GPU. Of a launch three blocks are walked, none at a border, and of each the
first, the middle and the last warp. Decisions that depend on data are those of `RULES`; the number
of Sinkhorn iterations until nothing changes is `ITERATIONS`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .machine_code import Instruction, Program, Resources, local_name, read, resources
from .walk import Place, Rule, Walk, Walker, shortest

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = "90a"
ITERATIONS = 4
"""Sinkhorn's, after which the embeddings of the benchmarks and of images settle: 3 or 4."""

SHARED_BYTES, RESERVED_BYTES = 228 << 10, 1 << 10  # of a multiprocessor, and of each block
REGISTERS, WARPS, BLOCKS = 64 << 10, 64, 32

UNITS: Mapping[str, tuple[str, ...]] = {
    "tensor": ("HMMA", "HGMMA"),
    "fp32": ("FADD", "FFMA", "FMUL"),
    "integer": (
        "FMNMX", "FSEL", "FSETP", "IABS", "IADD3", "ISETP", "LEA", "LOP3", "PRMT", "SEL", "SHF",
        "VIADD", "VIADDMNMX", "VIMNMX",
    ),
    "multiply": ("IMAD",),
    "special": ("F2F", "F2I", "FLO", "FRND", "I2F", "MUFU", "POPC"),
    "double": ("DADD", "DFMA", "DMUL", "DSETP"),
    "shared": ("ATOMS", "LD", "LDS", "LDSM", "ST", "STS"),
    "global": ("ATOM", "ATOMG", "LDG", "LDGSTS", "RED", "STG"),
    "shuffle": ("SHFL",),
    "barrier": ("BAR",),
}  # fmt: skip
"""Mnemonics by the unit that executes them; the others are only issued."""


@dataclass(frozen=True)
class Launch:
    """As the host build records it: mangled name, sizes, and the bytes of its parameters."""

    name: str
    blocks: int
    blocks_of_cluster: int
    threads: int
    shared_bytes: int
    parameters: bytes


@dataclass(frozen=True)
class Counts:
    """What a launch takes. ``issued``, ``units``, ``tensor_cycles`` and ``bytes`` are those of a
    mean warp, ``near`` and ``far`` the cycles of a block's slowest warp alone, global loads being
    served by L2 or by memory. ``reached``: different instructions executed. ``unknown``: branches
    that a rule decided, of a warp."""

    name: str
    blocks: int
    blocks_of_cluster: int
    warps: int
    blocks_of_sm: int
    issued: int
    units: dict[str, int]
    tensor_cycles: int
    bytes: dict[str, int]
    near: int
    far: int
    reached: int
    unknown: int


def short_name(mangled: str) -> str:
    """The function's own name."""
    rest, name = local_name(mangled).removeprefix("_ZN"), ""
    while found := re.match(r"(\d+)", rest):
        name = rest[found.end() : found.end() + int(found[1])]
        rest = rest[found.end() + int(found[1]) :]
    return name or mangled


def blocks_of_sm(used: Resources, threads: int, shared_bytes: int) -> int:
    """Blocks that a multiprocessor holds at once; each warp's registers come in steps of 256."""
    warps = threads // 32
    registers = math.ceil(used.registers * 32 / 256) * 256
    shared = shared_bytes + used.shared_bytes + RESERVED_BYTES
    held = (REGISTERS // registers // warps, WARPS // warps, BLOCKS, SHARED_BYTES // shared)
    return max(1, min(held))


WGMMA = re.compile(r"HGMMA\.64x(\d+)x")
MMA_CYCLES = 6.4
"""An mma.sync with 16 x 8 results takes so many on a quarter of a multiprocessor: 4 at the rate of
wgmma, of which mma.sync reaches about 62 %."""


def tensor_cycles(counts: Mapping[str, float]) -> float:
    """wgmma with 64 x N results takes N / 2 cycles, in any of the types that are used."""
    total = 0.0
    for name, count in counts.items():
        if found := WGMMA.match(name):
            total += count * int(found[1]) / 2
        elif name.startswith("HMMA"):
            total += count * MMA_CYCLES
    return total


# ---- what depends on data ----

RULES = (
    (
        r"for \(int t = 1; t <= (p\.iterations|made); |term <= (state\.last_term|last); ",
        "iterations",
    ),
    (r"progress\.hopeless|p\.tolerance|settled\(|kRounding &&|solution\.made < 0", "stay"),
    (r"const bool is_narrow|if \(is_narrow\)|solution\.base == 0", "stay"),
    (r"exists \?|y < 0 \|\| y >= heights|if \(count > 0\) sum -= ", "stay"),
    (r"half < rows|while \(repeats && ", "enter"),
    (r"if \(!fast\)|is_last\(|if \(any == 0\) return", "skip"),
    (r"made < 1 \|\| made > \w+\.slots", "stay"),
)
"""Patterns of source lines, and what their jumps do. "iterations" ends the loop after `ITERATIONS`.
"skip" jumps forward, or ends the thread, whatever the predicate says: what only the last block does
is not counted. The others are for unknown predicates: "stay" goes on behind the jump, and "enter"
does so too but stays in the loop."""


# Lines of kernels that go through a map in passes, and the order of `Pass` (monce_chip_block.h).
NEXT_PASS, LAST_PASS = r"while \(!state(\(\))?\.failed\)", r"state(\(\))?\.pass == kLast"
OF_CLUSTER = r"return state\(\)\.cluster;"
DEPTH = 64  # numbers of a patch
BACKWARD = r"\(kBackward && state(\(\))?\.pass == Pass::weigh"
ITERATE, WEIGH, RECUR, DIFFERENTIATE = range(4)


class Passes:
    """What a kernel that goes through a map in passes reads of its state, which is in shared memory
    and written by the block's first thread: `ITERATIONS` iterations and the losses; in a gradient,
    which goes on from a state, the weights, as many steps backwards and the last pass."""

    def __init__(self, place: Place, backward: bool) -> None:
        repeated = [RECUR if backward else ITERATE] * ITERATIONS
        self._passes = [WEIGH, *repeated, DIFFERENTIATE] if backward else [*repeated, WEIGH]
        self._at, self._maps = -1, 0
        self._cluster, self._rank = divmod(place.block, place.blocks_of_cluster)
        self._clusters = place.blocks // place.blocks_of_cluster

    def __call__(self, name: str) -> int | None:
        if name == "next pass":
            self._at += 1
            if self._at == len(self._passes):  # the next of the block's or cluster's maps
                self._at, self._maps = 0, self._maps + 1
        values = {
            "steps": DEPTH // 16,
            "cluster": self._cluster,
            "rank": self._rank,
            "map": self._cluster + self._maps * self._clusters,
            "failed": 0,
            "next pass": 0,  # the loop goes on unless the map failed
        }
        return values.get(name, self._passes[max(self._at, 0)])


class Sources:
    """The lines of the files of `csrc/cuda` and `csrc/common`, by which jumps are known."""

    def __init__(self, root: Path = ROOT) -> None:
        folders = (root / "csrc" / "common", root / "csrc" / "cuda")
        files = (path for folder in folders for path in folder.glob("*.*"))
        self._lines = {path.name: path.read_text().splitlines() for path in files}

    def line(self, place: str) -> str:
        """The line at "file.h:12", or "" if there is none."""
        name, _, number = place.partition(":")
        lines = self._lines.get(name, [])
        return lines[int(number) - 1] if number and int(number) <= len(lines) else ""

    def supplied(self, program: Program) -> dict[int, tuple[int, str]]:
        """The loads of a program that goes through passes; see `Passes`."""
        loads = {
            k: (each, self.line(each.line))
            for k, each in enumerate(program.instructions)
            if each.mnemonic == "LDS" and re.fullmatch(r"R\d+", each.operands[0])
        }
        found: dict[int, tuple[int, str]] = {}
        offsets = {
            _offset(each) for each, line in loads.values()
            if re.search(LAST_PASS, line) and not _bytes_of(each)
        }  # fmt: skip
        if len(offsets) != 1:
            return found
        (of_pass,) = offsets
        # The state begins with the map, or with the cluster, the block's rank in it and the map.
        clusters = any(re.search(OF_CLUSTER, line) for _, line in loads.values())
        first = ("cluster", "rank", "map") if clusters else ("map",)
        at = r"rank\(state|state\(\)\.(cluster|map)" if clusters else r"state\.(map|failed)"
        for k, (each, line) in loads.items():
            register, offset = int(each.operands[0].removeprefix("R")), _offset(each)
            if _bytes_of(each):
                if re.search(NEXT_PASS, line):
                    found[k] = register, "next pass"
                elif re.search(r"state(\(\))?\.failed", line):
                    found[k] = register, "failed"
                continue
            words = 4 if "128" in each.suffixes else 2 if "64" in each.suffixes else 1
            word = (of_pass - offset) // 4
            if re.search(r"step < state\.steps", line):
                found[k] = register, "steps"
            elif re.search(r"state(\(\))?\.pass\b", line) and 0 <= word < words:
                found[k] = register + word, "pass"
            elif re.search(at, line) and words == 1 and offset < 4 * len(first):
                found[k] = register, first[offset // 4]
        return found

    def goes_backward(self, program: Program) -> bool:
        return any(re.search(BACKWARD, self.line(each.line)) for each in program.instructions)

    def rule(self, iterations: int = ITERATIONS) -> Rule:
        @functools.cache
        def kind(place: str) -> str:
            line = self.line(place)
            return next((what for pattern, what in RULES if re.search(pattern, line)), "")

        def decide(program: Program, jump: Instruction, known: bool | None, times: int) -> bool:
            found = kind(jump.line) if jump.mnemonic in ("BRA", "EXIT") else ""
            forward = _forward(program, jump)
            if found == "iterations" and not forward and jump.mnemonic == "BRA":
                return times % iterations < iterations - 1  # each time that the loop is entered
            if found == "skip" and (known is None or jump.mnemonic == "BRA"):
                return forward or jump.mnemonic == "EXIT"
            if known is None and found in ("stay", "enter"):
                return found == "enter" and not forward and jump.mnemonic == "BRA"
            return shortest(program, jump, known, times)

        return decide


def _offset(load: Instruction) -> int:
    """The constant in a load's address."""
    found = re.search(r"\+(0x[0-9a-f]+)\]", load.operands[-1])
    return int(found[1], 16) if found else 0


def _bytes_of(load: Instruction) -> bool:
    return any(suffix in ("U8", "S8") for suffix in load.suffixes)


def _forward(program: Program, jump: Instruction) -> bool:
    at = program.labels.get(jump.target)
    return at is not None and program.instructions[at].address > jump.address


# ---- machine code ----


class Code:
    """The kernels of compiled sources by `local_name`, and what `ptxas` says of them."""

    def __init__(self, sources: Sources | None = None) -> None:
        self._sources = sources or Sources()
        self._walkers: dict[str, Walker] = {}
        self._resources: dict[str, Resources] = {}

    def add(self, programs: Iterable[Program], used: Mapping[str, Resources]) -> None:
        for program in programs:
            if program.name in used:
                name = local_name(program.name)
                self._walkers[name] = Walker(program, self._sources.supplied(program))
                self._resources[name] = used[program.name]

    def compile(self, source: Path, folder: Path, nvcc: Path, nvdisasm: Path) -> None:
        """Adds the kernels of a source, with nvcc's and nvdisasm's files in ``folder``."""
        target = folder / f"{source.stem}.cubin"
        code = f"-gencode=arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}"
        flags = ["-cubin", "-std=c++20", "-lineinfo", "-Xptxas", "-v", code]
        command: list[str | Path] = [nvcc, *flags, "-o", target, source]
        made = subprocess.run(command, check=True, capture_output=True, text=True)
        self.add(read(target, nvdisasm), resources(made.stderr))

    def count(self, launch: Launch, rule: Rule = shortest) -> Counts:
        """Raises KeyError for a kernel that no source has, WalkError for one that does not end."""
        name = local_name(launch.name)
        walker, used = self._walkers[name], self._resources[name]
        backward = self._sources.goes_backward(walker.program)
        warps = launch.threads // 32
        blocks = sorted({int(launch.blocks * part) for part in (0.29, 0.57, 0.83)})
        by_block: list[list[Walk]] = []
        for block in blocks:
            places = (
                Place(32 * warp, block, launch.threads, launch.blocks, launch.parameters,
                      launch.blocks_of_cluster)
                for warp in sorted({0, warps // 2, warps - 1})
            )  # fmt: skip
            by_block.append([walker.walk(p, rule, supply=Passes(p, backward)) for p in places])
        walks = [walk for block in by_block for walk in block]
        names: Counter[str] = Counter()
        moved: Counter[str] = Counter()
        for walk in walks:
            names.update(walk.counts)
            moved.update(walk.bytes)
        of = {mnemonic: unit for unit, mnemonics in UNITS.items() for mnemonic in mnemonics}
        units: Counter[str] = Counter()
        for name, count in names.items():
            units[of.get(name.split(".", 1)[0], "other")] += count
        number = len(walks)
        near, far = (
            sum(max(walk.cycles[k] for walk in block) for block in by_block) / len(by_block)
            for k in (0, 1)
        )
        return Counts(
            short_name(launch.name),
            launch.blocks,
            launch.blocks_of_cluster,
            warps,
            blocks_of_sm(used, launch.threads, launch.shared_bytes),
            round(names.total() / number),
            {unit: round(count / number) for unit, count in sorted(units.items())},
            round(tensor_cycles(names) / number),
            {kind: round(count / number) for kind, count in sorted(moved.items())},
            round(near),
            round(far),
            max(walk.reached for walk in walks),
            round(sum(walk.unknown.total() for walk in walks) / number),
        )


# ---- the files of counts ----


@dataclass
class Row:
    """A measurement, or a step: its launches in order, and how many more PyTorch makes."""

    launches: list[Counts]
    pytorch: int = 0


def digest(root: Path = ROOT) -> str:
    """A digest of the sources of the CUDA kernels."""
    found = hashlib.sha256()
    for folder in (root / "csrc" / "common", root / "csrc" / "cuda"):
        for path in sorted((*folder.glob("*.h"), *folder.glob("*.cu"))):
            found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def write(path: Path, rows: Mapping[str, Row], sources: str) -> None:
    """Equal launches are written once. ``sources``: what was counted, a `digest` or a commit."""
    kernels: dict[str, int] = {}
    for row in rows.values():
        for counts in row.launches:
            kernels.setdefault(json.dumps(dataclasses.asdict(counts)), len(kernels))
    lines = ",\n".join(f"    {text}" for text in kernels)
    listed = ",\n".join(
        f"    {json.dumps(name)}: "
        + json.dumps({
            "launches": [kernels[json.dumps(dataclasses.asdict(c))] for c in row.launches],
            "pytorch": row.pytorch,
        })
        for name, row in rows.items()
    )  # fmt: skip
    parts = (
        f'"sources": "{sources}"',
        f'"kernels": [\n{lines}\n  ]',
        f'"rows": {{\n{listed}\n  }}',
    )
    path.write_text("{\n  " + ",\n  ".join(parts) + "\n}\n")


def sources_of(path: Path) -> str:
    """What was counted into a file."""
    return str(json.loads(path.read_text())["sources"])


def load(path: Path) -> dict[str, Row]:
    found = json.loads(path.read_text())
    kernels = [Counts(**fields) for fields in found["kernels"]]
    return {
        name: Row([kernels[k] for k in row["launches"]], row["pytorch"])
        for name, row in found["rows"].items()
    }
