"""What the statements of machine_meaning.py call: functions of integers of 32 bits."""

from __future__ import annotations

import struct

MASK = 0xFFFFFFFF
BULK = -1
"""The key of the bytes that bulk copies move, among the counts of accesses."""


def signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def signed64(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def as_float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits & MASK))[0])


def as_bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def rounded_up(value: int) -> int:
    """The bits of the smallest float32 that is no less than an unsigned integer."""
    bits = as_bits(float(value))
    return bits if as_float(bits) >= value else bits + 1


def reciprocal(bits: int) -> int | None:
    value = as_float(bits)
    return as_bits(1 / value) if value and value == value else None


def truncated(bits: int, width: int) -> int:
    value = as_float(bits)
    return min(max(int(value), 0), (1 << width) - 1) if abs(value) < 1e30 else (1 << width) - 1


def table_of_three(table: int, a: int, b: int, c: int) -> int:
    """Any function of three bits, for all 32 bits at once."""
    result = 0
    for k in range(8):
        if table >> k & 1:
            result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return result & MASK


def bytes_chosen(a: int, selector: int, b: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    result = 0
    for k in range(4):
        choice = selector >> 4 * k & 15
        byte = source[choice & 7]
        if choice & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * k
    return result


def put(memory: dict[int, int | None], address: int | None, values: list[int | None]) -> None:
    if address is None:
        memory.clear()  # it may have been any of them
        return
    for k, value in enumerate(values):
        memory[address + 4 * k] = value


def constant(constants: tuple[dict[int, int], dict[str, int]], bank: int, at: int | None,
              size: int, sign: bool = False) -> int | None:  # fmt: skip
    if bank != 0 or at is None:
        return None
    word = constants[0].get(at & ~3)
    if word is None:
        return None
    value = word >> 8 * (at & 3)
    if size < 4:
        value &= (1 << 8 * size) - 1
        if sign and value >> 8 * size - 1:
            value |= MASK << 8 * size & MASK
    return value & MASK


HELPERS: dict[str, object] = {
    "s": signed, "s64": signed64, "lut": table_of_three, "prmt": bytes_chosen, "put": put,
    "const": constant, "up": rounded_up, "rcp": reciprocal, "trunc": truncated, "number": as_float,
}  # fmt: skip
