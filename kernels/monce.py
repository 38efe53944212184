"""The patch contrastive loss with transported negatives, and its gradient. See
mghf_fast/reference/monce.py for the mathematics and kernels/sinkhorn.py for plans and exponents.

As many maps at a time as memory has room for: s = q k^T is computed once, into a buffer that the
passes of Sinkhorn's iterations read. (A pass needs whole rows before it can add to the columns, so
without the buffer it would compute the products twice: a predicted 50 us of tensor cores instead of
23 us of memory.) The plan, its logarithm and the gradient of s are never stored. The forward saves
the potentials of the iterations, so the backward does not repeat them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mghf_fast.backends import can_run_triton
from mghf_fast.kernels import launch
from mghf_fast.kernels.products import dot, dot_precision
from mghf_fast.kernels.sinkhorn import recur
from mghf_fast.kernels.sinkhorn_exponents import (
    FAR,
    LN2,
    corrections,
    exponent_scale,
    exponential,
    load_potential,
    load_tile,
    negative_weights,
    off_diagonal,
    round_to_integer,
    row_blocks,
    score_of,
    split_exponent,
    warps,
)
from mghf_fast.kernels.sinkhorn_potentials import LARGE, solve
from mghf_fast.ops.vocabulary import kept_iterations, monce_state_shape

NEGLIGIBLE = 5e-7
"""Relative part of the gradient that the recursion may leave out."""


# ---- similarities ----
#
# s_ij = <q_i, k_j>. B = 1 image, 128 maps of N = 441, D = 64, float32: reads 29 MB and writes
# 101 MB, 30 us at 4.3 TB/s; 1.6 G multiply-adds, three TF32 products each: 24 us at 400 TFLOP/s
# (as float32 FMAs 53 us). Half-precision embeddings are exact in TF32, and one product is enough.


@triton.jit
def similarity_kernel(
    out: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    query_b: tl.tensor,
    query_i: tl.tensor,
    query_d: tl.tensor,
    key_b: tl.tensor,
    key_i: tl.tensor,
    key_d: tl.tensor,
    n: tl.tensor,
    depth: tl.tensor,
    pitch: tl.tensor,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    tiles = tl.cdiv(n, BLOCK)
    program = tl.program_id(0)
    b = (program // (tiles * tiles)).to(tl.int64)
    rows = program // tiles % tiles * BLOCK + tl.arange(0, BLOCK)
    columns = program % tiles * BLOCK + tl.arange(0, BLOCK)
    inside_i = rows[:, None] < n
    inside_j = columns[None, :] < n
    query_rows = query + b * query_b + rows.to(tl.int64)[:, None] * query_i
    key_rows = key + b * key_b + columns.to(tl.int64)[None, :] * key_i
    s = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        wide = d.to(tl.int64)
        q = tl.load(
            query_rows + wide[None, :] * query_d, mask=inside_i & (d[None, :] < depth), other=0.0
        )
        k = tl.load(
            key_rows + wide[:, None] * key_d, mask=inside_j & (d[:, None] < depth), other=0.0
        )
        s = dot(q.to(tl.float32), k.to(tl.float32), s, PRECISION)
    offsets = (b * n + rows.to(tl.int64)[:, None]) * pitch + columns[None, :]
    tl.store(out + offsets, s, mask=inside_i & inside_j)


# ---- losses ----
#
# With h_i = max_j s_ij, j != i, and z_i = log2 sum_j 2^(y_ij + g_j + (s_ij - h_i) / (t ln 2)),
#   loss_i = softplus(x_i),  x_i = (h_i - s_ii) / t + ln 2 (f_i + z_i) + ln(Q (N-1)):
# differences of similarities over t, so that nothing overflows and small losses keep their digits.
# For the gradient the row's z_i (integer and rest), h_i and r_i = dL/dloss_i sigmoid(x_i) are kept:
# W_ij = r_i 2^(y_ij + g_j + (s_ij - h_i) / (t ln 2) - z_i).
# Reads s, 101 MB: 23 us at 4.3 TB/s; 25 M powers.


@triton.jit
def losses_kernel(
    out: tl.tensor,
    similarity: tl.tensor,
    potentials: tl.tensor,
    steps: tl.tensor,
    grad: tl.tensor,
    grad_b: tl.tensor,
    grad_i: tl.tensor,
    stride_b: tl.tensor,
    stride_i: tl.tensor,
    n: tl.tensor,
    slots: tl.tensor,
    factor: tl.tensor,
    step_high: tl.tensor,
    step_low: tl.tensor,
    inverse_temperature: tl.tensor,
    log2_slope: tl.tensor,
    log_weight: tl.tensor,
    COST: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Stores the losses (B, N), or the statistics of the rows (B, 4, N)."""
    blocks = tl.cdiv(n, BLOCK_M)
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    rows = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    inside = rows < n
    matrix = similarity + b * stride_b
    history = potentials + b * slots * 4 * n
    slot = tl.load(steps + 2 * b) % slots
    whole_f, part_f = load_potential(history, slot, 0, rows, n)
    whole_g, part_g = load_potential(history, slot, 2, columns, n)

    s = load_tile(matrix, stride_i, 1, rows, columns, n)
    counted = off_diagonal(rows, columns, n)
    highest = tl.max(tl.where(counted, s, FAR), 1)
    highest = tl.where(inside, highest, 0.0)
    positive = tl.load(matrix + rows.to(tl.int64) * (stride_i + 1), mask=inside, other=0.0)
    whole, part = split_exponent(score_of(s, COST), factor, step_high, step_low)
    whole += whole_g[None, :]
    distance = (s - highest[:, None]) * log2_slope
    top = tl.max(tl.where(counted, whole + distance, FAR), 1)
    top = round_to_integer(tl.where(inside, top, 0.0))
    exponent = ((whole - top[:, None]) + distance) + (part + part_g[None, :])
    sums = tl.sum(tl.where(counted, tl.exp2(exponent), 0.0), 1)
    logs = tl.log2(tl.where(inside, sums, 1.0))
    # (f_i + z_i) ln 2, the integers first
    x = ((whole_f + top) + (part_f + logs)) * LN2
    x = (highest - positive) * inverse_temperature + (x + log_weight)
    decay = exponential(tl.maximum(-tl.abs(x), -200.0))
    if STATISTICS:
        row = tl.load(grad + b * grad_b + rows.to(tl.int64) * grad_i, mask=inside, other=0.0)
        share = tl.where(x > 0.0, 1.0, decay) / (1.0 + decay)
        share = tl.where(x == x, share, x)
        rounded = round_to_integer(logs)
        to = out + b * 4 * n + rows
        tl.store(to, top + rounded, mask=inside)
        tl.store(to + n, logs - rounded, mask=inside)
        tl.store(to + 2 * n, highest, mask=inside)
        tl.store(to + 3 * n, row.to(tl.float32) * share, mask=inside)
    else:
        # ln(1 + y) = 2 artanh(y / (2 + y)): no digits are lost where y is small
        ratio = decay / (2.0 + decay)
        square = ratio * ratio
        series = 1.0 / 15.0
        series = series * square + 1.0 / 13.0
        series = series * square + 1.0 / 11.0
        series = series * square + 1.0 / 9.0
        series = series * square + 1.0 / 7.0
        series = series * square + 1.0 / 5.0
        series = series * square + 1.0 / 3.0
        series = series * square + 1.0
        loss = tl.maximum(x, 0.0) + 2.0 * ratio * series
        tl.store(out + b * n + rows, tl.where(x == x, loss, x), mask=inside)


# ---- gradient ----
#
# ds_ij = W_ij / t + (W_ij - sum over the terms of B dg^T + df A) dscore/ds / epsilon,
# ds_ii = -r_i / t,  dq = ds k: tiles of ds meet tiles of k where they are made.
# Reads s, 101 MB: 23 us at 4.3 TB/s; 1.6 G multiply-adds, 24 us as three TF32 products each;
# powers: one an entry for W and two for each term, 7 us each.


@triton.jit
def query_gradient_kernel(
    out: tl.tensor,
    key: tl.tensor,
    similarity: tl.tensor,
    potentials: tl.tensor,
    steps: tl.tensor,
    statistics: tl.tensor,
    terms: tl.tensor,
    bounds: tl.tensor,
    key_b: tl.tensor,
    key_i: tl.tensor,
    key_d: tl.tensor,
    stride_b: tl.tensor,
    stride_i: tl.tensor,
    n: tl.tensor,
    depth: tl.tensor,
    slots: tl.tensor,
    factor: tl.tensor,
    step_high: tl.tensor,
    step_low: tl.tensor,
    inverse_temperature: tl.tensor,
    log2_slope: tl.tensor,
    COST: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    blocks_i = tl.cdiv(n, BLOCK_M)
    blocks_d = tl.cdiv(depth, BLOCK_D)
    program = tl.program_id(0)
    b = (program // (blocks_i * blocks_d)).to(tl.int64)
    rows = program // blocks_d % blocks_i * BLOCK_M + tl.arange(0, BLOCK_M)
    d = program % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    matrix = similarity + b * stride_b
    history = potentials + b * slots * 4 * n
    made = tl.load(steps + 2 * b)
    row = statistics + b * 4 * n
    weight = tl.load(row + 3 * n + rows, mask=rows < n, other=0.0)
    key_columns = key + b * key_b + d.to(tl.int64)[None, :] * key_d
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        s = load_tile(matrix, stride_i, 1, rows, columns, n)
        score = score_of(s, COST)
        whole, part = split_exponent(score, factor, step_high, step_low)
        # load_potential(): slots of a history that keeps all, or the last two
        whole_g, part_g = load_potential(history, made % slots, 2, columns, n)
        w = negative_weights(s, whole, part, whole_g, part_g, row, rows, n, log2_slope)
        ds = w * inverse_temperature
        if EXACT:
            through_plan = w - corrections(
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
            through_plan *= factor * LN2
            if COST == "exp":
                through_plan *= score
            ds += through_plan
        on_diagonal = rows[:, None] == columns[None, :]
        ds = tl.where(on_diagonal, (-inverse_temperature * weight)[:, None], ds)
        # Outside the matrix ds may be infinite, and infinity times the key's zeros there is NaN.
        ds = tl.where((rows[:, None] < n) & (columns[None, :] < n), ds, 0.0)
        k = tl.load(
            key_columns + columns.to(tl.int64)[:, None] * key_i,
            mask=(columns[:, None] < n) & (d[None, :] < depth),
            other=0.0,
        )
        dq = dot(ds, k.to(tl.float32), dq, PRECISION)
    offsets = (b * n + rows.to(tl.int64)[:, None]) * depth + d[None, :]
    inside = (rows[:, None] < n) & (d[None, :] < depth)
    tl.store(out + offsets, dq.to(out.dtype.element_ty), mask=inside)


# ---- launches ----

SHARE = 16
LEAST_BUFFER, MOST_BUFFER = 256 << 20, 2 << 30
"""Bounds, in bytes, of the buffer for the maps at a time, which is 1 / SHARE of the device's
memory."""
SMALL_BUFFER, FEW_PATCHES = 128 << 20, 1 << 16
"""The buffer's bytes for maps of fewer than `LARGE` patches, if all maps together have no more than
FEW_PATCHES. It holds enough of them to fill a device, and a step at 512 x 512 stays below 450 MiB.
Where there are more, the stacks of features are much larger than that."""


@functools.cache
def _buffer(device: torch.device) -> int:
    total = 0
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    return min(max(total // SHARE, LEAST_BUFFER), MOST_BUFFER)


def _pitch(n: int) -> int:
    """The row stride of the similarities, in entries: rows start at multiples of 64 bytes."""
    return -(-n // 16) * 16


def _maps_at_a_time(b: int, n: int, iterates: int, device: torch.device) -> int:
    """How many maps the buffer has room for, with their similarities and ``iterates`` iterates."""
    of_a_map = 4 * n * (_pitch(n) + 6 * iterates + 4)
    small = n < LARGE and b * n <= FEW_PATCHES
    room = max(1, (SMALL_BUFFER if small else _buffer(device)) // of_a_map)
    rounds = max(1, -(-b // room))
    return max(1, -(-b // rounds))  # rounds of equal size


def _product_precision(
    dtype: torch.dtype, epsilon: float, temperature: float, precision: str
) -> str:
    """The precision of the similarities. They are divided by epsilon and t: where these are small,
    every digit counts, whatever is asked for."""
    if dtype != torch.float32:
        return "tf32"  # exact: half-precision factors have no more digits than TF32
    exact = min(epsilon, temperature) < 0.05
    return "ieee" if exact else str(dot_precision(precision, "tf32x3"))


def _similarity_options(precision: str) -> dict[str, Any]:
    tile = {"BLOCK": 64, "BLOCK_D": 16 if precision == "ieee" else 32}
    return {**tile, "PRECISION": precision, "num_warps": 4, "num_stages": 3}


def _losses_options(n: int) -> dict[str, Any]:
    blocks = row_blocks(n, 4096)
    return {**blocks, "num_warps": warps(blocks), "num_stages": 1}


def _gradient_options(depth: int, precision: str) -> dict[str, Any]:
    width = min(64, max(16, int(triton.next_power_of_2(depth))))
    tile = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": width}
    product = dot_precision(precision, "tf32x3")
    return {**tile, "PRECISION": product, "num_warps": 8, "num_stages": 2}


def _similarities(
    query: Tensor, key: Tensor, epsilon: float, temperature: float, precision: str
) -> Tensor:
    b, n, depth = query.shape
    pitch = _pitch(n)
    s = torch.empty((b, n, pitch), dtype=torch.float32, device=query.device)
    product = _product_precision(query.dtype, epsilon, temperature, precision)
    options = _similarity_options(product)
    similarity_kernel[(b * launch.blocks(n, options["BLOCK"]) ** 2,)](
        s, query, key, *query.stride(), *key.stride(), n, depth, pitch, **options
    )
    return s[..., :n]


def _weigh(
    out: Tensor,
    s: Tensor,
    potentials: Tensor,
    steps: Tensor,
    grad: Tensor | None,
    temperature: float,
    epsilon: float,
    negative_weight: float,
    cost: str,
) -> Tensor:
    b, n, _ = s.shape
    options = _losses_options(n)
    given = out if grad is None else grad
    losses_kernel[(b * launch.blocks(n, options["BLOCK_M"]),)](
        out,
        s,
        potentials,
        steps,
        given,
        given.stride(0),
        given.stride(1),
        s.stride(0),
        s.stride(1),
        n,
        potentials.shape[1],
        *exponent_scale(cost, epsilon),
        1 / temperature,
        1 / (temperature * math.log(2)),
        math.log(negative_weight * (n - 1)),
        COST=cost,
        STATISTICS=grad is not None,
        **options,
    )
    return out


def forward(
    query: Tensor,
    key: Tensor,
    temperature: float,
    epsilon: float,
    iterations: int,
    negative_weight: float,
    cost: str,
    plan_gradient: str,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """The losses (B, N), float32, and the state for the backward, (B, 1 + 4 kept, N)."""
    b, n, _ = query.shape
    shape = monce_state_shape(query, iterations)
    if n == 1:  # no negatives, no loss
        losses = (query.float() * key.float()).sum(2) * 0
        return losses, torch.zeros(shape, dtype=torch.int32, device=query.device)
    state = torch.empty(shape, dtype=torch.int32, device=query.device)
    losses = torch.empty((b, n), dtype=torch.float32, device=query.device)
    with launch.on_device_of(query):
        size = _maps_at_a_time(b, n, kept_iterations(iterations) + 2, query.device)
        for start in range(0, b, size):
            chosen = slice(start, min(b, start + size))
            s = _similarities(query[chosen], key[chosen], epsilon, temperature, precision)
            potentials, steps = solve(
                s, cost, epsilon, iterations, None, False, settle=True, leave=state[chosen]
            )
            _weigh(
                losses[chosen],
                s,
                potentials,
                steps,
                None,
                temperature,
                epsilon,
                negative_weight,
                cost,
            )
    return losses, state


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    state: Tensor,
    temperature: float,
    epsilon: float,
    iterations: int,
    negative_weight: float,
    cost: str,
    plan_gradient: str,
    precision: str = "float32",
) -> Tensor:
    """The gradient of the query (B, N, D)."""
    b, n, depth = query.shape
    if n == 1:
        return query * 0 * grad.unsqueeze(2).to(query.dtype)
    # With two patches each can only be moved to the other, so the plan is constant.
    exact = plan_gradient == "exact" and n > 2
    out = torch.empty((b, n, depth), dtype=query.dtype, device=query.device)
    options = _gradient_options(depth, precision)
    blocks = launch.blocks(n, options["BLOCK_M"]) * launch.blocks(depth, options["BLOCK_D"])
    with launch.on_device_of(query):
        size = _maps_at_a_time(b, n, iterations + 1 if exact else 2, query.device)
        for start in range(0, b, size):
            chosen = slice(start, min(b, start + size))
            keys = key[chosen]
            s = _similarities(query[chosen], keys, epsilon, temperature, precision)
            potentials, steps = solve(
                s, cost, epsilon, iterations, None, exact, settle=True, take=state[chosen]
            )
            statistics = torch.empty((s.shape[0], 4, n), dtype=torch.float32, device=s.device)
            _weigh(
                statistics,
                s,
                potentials,
                steps,
                grad[chosen],
                temperature,
                epsilon,
                negative_weight,
                cost,
            )
            terms, bounds = potentials, steps
            if exact:
                terms, bounds = recur(
                    s,
                    potentials,
                    steps,
                    cost,
                    epsilon,
                    statistics=statistics,
                    temperature=temperature,
                    negligible=NEGLIGIBLE,
                )
            query_gradient_kernel[(s.shape[0] * blocks,)](
                out[chosen],
                keys,
                s,
                potentials,
                steps,
                statistics,
                terms,
                bounds,
                *keys.stride(),
                s.stride(0),
                s.stride(1),
                n,
                depth,
                potentials.shape[1],
                *exponent_scale(cost, epsilon),
                1 / temperature,
                1 / (temperature * math.log(2)),
                COST=cost,
                EXACT=exact,
                **options,
            )
    return out


can_run = can_run_triton
