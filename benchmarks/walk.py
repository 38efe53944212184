"""Walks through a kernel's machine code as one of its threads, to count what is executed.

Only integers are computed: what loops and branches depend on comes from the launch's parameters and
from the thread's index. Every other value is unknown (None), and so is all that depends on it. What
a thread stores to shared or local memory it can load again; of what others store nothing is known.
A branch on an unknown predicate is decided by a caller's rule (`Rule`), and is reported.

Time is kept as well: of this thread's warp alone on the GPU, from the cycles and scoreboards that
ptxas wrote beside each instruction and from the latencies in `LATENCY`, once for each of
`GLOBAL_LATENCIES`, since it is unknown from where global loads are served. Blocks of instructions
are translated to Python functions (machine_meaning.py), which makes the walk fast enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .machine_code import MEMORY, NO_SCOREBOARD, Instruction, Program
from .machine_integers import BULK, HELPERS
from .machine_meaning import (
    Meaning,
    destinations,
    guard_expression,
    meaning,
    sets_bits,
)

GLOBAL_LATENCIES = (270, 700)
"""Cycles of a load that L2 serves, and of one that memory serves."""

LATENCY: Mapping[str, int] = {
    "ATOM": 0, "ATOMG": 0, "LDG": 0, "LDGSTS": 0,  # more for them: GLOBAL_LATENCIES
    "ATOMS": 60, "BAR": 20, "LD": 45, "LDC": 30, "LDL": 40, "LDS": 29, "LDSM": 33, "MEMBAR": 500,
    "MUFU": 20, "S2R": 25, "S2UR": 25, "SHFL": 24, "UCGABAR_WAIT": 200, "ULDC": 20,
}  # fmt: skip
"""Cycles, about, until the result of an instruction that sets a scoreboard is there. NVIDIA does
not publish them; these are rounded from published measurements of Volta to Hopper."""
OTHER_LATENCY = 20
READ_LATENCY = 12
"""Cycles until a store or copy has read its operands."""
GLOBAL = ("ATOM", "ATOMG", "LDG", "LDGSTS", "UBLKCP")

Rule = Callable[[Program, Instruction, bool | None, int], bool]
"""Decides a conditional jump: program, jump, what its predicate says (None: unknown), how often it
was met before. Returns whether to jump."""


Supply = Callable[[str], int | None]
"""The value of a load that `Walker.supplied` names, each time that it is executed."""


def shortest(program: Program, jump: Instruction, known: bool | None, times: int) -> bool:
    """Where the predicate is unknown: leaves loops, and skips what may be skipped, which mostly is
    for values that are not finite or not normal."""
    if known is not None:
        return known
    at = program.labels.get(jump.target)
    return at is not None and program.instructions[at].address > jump.address


@dataclass(frozen=True)
class Place:
    """A thread of a launch. ``parameters``: the bytes that the kernel finds at 0x210 of constant
    bank 0."""

    thread: int
    block: int
    threads: int
    blocks: int
    parameters: bytes
    blocks_of_cluster: int = 1


@dataclass
class Walk:
    """What one thread's warp executes: instructions by name, bytes a warp by space and direction
    ("global load"), cycles alone for each of GLOBAL_LATENCIES, unknown branches by address, and the
    indices of the instructions that were reached."""

    counts: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    cycles: tuple[float, ...] = (0.0, 0.0)
    unknown: Counter[int] = field(default_factory=Counter)
    reached: int = 0
    ended: bool = False


class WalkError(Exception):
    """The thread does not come to an end."""


PARAMETERS = 0x210
_ENDS = ("BRA", "EXIT", "CALL", "RET", "BRX", "JMP")


def _blocks(program: Program) -> list[tuple[int, int]]:
    """First and last + 1 index of instructions that follow one another without a jump."""
    starts = {0, *program.labels.values()}
    for k, instruction in enumerate(program.instructions):
        if instruction.mnemonic in _ENDS:
            starts.add(k + 1)
    ordered = sorted(s for s in starts if s < len(program.instructions))
    return list(zip(ordered, [*ordered[1:], len(program.instructions)], strict=True))


def _latency(instruction: Instruction, global_latency: int) -> int:
    if instruction.mnemonic in GLOBAL:
        return global_latency
    return LATENCY.get(instruction.mnemonic, OTHER_LATENCY)


def _timing(instructions: Sequence[Instruction]) -> list[str]:
    """Statements that advance the clocks t0, t1 past a block. A and B have the cycles at which the
    scoreboards are set, and at 6 that at which the products of the warpgroup are made."""
    lines: list[str] = []
    stall = 0

    def flush() -> None:
        nonlocal stall
        if stall:
            lines.append(f"t0 += {stall}; t1 += {stall}")
            stall = 0

    for each in instructions:
        control = each.control
        waits = control.waits
        if each.mnemonic == "DEPBAR" and len(each.operands) > 1 and each.operands[1] == "0x0":
            waits |= 1 << int(each.operands[0].removeprefix("SB"))
        for board in range(6):
            if waits >> board & 1:
                flush()
                lines.append(f"t0 = max(t0, A[{board}]); t1 = max(t1, B[{board}])")
        if each.mnemonic == "BAR":
            stall += LATENCY["BAR"]
        if each.mnemonic == "HGMMA":
            flush()
            cycles = int(each.suffixes[0].split("x")[1]) // 2
            lines.append(f"A[6] = max(A[6], t0) + {cycles}; B[6] = max(B[6], t1) + {cycles}")
        if each.mnemonic == "WARPGROUP" and each.operands[1:] == ("0x0",):
            flush()
            lines.append("t0 = max(t0, A[6]); t1 = max(t1, B[6])")
        if each.mnemonic == "LDGDEPBAR":  # what was copied so far
            flush()
            near, far = GLOBAL_LATENCIES
            lines.append(f"A[0] = max(A[0], t0 + {near}); B[0] = max(B[0], t1 + {far})")
        for board, slow in ((control.written, True), (control.read, False)):
            if board < 6:
                flush()
                near, far = (_latency(each, g) if slow else READ_LATENCY for g in GLOBAL_LATENCIES)
                lines.append(
                    f"A[{board}] = max(A[{board}], t0 + {near}); "
                    f"B[{board}] = max(B[{board}], t1 + {far})"
                )
        assert NO_SCOREBOARD >= 6
        stall += max(control.stall, 1)
    flush()
    return lines


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines] or ["    pass"]


class Walker:
    """A program, translated once, for walks of any number of its threads. ``supplied``: of loads,
    by index, the register and the name by which a walk's `Supply` knows what another thread
    stored."""

    def __init__(
        self, program: Program, supplied: Mapping[int, tuple[int, str]] | None = None
    ) -> None:
        self.program = program
        self._supplied = supplied or {}
        self._blocks = _blocks(program)
        self._of = {first: n for n, (first, _) in enumerate(self._blocks)}
        self._functions: dict[int, Callable[..., None]] = {}
        self._static: dict[int, tuple[Counter[str], Counter[str]]] = {}

    def _function(self, number: int) -> Callable[..., None]:
        """Runs the block's instructions but for the jump at its end."""
        first, last = self._blocks[number]
        lines: list[str] = []
        for k in range(first, last):
            each = self.program.instructions[k]
            if each.mnemonic in _ENDS:
                continue
            body: Meaning = meaning(each)
            kind = MEMORY.get(each.mnemonic)
            if each.guard:
                counted = [f"X[{k}] += 1"] if kind else []
                unknown = [] if sets_bits(each) else [f"{d} = None" for d in destinations(each)]
                lines.append(f"g = {guard_expression(each.guard)}")
                lines += ["if g:", *_indented([*counted, *body])]
                lines += ["elif g is None:", *_indented([*counted, *unknown])]
            else:
                lines += body
            if k in self._supplied:
                register, name = self._supplied[k]
                lines.append(f"R[{register}] = S({name!r})")
        clock = _timing(self.program.instructions[first:last])
        text = ["def run(R, P, U, Q, C, M, N, X, A, B, T, S):", *_indented(lines)]
        text += _indented(["t0, t1 = T", *clock, "T[0] = t0; T[1] = t1"])
        scope: dict[str, Callable[..., None]] = {}
        exec("\n".join(text), dict(HELPERS), scope)
        return scope["run"]

    def walk(
        self,
        place: Place,
        rule: Rule = shortest,
        most: int = 100_000_000,
        supply: Supply = lambda name: None,
    ) -> Walk:
        """Args: ``most``: instructions after which to give up, a `WalkError`."""
        program, instructions = self.program, self.program.instructions
        state = _State(place)
        visits: Counter[int] = Counter()
        walk = Walk()
        executed, number = 0, 0
        calls: list[int] = []
        met: Counter[int] = Counter()
        while True:
            function = self._functions.get(number)
            if function is None:
                function = self._functions[number] = self._function(number)
            function(*state.arguments, supply)
            visits[number] += 1
            first, last = self._blocks[number]
            executed += last - first
            if executed > most:
                raise WalkError(f"{program.name} has executed {executed} instructions")
            end = instructions[last - 1]
            following = self._of.get(last)
            if end.mnemonic in _ENDS:
                known = state.decides(end)
                taken = bool(known)
                if end.guard or end.operands:
                    taken = rule(program, end, known, met[end.address])
                    met[end.address] += 1
                    if known is None:
                        walk.unknown[end.address] += 1
                if taken and end.mnemonic == "EXIT":
                    walk.ended = True
                    break
                if taken and end.mnemonic == "RET":
                    following = self._of[calls.pop()] if calls else None
                elif taken:
                    if end.mnemonic == "CALL":
                        calls.append(last)
                    following = self._of[program.labels[end.target]]
            if following is None:
                break
            number = following
        walk.cycles = tuple(state.clocks)
        self._add_up(walk, visits, state.executed)
        return walk

    def _add_up(self, walk: Walk, visits: Counter[int], guarded: Counter[int]) -> None:
        for number, times in visits.items():
            first, last = self._blocks[number]
            walk.reached += last - first
            if number not in self._static:
                block = self.program.instructions[first:last]
                moved: Counter[str] = Counter()
                for each in block:
                    if not each.guard:
                        moved.update(_bytes(each))
                self._static[number] = Counter(e.name for e in block), moved
            names, moved = self._static[number]
            for name, count in names.items():
                walk.counts[name] += count * times
            for kind, count in moved.items():
                walk.bytes[kind] += count * times
        if copied := guarded.pop(BULK, 0):
            walk.bytes["global load"] += copied
        for k, times in guarded.items():
            for kind, count in _bytes(self.program.instructions[k]).items():
                walk.bytes[kind] += count * times


def _bytes(instruction: Instruction) -> dict[str, int]:
    """What a warp's 32 threads move, all of which take part."""
    kind = MEMORY.get(instruction.mnemonic)
    if kind is None:
        return {}
    suffixes = instruction.suffixes
    size = 4
    for suffix, bytes_ in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if suffix in suffixes:
            size = bytes_
    if instruction.mnemonic == "LDSM":
        size = 4 * int(suffixes[-1]) if suffixes[-1].isdigit() else 4
    return {kind: 32 * size}


class _State:
    """A thread's registers R, predicates P, the uniform U and Q, constants C, memory M and N (of
    shared and of other spaces), counts X of guarded accesses, scoreboards A and B, clocks T."""

    def __init__(self, place: Place) -> None:
        constants: dict[int, int] = {0: place.threads, 4: 1, 8: 1, 12: place.blocks, 16: 1, 20: 1}
        constants[0x28] = 0xFFFF00
        raw = place.parameters + bytes(-len(place.parameters) % 4)
        for k in range(0, len(raw), 4):
            constants[PARAMETERS + k] = int.from_bytes(raw[k : k + 4], "little")
        special = {
            "SR_TID.X": place.thread,
            "SR_TID.Y": 0,
            "SR_TID.Z": 0,
            "SR_CTAID.X": place.block,
            "SR_CTAID.Y": 0,
            "SR_LANEID": place.thread % 32,
            "SR_CgaCtaId": place.block % place.blocks_of_cluster,
            "SRZ": 0,
        }
        self.executed: Counter[int] = Counter()
        self.clocks: list[float] = [0.0, 0.0]
        self._predicates: list[bool | None] = [*[False] * 7, True]
        self._uniform: list[bool | None] = [*[False] * 7, True]
        self.arguments: tuple[Any, ...] = (
            [0] * 256, self._predicates, [0] * 64, self._uniform, (constants, special),
            {}, {}, self.executed, [0.0] * 7, [0.0] * 7, self.clocks,
        )  # fmt: skip

    def _predicate(self, name: str) -> bool | None:
        plain = name.lstrip("!@")
        value: bool | None
        if plain in ("PT", "UPT"):
            value = True
        elif plain.startswith("UP"):
            value = self._uniform[int(plain[2:])]
        else:
            value = self._predicates[int(plain[1:])]
        return value if value is None or not name.startswith("!") else not value

    def decides(self, jump: Instruction) -> bool | None:
        """Whether it jumps; BRA.DIV, for threads that have come apart, never does."""
        if "DIV" in jump.suffixes:
            return False
        predicates = [jump.guard] if jump.guard else []
        if jump.mnemonic == "BRA":
            predicates += [o for o in jump.operands if o.lstrip("!").startswith(("P", "UP"))]
        values = [self._predicate(p) for p in predicates]
        if False in values:
            return False
        return None if None in values else True
