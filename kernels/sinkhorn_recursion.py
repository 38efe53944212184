"""The first terms of the recursion of `monce`'s gradient for large maps, with many programs for
each; the formulas are in sinkhorn.py.

As in sinkhorn_potentials.py every term is a step of one launch. A program takes some rows, and
first adds up dg from the column sums that the step before left in parts, like all programs of its
map in the same order. Maps whose recursion ends sooner leave the other steps empty; for those that
need more, recursion_kernel goes on.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mghf_fast.kernels import launch, turns
from mghf_fast.kernels.sinkhorn_exponents import (
    exponent_scale,
    load_potential,
    load_tile,
    negative_weights,
    off_diagonal,
    pass_options,
    score_of,
    split_exponent,
)
from mghf_fast.kernels.sinkhorn_potentials import LARGE, programs_of_map
from mghf_fast.kernels.turns import draw, leave, wait

TERMS = 8
"""`monce` takes about seven at epsilon 1."""


# A step reads the matrix once and takes two powers per entry. B = 1 image, 128 maps of N = 1764:
# 1.6 GB, 0.37 ms at 4.3 TB/s.
@triton.jit(do_not_specialize=("maps", "last"))
def recursion_pass_kernel(
    counters: tl.tensor,
    similarity: tl.tensor,
    potentials: tl.tensor,
    steps: tl.tensor,
    statistics: tl.tensor,
    terms: tl.tensor,
    partial: tl.tensor,
    sizes: tl.tensor,
    places: tl.tensor,
    limits: tl.tensor,
    next_term: tl.tensor,
    stride_b: tl.tensor,
    stride_i: tl.tensor,
    n: tl.tensor,
    slots: tl.tensor,
    maps: tl.tensor,
    last: tl.tensor,
    programs: tl.tensor,
    rows_of_program: tl.tensor,
    factor: tl.tensor,
    step_high: tl.tensor,
    step_low: tl.tensor,
    log2_slope: tl.tensor,
    negligible: tl.tensor,
    steepness: tl.tensor,
    COST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Step 0 sums W; steps 1 to `last` - 1 are a term each, and step `last` leaves dg of the next
    one in `next_term`, (B, N). `partial`: column sums of even and odd steps, (2, B, programs, N);
    `sizes`: a program's sum of |W| and its steepest score, (B, programs, 2). `places` (the
    iteration and whether to go on) and `limits` (what is negligible) alternate as well, (2, B, 2)
    and (2, B), so that no program reads what another one writes."""
    drawn = draw(counters)
    wait(counters, drawn // (maps * programs) * (maps * programs))
    step = drawn // (maps * programs)
    b = (drawn % (maps * programs) // programs).to(tl.int64)
    part_of_map = drawn % programs
    old = (step + 1) % 2 * maps + b
    new = step % 2 * maps + b
    matrix = similarity + b * stride_b
    history = potentials + b * slots * 4 * n
    storage = terms + b * slots * 2 * n
    columns = tl.arange(0, BLOCK_N)
    real = columns < n
    made = tl.load(steps + 2 * b)
    started = tl.load(steps + 2 * b + 1)
    first_row = part_of_map * rows_of_program
    end = tl.minimum(n, first_row + rows_of_program)
    to = partial + (new * programs + part_of_map) * n + columns

    t = started
    going = t * 0 + 1
    limit = factor * 0.0
    dg = tl.zeros([BLOCK_N], tl.float32)
    if step == 0:
        whole_g, part_g = load_potential(history, made, 2, columns, n)
        column_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        size = tl.zeros([BLOCK_M], tl.float32)
        steepest = tl.zeros([BLOCK_M], tl.float32) + 1.0
        if COST == "exp":
            steepest = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(first_row, end, BLOCK_M, num_stages=STAGES):
            rows = start + tl.arange(0, BLOCK_M)
            inside = rows < end
            s = load_tile(matrix, stride_i, 1, rows, columns, n)
            counted = off_diagonal(rows, columns, n) & inside[:, None]
            score = score_of(s, COST)
            whole, part = split_exponent(score, factor, step_high, step_low)
            w = negative_weights(
                s, whole, part, whole_g, part_g, statistics + b * 4 * n, rows, n, log2_slope
            )
            w = tl.where(counted, w, 0.0)
            column_sums += w
            size += tl.sum(tl.abs(w), 1)
            if COST == "exp":
                steepest = tl.maximum(steepest, tl.max(tl.where(counted, score, 0.0), 1))
            tl.store(storage + n + rows, tl.sum(w, 1), mask=inside)
        tl.store(to, tl.sum(column_sums, 0), mask=real)
        at = sizes + (b * programs + part_of_map) * 2
        tl.store(at, tl.sum(size, 0))
        tl.store(at + 1, tl.max(steepest, 0))
    else:
        t = tl.load(places + 2 * old)
        going = tl.load(places + 2 * old + 1)
        limit = tl.load(limits + old)
        if going != 0:
            given = partial + old * programs * n + columns
            for other in range(0, programs):
                dg += tl.load(given + other * n, mask=real, other=0.0)
            if step == 1:
                size = factor * 0.0
                steepest = factor * 0.0
                for other in range(0, programs):
                    at = sizes + (b * programs + other) * 2
                    size += tl.load(at)
                    steepest = tl.maximum(steepest, tl.load(at + 1))
                limit = negligible * size * tl.minimum(1.0, 1.0 / (steepness * steepest))
                going = tl.where(t > 0, 1, 0)
            else:
                mean = tl.sum(tl.where(real, dg, 0.0), 0) / n
                spread = tl.sum(tl.where(real, tl.abs(dg - mean), 0.0), 0)
                going = tl.where((t > 1) & (t * spread > limit), 1, 0)
                t -= 1
    if part_of_map == 0:
        tl.store(places + 2 * new, t)
        tl.store(places + 2 * new + 1, going)
        tl.store(limits + new, limit)
        tl.store(next_term + b * n + columns, dg, mask=columns < tl.where(step == last, n, 0))
    if (step > 0) & (step < last) & (going != 0):
        now = tl.minimum(t, made)
        term = storage + tl.minimum(t, made + 1).to(tl.int64) * 2 * n
        # Entries that are added to an existing term and to the initial df: all n of them or none.
        joined = tl.where((t > made) & (t < started), n, 0)
        fresh = tl.where(t == started, n, 0)
        if part_of_map == 0:
            earlier = tl.load(term + columns, mask=columns < joined, other=0.0)
            tl.store(term + columns, dg + earlier, mask=real)
        whole_g, part_g = load_potential(history, now, 2, columns, n)
        whole_p, part_p = load_potential(history, tl.minimum(t - 1, made), 2, columns, n)
        column_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.range(first_row, end, BLOCK_M, num_stages=STAGES):
            rows = start + tl.arange(0, BLOCK_M)
            inside = rows < end
            s = load_tile(matrix, stride_i, 1, rows, columns, n)
            counted = off_diagonal(rows, columns, n) & inside[:, None]
            whole, part = split_exponent(score_of(s, COST), factor, step_high, step_low)
            whole_f, part_f = load_potential(history, now, 0, rows, n)
            whole += whole_f[:, None]
            part += part_f[:, None]
            exponent = (whole + whole_g[None, :]) + (part + part_g[None, :])
            averaged = tl.where(counted, tl.exp2(exponent) * dg[None, :], 0.0)
            df = tl.load(storage + n + rows, mask=inside & (rows < fresh), other=0.0)
            df -= tl.sum(averaged, 1)
            exponent = (whole + whole_p[None, :]) + (part + part_p[None, :])
            column_sums -= tl.where(counted, tl.exp2(exponent) * df[:, None], 0.0)
            previous = tl.load(term + n + rows, mask=inside & (rows < joined), other=0.0)
            tl.store(term + n + rows, df + previous, mask=inside)
        tl.store(to, tl.sum(column_sums, 0), mask=real)
    leave(counters, statistics)


class Begun(NamedTuple):
    """From where recursion_kernel goes on: the iteration and whether there is more to do, (B, 2);
    what is negligible, (B,); dg, (B, N)."""

    places: Tensor
    limits: Tensor
    next_term: Tensor


def first_terms(
    similarity: Tensor,
    potentials: Tensor,
    steps: Tensor,
    statistics: Tensor,
    terms: Tensor,
    cost: str,
    epsilon: float,
    temperature: float,
    negligible: float,
) -> Begun | None:
    """Stores up to `TERMS` terms of each map in ``terms``; None, and nothing, if the maps are small
    or so many that one program each fills a GPU."""
    b, n, _ = similarity.shape
    programs = programs_of_map(b, n)
    if n < LARGE or programs == 1:
        return None
    last = TERMS + 1
    partial = torch.empty((2, b, programs, n), dtype=torch.float32, device=similarity.device)
    sizes = partial.new_empty((b, programs, 2))
    places = steps.new_empty((2, b, 2))
    limits = partial.new_empty((2, b))
    next_term = partial.new_empty((b, n))
    recursion_pass_kernel[(b * programs * (last + 1),)](
        turns.counters_for(similarity),
        similarity,
        potentials,
        steps,
        statistics,
        terms,
        partial,
        sizes,
        places,
        limits,
        next_term,
        *similarity.stride()[:2],
        n,
        potentials.shape[1],
        b,
        last,
        programs,
        launch.blocks(n, programs),
        *exponent_scale(cost, epsilon),
        1 / (temperature * math.log(2)),
        negligible,
        temperature / epsilon,
        COST=cost,
        **_pass_options(n),
    )
    return Begun(places[last % 2], limits[last % 2], next_term)


def _pass_options(n: int) -> dict[str, Any]:
    """With 128 registers per thread two programs of 8 warps share a multiprocessor."""
    return pass_options(n, 2048, 2) | {"num_warps": 8, "maxnreg": 128}
