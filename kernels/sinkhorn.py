"""Sinkhorn's plans and their gradients. See mghf_fast/reference/sinkhorn.py for the mathematics,
sinkhorn_exponents.py for the numbers and sinkhorn_potentials.py for the iterations.

The recursion of the gradient also takes one pass per iteration; it stores the vectors dg and df of
every iteration, from which the entries of the gradient of log K are then computed independently.

For `monce` the iterations end once further ones would change the result negligibly (`settle`). The
recursion goes through all iterations, including those that were skipped, until what dg could still
add is negligible.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mghf_fast.backends import can_run_triton
from mghf_fast.kernels import launch
from mghf_fast.kernels.sinkhorn_exponents import (
    LN2,
    corrections,
    exponent_scale,
    load_potential,
    load_tile,
    negative_weights,
    off_diagonal,
    pass_options,
    score_of,
    split_exponent,
)
from mghf_fast.kernels.sinkhorn_potentials import solve
from mghf_fast.kernels.sinkhorn_recursion import first_terms

NEGLIGIBLE = 1e-7
"""Relative part of the sum of |dlog plan| that the recursion may leave out."""


# ---- the plan ----
#
# plan_ij = 2^(y_ij + f_i + g_j). Reads and writes 99.6 MB each: 46 us at 4.3 TB/s; 25 M powers.


@triton.jit
def plan_kernel(
    plan: tl.tensor,
    similarity: tl.tensor,
    potentials: tl.tensor,
    steps: tl.tensor,
    stride_b: tl.tensor,
    stride_i: tl.tensor,
    stride_j: tl.tensor,
    n: tl.tensor,
    slots: tl.tensor,
    factor: tl.tensor,
    step_high: tl.tensor,
    step_low: tl.tensor,
    COST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    tiles_i = tl.cdiv(n, BLOCK_M)
    tiles_j = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    b = (program // (tiles_i * tiles_j)).to(tl.int64)
    rows = program // tiles_j % tiles_i * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = program % tiles_j * BLOCK_N + tl.arange(0, BLOCK_N)
    s = load_tile(similarity + b * stride_b, stride_i, stride_j, rows, columns, n)
    whole, part = split_exponent(score_of(s, COST), factor, step_high, step_low)
    history = potentials + b * slots * 4 * n
    slot = tl.load(steps + 2 * b) % slots
    whole_f, part_f = load_potential(history, slot, 0, rows, n)
    whole_g, part_g = load_potential(history, slot, 2, columns, n)
    exponent = ((whole + whole_f[:, None]) + whole_g[None, :]) + (
        (part + part_f[:, None]) + part_g[None, :]
    )
    # The diagonal is 0, or NaN with the rest of the matrix.
    value = tl.where(rows[:, None] == columns[None, :], 0.0 * part_g[None, :], tl.exp2(exponent))
    offsets = (b * n + rows.to(tl.int64)[:, None]) * n + columns[None, :]
    inside = (rows[:, None] < n) & (columns[None, :] < n)
    tl.store(plan + offsets, value.to(plan.dtype.element_ty), mask=inside)


# ---- the gradient ----
#
# With W the gradient of log plan, df = W 1 and dg = W^T 1, for every iteration from the last on:
#   B = 2^(y + f + g):   df -= B dg;   A = 2^(y + f + g of the iteration before):   dg = -A^T df
# and dg and df of the iteration are stored. One program per matrix; a pass reads the matrix once
# and takes two powers per entry: floor 23 us at 4.3 TB/s (14 us of powers; about 20 operations per
# entry, 8 us), plus one pass for W, which also reads the incoming gradient: 46 us. The recursion
# ends as early as the iterations settle: about 6 + 1 passes at epsilon = 1 (predicted 190 us).


@triton.jit
def recursion_kernel(
    similarity: tl.tensor,
    potentials: tl.tensor,
    steps: tl.tensor,
    upstream: tl.tensor,
    statistics: tl.tensor,
    terms: tl.tensor,
    bounds: tl.tensor,
    places: tl.tensor,
    limits: tl.tensor,
    next_term: tl.tensor,
    stride_b: tl.tensor,
    stride_i: tl.tensor,
    stride_j: tl.tensor,
    upstream_b: tl.tensor,
    upstream_i: tl.tensor,
    upstream_j: tl.tensor,
    n: tl.tensor,
    slots: tl.tensor,
    factor: tl.tensor,
    step_high: tl.tensor,
    step_low: tl.tensor,
    log2_slope: tl.tensor,
    negligible: tl.tensor,
    steepness: tl.tensor,
    COST: tl.constexpr,
    MONCE: tl.constexpr,
    CONTINUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """W is upstream * plan, or that of `monce`. The recursion stops once the remaining dg adds up
    to less than `negligible` times sum |W|. That bound is divided by `steepness` (times the
    steepest slope of the score) where this is greater than one. CONTINUE: from where
    recursion_pass_kernel ended, W being summed."""
    b = tl.program_id(0).to(tl.int64)
    matrix = similarity + b * stride_b
    history = potentials + b * slots * 4 * n
    storage = terms + b * slots * 2 * n
    columns = tl.arange(0, BLOCK_N)
    real = columns < n
    made = tl.load(steps + 2 * b)
    started = tl.load(steps + 2 * b + 1)
    t = started
    last = tl.minimum(t, made + 1)

    whole_g, part_g = load_potential(history, made, 2, columns, n)
    column_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    size = tl.zeros([BLOCK_M], tl.float32)
    steepest = tl.zeros([BLOCK_M], tl.float32) + 1.0
    if COST == "exp":
        steepest = tl.zeros([BLOCK_M], tl.float32)
    summed = n if not CONTINUE else 0
    for start in tl.range(0, summed, BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        s = load_tile(matrix, stride_i, stride_j, rows, columns, n)
        counted = off_diagonal(rows, columns, n)
        score = score_of(s, COST)
        whole, part = split_exponent(score, factor, step_high, step_low)
        if MONCE:
            w = negative_weights(
                s, whole, part, whole_g, part_g, statistics + b * 4 * n, rows, n, log2_slope
            )
        else:
            whole_f, part_f = load_potential(history, made, 0, rows, n)
            w = tl.exp2(
                ((whole + whole_f[:, None]) + whole_g[None, :])
                + ((part + part_f[:, None]) + part_g[None, :])
            ) * load_tile(upstream + b * upstream_b, upstream_i, upstream_j, rows, columns, n)
        w = tl.where(counted, w, 0.0)
        column_sums += w
        size += tl.sum(tl.abs(w), 1)
        if COST == "exp":
            steepest = tl.maximum(steepest, tl.max(tl.where(counted, score, 0.0), 1))
        tl.store(storage + n + rows, tl.sum(w, 1), mask=rows < n)
    dg = tl.sum(column_sums, 0)
    share = tl.minimum(1.0, 1.0 / (steepness * tl.max(steepest, 0)))
    least = negligible * tl.sum(size, 0) * share
    tl.debug_barrier()

    first = last
    going = t > 0
    if CONTINUE:
        t = tl.load(places + 2 * b)
        going = tl.load(places + 2 * b + 1) != 0
        least = tl.load(limits + b)
        dg = tl.load(next_term + b * n + columns, mask=real, other=0.0)
        first = tl.minimum(tl.minimum(t + 1, started), made + 1)
    while going:
        now = tl.minimum(t, made)
        before = tl.minimum(t - 1, made)
        first = tl.minimum(t, made + 1)
        term = storage + first.to(tl.int64) * 2 * n
        # Entries that are added to an existing term and to the initial df: all n of them or none.
        joined = tl.where((t > made) & (t < started), n, 0)
        given = tl.where(t == started, n, 0)
        earlier = tl.load(term + columns, mask=columns < joined, other=0.0)
        tl.store(term + columns, dg + earlier, mask=real)
        whole_g, part_g = load_potential(history, now, 2, columns, n)
        whole_p, part_p = load_potential(history, before, 2, columns, n)
        column_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.range(0, n, BLOCK_M, num_stages=STAGES):
            rows = start + tl.arange(0, BLOCK_M)
            s = load_tile(matrix, stride_i, stride_j, rows, columns, n)
            counted = off_diagonal(rows, columns, n)
            whole, part = split_exponent(score_of(s, COST), factor, step_high, step_low)
            whole_f, part_f = load_potential(history, now, 0, rows, n)
            whole += whole_f[:, None]
            part += part_f[:, None]
            exponent = (whole + whole_g[None, :]) + (part + part_g[None, :])
            averaged = tl.where(counted, tl.exp2(exponent) * dg[None, :], 0.0)
            df = tl.load(storage + n + rows, mask=rows < given, other=0.0)
            df -= tl.sum(averaged, 1)
            exponent = (whole + whole_p[None, :]) + (part + part_p[None, :])
            column_sums -= tl.where(counted, tl.exp2(exponent) * df[:, None], 0.0)
            previous_df = tl.load(term + n + rows, mask=rows < joined, other=0.0)
            tl.store(term + n + rows, df + previous_df, mask=rows < n)
        dg = tl.sum(column_sums, 0)
        mean = tl.sum(tl.where(real, dg, 0.0), 0) / n
        spread = tl.sum(tl.where(real, tl.abs(dg - mean), 0.0), 0)
        going = (t > 1) & (t * spread > least)
        t -= 1
        tl.debug_barrier()
    tl.store(bounds + 2 * b, first)
    tl.store(bounds + 2 * b + 1, last)


# dsimilarity = (W - sum over the terms of B dg^T + df A) dscore / dsimilarity / epsilon.
# Reads the matrix and the incoming gradient and writes one, 299 MB: 70 us at 4.3 TB/s; the powers,
# two per term and entry, 7 us per term and 42 us for 6.


@triton.jit
def gradient_kernel(
    out: tl.tensor,
    upstream: tl.tensor,
    similarity: tl.tensor,
    potentials: tl.tensor,
    steps: tl.tensor,
    terms: tl.tensor,
    bounds: tl.tensor,
    stride_b: tl.tensor,
    stride_i: tl.tensor,
    stride_j: tl.tensor,
    upstream_b: tl.tensor,
    upstream_i: tl.tensor,
    upstream_j: tl.tensor,
    n: tl.tensor,
    slots: tl.tensor,
    factor: tl.tensor,
    step_high: tl.tensor,
    step_low: tl.tensor,
    COST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    tiles_i = tl.cdiv(n, BLOCK_M)
    tiles_j = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    b = (program // (tiles_i * tiles_j)).to(tl.int64)
    rows = program // tiles_j % tiles_i * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = program % tiles_j * BLOCK_N + tl.arange(0, BLOCK_N)
    s = load_tile(similarity + b * stride_b, stride_i, stride_j, rows, columns, n)
    score = score_of(s, COST)
    whole, part = split_exponent(score, factor, step_high, step_low)
    history = potentials + b * slots * 4 * n
    made = tl.load(steps + 2 * b)
    whole_f, part_f = load_potential(history, made, 0, rows, n)
    whole_g, part_g = load_potential(history, made, 2, columns, n)
    w = tl.exp2(
        ((whole + whole_f[:, None]) + whole_g[None, :])
        + ((part + part_f[:, None]) + part_g[None, :])
    ) * load_tile(upstream + b * upstream_b, upstream_i, upstream_j, rows, columns, n)
    value = w - corrections(
        whole,
        part,
        history,
        terms + b * slots * 2 * n,
        rows,
        columns,
        n,
        made,
        tl.load(bounds + 2 * b),
        tl.load(bounds + 2 * b + 1),
    )
    value *= factor * LN2
    if COST == "exp":
        value *= score
    value = tl.where(rows[:, None] == columns[None, :], 0.0 * part_g[None, :], value)
    offsets = (b * n + rows.to(tl.int64)[:, None]) * n + columns[None, :]
    inside = (rows[:, None] < n) & (columns[None, :] < n)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


# ---- launches ----

TILE = {"BLOCK_M": 16, "BLOCK_N": 128}
"""Block sizes of the kernels that compute entries independently."""


def _recursion_options(n: int) -> dict[str, Any]:
    return pass_options(n, 4096, 3)


def recur(
    similarity: Tensor,
    potentials: Tensor,
    steps: Tensor,
    cost: str,
    epsilon: float,
    *,
    upstream: Tensor | None = None,
    statistics: Tensor | None = None,
    temperature: float = 1.0,
    negligible: float = NEGLIGIBLE,
) -> tuple[Tensor, Tensor]:
    """dg and df of the iterations (B, slots, 2, N), and the first and last of them (B, 2), from the
    gradient of the plan, ``upstream``, or from the ``statistics`` of `monce`."""
    b, n, _ = similarity.shape
    slots = potentials.shape[1]
    terms = torch.empty((b, slots, 2, n), dtype=torch.float32, device=similarity.device)
    bounds = torch.empty((b, 2), dtype=torch.int32, device=similarity.device)
    given = similarity if upstream is None else upstream
    begun = None
    if statistics is not None:
        begun = first_terms(
            *(similarity, potentials, steps, statistics, terms),
            *(cost, epsilon, temperature, negligible),
        )
    recursion_kernel[(b,)](
        similarity,
        potentials,
        steps,
        given,
        potentials if statistics is None else statistics,
        terms,
        bounds,
        *(begun or (bounds, terms, terms)),
        *similarity.stride(),
        *given.stride(),
        n,
        slots,
        *exponent_scale(cost, epsilon),
        1 / (temperature * math.log(2)),
        negligible,
        1.0 if statistics is None else temperature / epsilon,
        COST=cost,
        MONCE=statistics is not None,
        CONTINUE=begun is not None,
        **_recursion_options(n),
    )
    return terms, bounds


def _tiles(b: int, n: int) -> tuple[int]:
    return (b * launch.blocks(n, TILE["BLOCK_M"]) * launch.blocks(n, TILE["BLOCK_N"]),)


def forward(
    similarity: Tensor, cost: str, epsilon: float, iterations: int, tolerance: float | None
) -> Tensor:
    """The plans (B, N, N)."""
    b, n, _ = similarity.shape
    if n == 1:
        return similarity * 0
    with launch.on_device_of(similarity):
        potentials, steps = solve(similarity, cost, epsilon, iterations, tolerance, False)
        plan = torch.empty((b, n, n), dtype=similarity.dtype, device=similarity.device)
        plan_kernel[_tiles(b, n)](
            plan,
            similarity,
            potentials,
            steps,
            *similarity.stride(),
            n,
            potentials.shape[1],
            *exponent_scale(cost, epsilon),
            COST=cost,
            **TILE,
            num_warps=4,
            num_stages=1,
        )
    return plan


def backward(
    grad: Tensor,
    similarity: Tensor,
    cost: str,
    epsilon: float,
    iterations: int,
    tolerance: float | None,
) -> Tensor:
    """The gradient of the similarities (B, N, N)."""
    b, n, _ = similarity.shape
    if n == 1:
        return (grad * 0).to(similarity.dtype)
    with launch.on_device_of(similarity):
        potentials, steps = solve(similarity, cost, epsilon, iterations, tolerance, True)
        terms, bounds = recur(similarity, potentials, steps, cost, epsilon, upstream=grad)
        out = torch.empty((b, n, n), dtype=similarity.dtype, device=similarity.device)
        gradient_kernel[_tiles(b, n)](
            out,
            grad,
            similarity,
            potentials,
            steps,
            terms,
            bounds,
            *similarity.stride(),
            *grad.stride(),
            n,
            potentials.shape[1],
            *exponent_scale(cost, epsilon),
            COST=cost,
            **TILE,
            num_warps=8,
            num_stages=1,
        )
    return out


can_run = can_run_triton
