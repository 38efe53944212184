"""The effect of an instruction on integers, as Python statements for walk.py.

Only what addresses, counters of loops and predicates are made of has a meaning here. The result of
every other instruction, above all of floating point, is None, which stands for "unknown".
Statements use the names that `walk._State` explains: R, P for a thread's registers and predicates,
U, Q for those of the warp, C for constants, M and N for memory.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from .machine_code import Instruction
from .machine_integers import BULK, MASK

Meaning = list[str]


def guard_expression(name: str) -> str:
    plain = predicate(name.lstrip("!"))
    if not name.startswith("!"):
        return plain
    return f"(None if {plain} is None else not {plain})"


def predicate(name: str) -> str:
    name = name.lstrip("!")
    if name in ("PT", "UPT"):
        return "True"
    return f"Q[{name[2:]}]" if name.startswith("UP") else f"P[{name[1:]}]"


def _is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(T|\d)", text) is not None


_REGISTER = re.compile(r"(U?R)(\d+|Z)")


def _register(text: str, offset: int = 0) -> str:
    found = _REGISTER.match(text)
    assert found is not None, text
    if found[2] == "Z":
        return "0"
    return f"{'U' if found[1] == 'UR' else 'R'}[{int(found[2]) + offset}]"


def _is_register(text: str) -> bool:
    return _REGISTER.match(text) is not None


def _number(text: str) -> int | None:
    try:
        return int(text, 16) if "x" in text else int(text)
    except ValueError:
        return None


def _source(text: str, offset: int = 0, complement: bool = False) -> str:
    """An operand's 32 bits; ``offset`` 1 is the upper half of 64 bits. A minus is arithmetic unless
    ``complement``, as the upper halves of differences have it."""
    sign = text[0] if text[0] in "-~" else ""
    plain = text[1:] if sign else text
    number = _number(plain)
    if number is not None:
        wide = (-number if sign == "-" else ~number if sign else number) & (1 << 64) - 1
        return str(wide >> 32 * offset & MASK)
    if plain.startswith("c["):
        found = re.fullmatch(r"c\[(0x\w+)\]\[(?:(U?R\d+|RZ|URZ)\+?)?(-?0x\w+)?\]", plain)
        if found is None:
            return "None"
        base = _register(found[2]) if found[2] else "0"
        at = int(found[3] or "0", 16) + 4 * offset
        address = str(at) if base == "0" else f"(None if {base} is None else {base} + {at})"
        value = f"const(C, {int(found[1], 16)}, {address}, 4)"
    elif _is_register(plain) and "." not in plain:
        value = _register(plain, offset)
    else:
        return "None"
    if not sign:
        return value
    flipped = f"({MASK} - v)" if sign == "~" or complement else f"({MASK + 1} - v)"
    if value == "0":
        return str(MASK) if sign == "~" or complement else "0"
    return f"(None if (v := {value}) is None else {flipped})"


def _set(target: str, expression: str, **sources: str) -> list[str]:
    """``target`` becomes the expression of the named sources, or None if one of them is."""
    if target == "0":
        return []
    if "None" in sources.values():
        return [f"{target} = None"]
    names = [n for n, value in sources.items() if not value.isdigit()]
    lines = ["; ".join(f"{n} = {value}" for n, value in sources.items())] if sources else []
    if not names:
        return [*lines, f"{target} = {expression}"]
    known = " or ".join(f"{n} is None" for n in names)
    return [*lines, f"{target} = None if {known} else {expression}"]


_WIDE = ("64", "WIDE", "F64", "S64", "U64", "HI64")


def _width(instruction: Instruction) -> int:
    """Registers of the result."""
    name, suffixes = instruction.mnemonic, instruction.suffixes
    if name == "HGMMA":
        return int(suffixes[0].split("x")[1]) // 2
    if name == "HMMA":
        return 4
    if name == "LDSM":
        return int(suffixes[-1]) if suffixes[-1].isdigit() else 1
    if "128" in suffixes:
        return 4
    if name == "CS2R":
        return 1 if "32" in suffixes else 2
    if name in ("DADD", "DFMA", "DMUL"):
        return 2
    if name in ("F2F", "I2F"):
        return 2 if suffixes[0] == "F64" else 1
    if name == "F2I":
        return 2 if any(s in suffixes for s in ("U64", "S64")) else 1
    if name == "LEA" or name == "SHF" or name == "USHF":
        return 1
    return 2 if any(w in suffixes for w in _WIDE) else 1


_NO_RESULT = (
    "BAR", "BRA", "BREAK", "BSSY", "BSYNC", "CALL", "CCTL", "CGAERRBAR", "DEPBAR", "ENDCOLLECTIVE",
    "ERRBAR", "EXIT", "LDGDEPBAR", "LDGSTS", "MEMBAR", "NOP", "RED", "RET", "ST", "STG", "STL",
    "STS", "UBLKCP", "UCGABAR_ARV", "UCGABAR_WAIT", "WARPSYNC", "YIELD",
)  # fmt: skip

_TWO_PREDICATES = ("DSETP", "FSETP", "HSETP2", "ISETP", "PLOP3", "UISETP")


def destinations(instruction: Instruction) -> list[str]:
    """The registers and predicates that it sets."""
    if instruction.mnemonic in _NO_RESULT:
        return []
    found = []
    for operand in instruction.operands:
        if _is_predicate(operand):
            if operand not in ("PT", "UPT"):
                found.append(predicate(operand))
            if instruction.mnemonic in _TWO_PREDICATES and (
                len(found) == 2 or operand in ("PT", "UPT")
            ):
                break
            continue
        if operand == "PR":
            found += [f"P[{k}]" for k in range(7)]
        elif _is_register(operand):
            found += [_register(operand, k) for k in range(_width(instruction))]
        break
    return [f for f in found if f not in ("0", "True")]


def sets_bits(instruction: Instruction) -> bool:
    """Whether it sets or clears bits of a register. ptxas keeps predicates in such registers; where
    one is unknown, as the instruction's guard, the others still count, and its bit stays."""
    operands = instruction.operands
    return instruction.mnemonic == "LOP3" and len(operands) > 2 and operands[0] == operands[1]


def _split(operands: tuple[str, ...]) -> tuple[str, list[str], list[str], list[str]]:
    """Destination, predicates set, other sources, predicates read."""
    rest = list(operands)
    before = []
    while rest and _is_predicate(rest[0]):
        before.append(rest.pop(0))
    target = rest.pop(0)
    while rest and _is_predicate(rest[0]):
        before.append(rest.pop(0))
    sources = [o for o in rest if not _is_predicate(o)]
    return target, before, sources, [o for o in rest if _is_predicate(o)]


def _carries(predicates: list[str]) -> list[str]:
    """Each carry beyond 32 bits sets one predicate more."""
    lines = []
    for k, name in enumerate(predicates):
        if predicate(name) != "True":
            lines.append(f"{predicate(name)} = None if w is None else w >> 32 > {k}")
    return lines


def _carried(predicates: list[str]) -> str:
    """The sum of the carries that are read."""
    terms = []
    for name in predicates:
        if name in ("!PT", "!UPT"):
            continue
        terms.append("1" if name in ("PT", "UPT") else guard_expression(name))
    return " + ".join(f"int({t})" for t in terms)


def _sum(i: Instruction) -> Meaning:
    target, out, sources, read = _split(i.operands)
    extended = "X" in i.suffixes
    names = dict(zip("abc", (_source(s, complement=extended) for s in sources), strict=False))
    reads = [p for p in read if p not in ("!PT", "!UPT")] if extended else []
    lines = _set("w", " + ".join(names), **names)
    if reads:
        values = {f"p{k}": guard_expression(p) for k, p in enumerate(reads)}
        total = " + ".join(["w", *values])
        lines += _set("w", total, w="w", **values)
    lines += _carries(out)
    return [*lines, *_set(_register(target), f"w & {MASK}", w="w")]


def _product(i: Instruction) -> Meaning:
    target, out, sources, read = _split(i.operands)
    a, b = (_source(s) for s in sources[:2])
    third = sources[2] if len(sources) > 2 else "RZ"
    signed = "U32" not in i.suffixes
    wide, high = "WIDE" in i.suffixes, "HI" in i.suffixes
    zero = "0" in (a, b)
    factors = {} if zero else {"a": a, "b": b}
    if zero:
        product = "0"
    elif (wide or high) and signed:
        product = "s(a & 4294967295) * s(b & 4294967295)"
    else:
        product = "(a & 4294967295) * (b & 4294967295)"
    extended = "X" in i.suffixes
    more = {"c": _source(third, complement=extended)}
    total = f"{product} + c"
    if wide or high:
        more["d"] = "0" if third in ("RZ", "URZ") else _source(third, 1, complement=True)
        total = f"{product} + (d << 32) + c"
    if extended and (carry := [p for p in read if p not in ("!PT", "!UPT")]):
        more |= {f"p{k}": guard_expression(p) for k, p in enumerate(carry)}
        total += "".join(f" + p{k}" for k in range(len(carry)))
    lines = _set("w", total, **factors, **more)
    if out:
        shift = 64 if wide else 32
        for name in out:
            if predicate(name) != "True":
                lines.append(f"{predicate(name)} = None if w is None else w >> {shift} & 1 == 1")
    if high:
        return [*lines, *_set(_register(target), f"w >> 32 & {MASK}", w="w")]
    lines += _set(_register(target), f"w & {MASK}", w="w")
    if wide:
        lines += _set(_register(target, 1), f"w >> 32 & {MASK}", w="w")
    return lines


def _lea(i: Instruction) -> Meaning:
    target, out, sources, read = _split(i.operands)
    high, signed = "HI" in i.suffixes, "SX32" in i.suffixes
    shift = _number(sources[-1])
    if shift is None:
        return [f"{d} = None" for d in destinations(i)]
    extended = "X" in i.suffixes
    names = {"a": _source(sources[0], complement=extended),
             "b": _source(sources[1], complement=extended)}  # fmt: skip
    if not high:
        total = f"(a << {shift} & {MASK}) + b"
    elif signed:
        total = f"(s(a & {MASK}) << {shift} >> 32 & {MASK}) + b"
    else:
        names["c"] = _source(sources[2])
        total = f"(((c << 32 | a & {MASK}) << {shift}) >> 32 & {MASK}) + b"
    if extended:
        for k, name in enumerate(p for p in read if p not in ("!PT", "!UPT")):
            names[f"p{k}"] = guard_expression(name)
            total += f" + p{k}"
    lines = _set("w", total, **names)
    lines += _carries(out)
    return [*lines, *_set(_register(target), f"w & {MASK}", w="w")]


def _shift(i: Instruction) -> Meaning:
    target, _, (low, by, up), _ = _split(i.operands)
    suffixes = i.suffixes
    names = {"n": _source(by)}
    left = suffixes[0] == "L"
    wide = "U64" in suffixes or "S64" in suffixes
    amount = "(n & 31)" if "W" in suffixes else f"min(n, {63 if wide else 32})"
    if "HI" in suffixes or wide or "W" in suffixes:
        names |= {"a": _source(low), "h": _source(up)}
        pair = "(h << 32 | a)"
        if left:
            value = f"{pair} << {amount}"
            value = f"({value}) >> 32" if "HI" in suffixes else value
        else:
            signed = any(t in suffixes for t in ("S32", "S64"))
            value = f"{f's64({pair})' if signed else pair} >> {amount}"
            value = f"({value}) >> 32" if "HI" in suffixes else value
    elif left:
        names["a"] = _source(low)
        value = f"a << {amount}"
    else:
        names["a"] = _source(low)
        value = f"{'s(a)' if 'S32' in suffixes else 'a'} >> {amount}"
    return _set(_register(target), f"({value}) & {MASK}", **names)


def _logic(i: Instruction) -> Meaning:
    target, out, sources, _ = _split(i.operands)
    table = _number(sources[3])
    names = dict(zip("abc", (_source(s) for s in sources[:3]), strict=True))
    assert table is not None
    value = {0xC0: "a & b", 0xFC: "a | b", 0x3C: "a ^ b", 0x33: f"b ^ {MASK}"}.get(table)
    if value is not None:
        names = {k: v for k, v in names.items() if k in value.replace("0x", "")}
    lines = _set("w", value or f"lut({table}, a, b, c)", **names)
    if out and predicate(out[0]) != "True":
        lines.append(f"{predicate(out[0])} = None if w is None else w != 0")
    return [*lines, *_set(_register(target), "w", w="w")]


_COMPARE = {"GE": ">=", "GT": ">", "LE": "<=", "LT": "<", "EQ": "==", "NE": "!="}
_JOIN = {"AND": "and", "OR": "or", "XOR": "!="}


def _compare(i: Instruction) -> Meaning:
    first, second, a, b, third, *more = i.operands
    operator = next((_COMPARE[s] for s in i.suffixes if s in _COMPARE), None)
    if operator is None:
        return [f"{d} = None" for d in destinations(i)]
    names = {"a": _source(a), "b": _source(b)}
    signed = "U32" not in i.suffixes
    x, y = ("s(a)", "s(b)") if signed else ("a", "b")
    test = f"{x} {operator} {y}"
    if "EX" in i.suffixes and more:
        names["e"] = guard_expression(more[0])
        test = f"({x} != {y} or e)" if operator == "!=" else (
            f"({x} == {y} and e)" if operator == "==" else
            f"({x} {operator[0]} {y} or ({x} == {y} and e))"
        )  # fmt: skip
    lines = [f"o = {guard_expression(third)}", *_set("w", f"bool({test})", **names)]
    return [*lines, *_join(i, first, second)]


def _join(i: Instruction, first: str, second: str) -> Meaning:
    """Sets two predicates: the comparison w and its opposite, each joined with o."""
    lines = []
    how = next((s for s in i.suffixes if s in _JOIN), "AND")
    for name, value in ((first, "w"), (second, "(None if w is None else not w)")):
        target = predicate(name)
        if target == "True":
            continue
        joined = f"z = {value}; {target} = "
        if how == "AND":
            joined += "False if z is False or o is False else None if None in (z, o) else True"
        elif how == "OR":
            joined += "True if z is True or o is True else None if None in (z, o) else False"
        else:
            joined += "None if None in (z, o) else z != o"
        lines.append(joined)
    return lines


def _compare_floats(i: Instruction) -> Meaning:
    """Compares the launch's parameters and constants; sums and products are not computed."""
    operator = next((o for n, o in _COMPARE.items() if i.suffixes[0] in (n, n + "U")), None)
    if operator is None or len(i.operands) != 5:
        return _unknown(i)
    first, second, a, b, third = i.operands
    sources = {"a": _float_source(a), "b": _float_source(b)}
    lines = [f"o = {guard_expression(third)}", *_set("w", f"a {operator} b", **sources)]
    return [*lines, *_join(i, first, second)]


def _float_source(text: str) -> str:
    bits = _source(text) if _is_register(text) or text.startswith("c[") else "None"
    if text in ("RZ", "URZ", "-RZ"):
        return "0"
    if bits != "None":
        return f"(None if (v := {bits}) is None else number(v))"
    try:
        return repr(float(text)) if text[-1].isdigit() else "None"
    except ValueError:
        return "None"


def _predicates(i: Instruction) -> Meaning:
    first, second, a, b, c, table, *_ = i.operands
    names = {n: guard_expression(p) for n, p in zip("abc", (a, b, c), strict=True)}
    number = _number(table)
    lines = ["; ".join(f"{n} = {v}" for n, v in names.items())]
    if predicate(first) != "True":
        lines.append(
            f"{predicate(first)} = None if None in (a, b, c) else "
            f"{number} >> (4 * a + 2 * b + c) & 1 == 1"
        )
    if predicate(second) != "True":
        lines.append(f"{predicate(second)} = None")
    return lines


def _select(i: Instruction) -> Meaning:
    target, _, sources, read = _split(i.operands)
    a, b = (_source(s) for s in sources[:2])
    chosen = guard_expression(read[0])
    return [f"g2 = {chosen}", f"{_register(target)} = None if g2 is None else ({a} if g2 else {b})"]


def _extreme(i: Instruction) -> Meaning:
    target, _, sources, read = _split(i.operands)
    names = dict(zip("abc", (_source(s) for s in sources), strict=False))
    unsigned = "U32" in i.suffixes
    if i.mnemonic == "VIADDMNMX":
        first, second = f"(a + b & {MASK})", "c"
    else:
        first, second = f"(a & {MASK})", "b"
    second = f"({second} & {MASK})"
    if not unsigned:
        first, second = f"s({first})", f"s({second})"
    if read[-1] not in ("PT", "!PT", "UPT", "!UPT"):
        return [f"{_register(target)} = None"]
    function = "max" if read[-1].startswith("!") else "min"
    return _set(_register(target), f"{function}({first}, {second}) & {MASK}", **names)


def _move(i: Instruction) -> Meaning:
    return _set(_register(i.operands[0]), f"a & {MASK}", a=_source(i.operands[1]))


def _special(i: Instruction) -> Meaning:
    name = i.operands[1]
    lines = [f"{_register(i.operands[0])} = C[1].get({name!r})"]
    if i.mnemonic == "CS2R" and _width(i) == 2:
        lines.append(f"{_register(i.operands[0], 1)} = C[1].get({name!r})")
    return lines


def _constants(i: Instruction) -> Meaning:
    size = next((int(s[1:]) // 8 for s in i.suffixes if s in ("U8", "S8", "U16", "S16")), 4)
    words = 4 if "128" in i.suffixes else 2 if "64" in i.suffixes else 1
    sign = any(s in i.suffixes for s in ("S8", "S16"))
    lines = []
    for k in range(words):
        value = _source(i.operands[1], k)
        if value != "None":
            value = value.replace(", 4)", f", {size}, {sign})")
        lines.append(f"v{k} = {value}")
    return [*lines, *(f"{_register(i.operands[0], k)} = v{k}" for k in range(words))]


def _address(text: str) -> str:
    """The address in the last square brackets, modulo 2^32, which tells addresses apart."""
    inner = text[text.rindex("[") + 1 : -1]
    terms, names = [], []
    for part in re.findall(r"[+-]?[^+-]+", inner):
        plain = part.lstrip("+")
        scaled = re.fullmatch(r"(U?R\d+|RZ|URZ)(?:\.X(\d+))?(?:\.64|\.U32)?", plain)
        if scaled:
            register = _register(scaled[1])
            if register != "0":
                names.append(register)
                terms.append(f"{register} * {scaled[2] or 1}")
        else:
            number = _number(plain)
            if number is None:
                return "None"
            terms.append(str(number))
    total = f"({' + '.join(terms) or '0'}) & {MASK}"
    known = " or ".join(f"{n} is None" for n in names)
    return f"None if {known} else {total}" if known else total


def _memory(i: Instruction) -> str:
    return "N" if i.mnemonic in ("LDL", "STL") else "M"


def _load(i: Instruction) -> Meaning:
    if i.mnemonic not in ("LDS", "LDL", "LD") or any(s.startswith(("U", "S")) for s in i.suffixes):
        return _unknown(i)
    lines = [f"q = {_address(i.operands[-1])}"]
    found = f"{_memory(i)}.get(q + %d)"
    for k, target in enumerate(destinations(i)):
        lines.append(f"{target} = None if q is None else {found % (4 * k)}")
    return lines


def _store(i: Instruction) -> Meaning:
    if i.mnemonic == "STG":
        return []
    words = 4 if "128" in i.suffixes else 2 if "64" in i.suffixes else 1
    part = any(s in i.suffixes for s in ("U8", "S8", "U16", "S16"))
    values = ["None" if part else _source(i.operands[-1], k) for k in range(words)]
    return [f"put({_memory(i)}, {_address(i.operands[0])}, [{', '.join(values)}])"]


def _to_float(i: Instruction) -> Meaning:
    if "RP" not in i.suffixes:
        return _unknown(i)
    if "U64" in i.suffixes:
        names = {"a": _source(i.operands[1]), "h": _source(i.operands[1], 1)}
        return _set(_register(i.operands[0]), "up(h << 32 | a)", **names)
    return _set(_register(i.operands[0]), "up(a)", a=_source(i.operands[1]))


def _to_integer(i: Instruction) -> Meaning:
    if "U64" in i.suffixes:
        lines = _set("w", "trunc(a, 64)", a=_source(i.operands[1]))
        lines += _set(_register(i.operands[0]), f"w & {MASK}", w="w")
        return [*lines, *_set(_register(i.operands[0], 1), "w >> 32", w="w")]
    if "U32" in i.suffixes:
        return _set(_register(i.operands[0]), "trunc(a, 32)", a=_source(i.operands[1]))
    return _unknown(i)


def _special_function(i: Instruction) -> Meaning:
    if i.suffixes != ("RCP",):
        return _unknown(i)
    return _set(_register(i.operands[0]), "rcp(a)", a=_source(i.operands[1]))


def _shuffle(i: Instruction) -> Meaning:
    """The other thread's value is taken to be this one's, as in `REDUX`, which is a `_move`."""
    target, _, sources, _ = _split(i.operands)
    return _set(_register(target), "a", a=_source(sources[0]))


def _absolute(i: Instruction) -> Meaning:
    return _set(_register(i.operands[0]), "abs(s(a))", a=_source(i.operands[1]))


def _permute(i: Instruction) -> Meaning:
    names = dict(zip("abc", (_source(s) for s in i.operands[1:4]), strict=True))
    return _set(_register(i.operands[0]), "prmt(a, b, c)", **names)


def _half_constant(i: Instruction) -> Meaning:
    """HFMA2.MMA R, -RZ, RZ, x, y puts a constant of two halves into a register."""
    if i.operands[1:3] != ("-RZ", "RZ"):
        return _unknown(i)
    try:
        halves = [float(o) for o in i.operands[3:5]]
        high, low = (int.from_bytes(struct.pack("<e", h), "little") for h in halves)
    except (ValueError, OverflowError):
        return _unknown(i)
    return [f"{_register(i.operands[0])} = {high << 16 | low}"]


def _bulk_copy(i: Instruction) -> Meaning:
    """Adds its bytes to those that are counted."""
    return [f"X[{BULK}] += {_source(i.operands[2])} or 0"]


def _true(i: Instruction) -> Meaning:
    """The walked thread is the one that is elected, and what it waits for is there."""
    if i.mnemonic == "SYNCS" and "TRYWAIT" not in i.suffixes:
        return []
    return [f"{d} = True" for d in destinations(i) if d[0] in "PQ"]


def _from_predicates(i: Instruction) -> Meaning:
    """P2R R, PR, a, mask: the predicates of the mask, and the other bits of a. If only some are
    unknown, these become 0, since the others are needed again."""
    mask = _number(i.operands[3]) or 0
    chosen = [k for k in range(7) if mask >> k & 1]
    terms = [f"({_source(i.operands[2])} or 0) & {MASK ^ mask}"]
    terms += [f"bool(P[{k}]) << {k}" for k in chosen]
    none = " and ".join(f"P[{k}] is None" for k in chosen) or "False"
    return [f"{_register(i.operands[0])} = None if {none} else {' | '.join(terms)}"]


def _to_predicates(i: Instruction) -> Meaning:
    mask = _number(i.operands[2]) or 0
    lines = [f"w = {_source(i.operands[1])}"]
    for k in range(7):
        if mask >> k & 1:
            lines.append(f"P[{k}] = None if w is None else w >> {k} & 1 == 1")
    return lines


def _unknown(i: Instruction) -> Meaning:
    return [f"{d} = None" for d in destinations(i)]


_MEANINGS: dict[str, Callable[[Instruction], Meaning]] = {
    "CS2R": _special, "ELECT": _true, "F2I": _to_integer, "FSETP": _compare_floats,
    "HFMA2": _half_constant, "I2F": _to_float, "IABS": _absolute, "IADD3": _sum,
    "IMAD": _product, "ISETP": _compare,
    "LD": _load, "LDC": _constants, "LDL": _load, "LDS": _load, "LEA": _lea, "LOP3": _logic,
    "MOV": _move, "MUFU": _special_function, "P2R": _from_predicates, "PLOP3": _predicates,
    "PRMT": _permute, "R2P": _to_predicates, "R2UR": _move, "REDUX": _move,
    "S2R": _special, "S2UR": _special,
    "SEL": _select, "SHF": _shift, "SHFL": _shuffle, "ST": _store, "STL": _store, "STS": _store,
    "SYNCS": _true, "UBLKCP": _bulk_copy,
    "UIADD3": _sum, "UIMAD": _product, "UISETP": _compare, "ULDC": _constants, "ULEA": _lea,
    "ULOP3": _logic, "UMOV": _move, "UPLOP3": _predicates, "UPRMT": _permute, "USEL": _select,
    "USHF": _shift, "VIADD": _sum, "VIADDMNMX": _extreme, "VIMNMX": _extreme,
}  # fmt: skip


def meaning(instruction: Instruction) -> Meaning:
    """Statements for its effect, without its guard."""
    if instruction.mnemonic in _NO_RESULT and instruction.mnemonic not in _MEANINGS:
        return []
    return _MEANINGS.get(instruction.mnemonic, _unknown)(instruction)
