"""Arithmetic of exponents of two, for the kernels of Sinkhorn's plans and of `monce`.

K_ij = 2^y_ij with y = score / (epsilon ln 2), and the potentials f and g are in the same unit, so
plan_ij = 2^(y_ij + f_i + g_j). Each of the three is kept as an integer and a rest of about
[-1/2, 1/2]. The integers add up without rounding, so a small exponent keeps all its digits, however
large its terms are: plans at epsilon = 0.005 are as exact as those at 1.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from mghf_fast.kernels import launch

FAR = tl.constexpr(-1e30)  # an exponent below all others
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def round_to_integer(x: tl.tensor) -> Any:
    """The nearest integer, for |x| up to 2^22, by additions; floor and rint run at an eighth of
    their rate."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def exponential(x: tl.tensor) -> Any:
    """e^x to float32's precision, which 2^(x log2 e) misses by the rounding of the product."""
    whole = round_to_integer(x * 1.4426950408889634)
    r = (x - whole * 0.693359375) + whole * 2.12194440054690583e-4
    p = 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * tl.exp2(whole)


@triton.jit
def score_of(similarity: tl.tensor, COST: tl.constexpr) -> Any:
    """The score that the plan maximises, without its sign, which the factor has, and without a
    constant, which f absorbs."""
    score = similarity
    if COST == "exp":
        score = exponential(similarity)
    return score


@triton.jit
def split_exponent(
    score: tl.tensor, factor: tl.tensor, step_high: tl.tensor, step_low: tl.tensor
) -> Any:
    """score * factor as an integer and a rest. factor = 1 / (step_high + step_low), and
    step_high has 12 digits, so its product with an integer below 2^12 is exact."""
    whole = round_to_integer(score * factor)
    part = ((score - whole * step_high) - whole * step_low) * factor
    return whole, part


@triton.jit
def load_tile(
    matrix: tl.tensor,
    stride_i: tl.tensor,
    stride_j: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    n: tl.tensor,
) -> Any:
    offsets = rows.to(tl.int64)[:, None] * stride_i + columns.to(tl.int64)[None, :] * stride_j
    inside = (rows[:, None] < n) & (columns[None, :] < n)
    return tl.load(matrix + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def off_diagonal(rows: tl.tensor, columns: tl.tensor, n: tl.tensor) -> Any:
    return (rows[:, None] < n) & (columns[None, :] < n) & (rows[:, None] != columns[None, :])


@triton.jit
def load_potential(
    history: tl.tensor, slot: tl.tensor, which: tl.constexpr, index: tl.tensor, n: tl.tensor
) -> Any:
    """Integer and rest of f (which = 0) or g (which = 2) in the history's slot `slot`."""
    base = history + slot.to(tl.int64) * 4 * n + which * n
    whole = tl.load(base + index, mask=index < n, other=0.0)
    part = tl.load(base + n + index, mask=index < n, other=0.0)
    return whole, part


@triton.jit
def negative_weights(
    s: tl.tensor,
    whole: tl.tensor,
    part: tl.tensor,
    whole_g: tl.tensor,
    part_g: tl.tensor,
    statistics: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    log2_slope: tl.tensor,
) -> Any:
    """W of `monce`, the gradient of log plan: the row's weight r_i times the softmax of
    log a_ij + s_ij / t, from the row's statistics (see kernels/monce.py)."""
    inside = rows < n
    whole_z = tl.load(statistics + rows, mask=inside, other=0.0)
    part_z = tl.load(statistics + n + rows, mask=inside, other=0.0)
    highest = tl.load(statistics + 2 * n + rows, mask=inside, other=0.0)
    weight = tl.load(statistics + 3 * n + rows, mask=inside, other=0.0)
    exponent = ((whole + whole_g[None, :]) - whole_z[:, None]) + (
        (s - highest[:, None]) * log2_slope
    )
    return weight[:, None] * tl.exp2(exponent + ((part + part_g[None, :]) - part_z[:, None]))


@triton.jit
def corrections(
    whole: tl.tensor,
    part: tl.tensor,
    history: tl.tensor,
    terms: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    n: tl.tensor,
    made: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
) -> Any:
    """The sum over the terms of B_ij dg_j + A_ij df_i, which the recursion subtracts from W.
    Entries on the diagonal and outside the matrix are arbitrary."""
    total = tl.zeros_like(part)
    for term in range(first, last + 1):
        # Term made + 1 is for all iterations after the last one made: f and g do not change there.
        now = tl.minimum(term, made)
        before = tl.minimum(term - 1, made)
        whole_f, part_f = load_potential(history, now, 0, rows, n)
        whole_g, part_g = load_potential(history, now, 2, columns, n)
        whole_p, part_p = load_potential(history, before, 2, columns, n)
        base = terms + tl.minimum(term, made + 1).to(tl.int64) * 2 * n
        dg = tl.load(base + columns, mask=columns < n, other=0.0)
        df = tl.load(base + n + rows, mask=rows < n, other=0.0)
        x = whole + whole_f[:, None]
        y = part + part_f[:, None]
        total += tl.exp2((x + whole_g[None, :]) + (y + part_g[None, :])) * dg[None, :]
        total += tl.exp2((x + whole_p[None, :]) + (y + part_p[None, :])) * df[:, None]
    return total


# ---- launches ----


def exponent_scale(cost: str, epsilon: float) -> tuple[float, float, float]:
    """The arguments factor, step_high and step_low of split_exponent()."""
    step = (1 if cost == "hard" else -1) * epsilon * math.log(2)
    mantissa, exponent = math.frexp(step)
    high = math.ldexp(round(mantissa * 4096), exponent - 12)
    return 1 / step, high, step - high


def row_blocks(n: int, elements: int) -> dict[str, int]:
    """Blocks of whole rows with about ``elements`` entries."""
    width = max(16, int(triton.next_power_of_2(n)))
    return {"BLOCK_M": min(width, max(1, elements // width)), "BLOCK_N": width}


def warps(blocks: dict[str, int]) -> int:
    """The number of warps: 16 entries per thread where the limits allow it."""
    return min(16, max(4, blocks["BLOCK_M"] * blocks["BLOCK_N"] // 512))


def pass_options(n: int, elements: int, stages: int) -> dict[str, Any]:
    """Options of the kernels with one program per matrix. A multiprocessor runs only one of them,
    so its threads have registers for many entries."""
    blocks = row_blocks(n, elements)
    many = {"num_warps": min(8, warps(blocks)), "maxnreg": launch.MOST_REGISTERS}
    return {**blocks, "STAGES": stages, **many, "num_stages": 2}
