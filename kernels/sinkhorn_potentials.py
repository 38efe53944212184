"""The potentials of Sinkhorn's plans, and when the iterations that find them stop. See
mghf_fast/reference/sinkhorn.py for the mathematics, sinkhorn_exponents.py for the numbers.

An iteration is one pass over the matrix. A block of rows computes the maxima and sums of 2^(y + g)
over its columns, which give f, and adds its 2^(y + f + g), whose rows sum to one, to the columns'
sums c; then g decreases by log2 c. No exponent is positive. Where a column's sum is so small that
some of its terms may have underflowed, the columns are summed again with maxima of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mghf_fast.kernels import launch, turns
from mghf_fast.kernels.sinkhorn_exponents import (
    FAR,
    LN2,
    exponent_scale,
    load_potential,
    load_tile,
    off_diagonal,
    pass_options,
    round_to_integer,
    score_of,
    split_exponent,
)
from mghf_fast.kernels.turns import draw, leave, wait

TINY = tl.constexpr(5e-20)  # column sums of at least 2^-64 lost nothing to underflow


# ---- when to stop ----
#
# Twin: csrc/common/sinkhorn_settling.h, where the rule is explained.

CLEAN = tl.constexpr(1e-5)  # a smaller spread may be rounding
FASTEST = tl.constexpr(0.05)  # smallest rate that is believed from a single iteration
REST = tl.constexpr(1e-6)  # largest change of log plan that may still be to come


@triton.jit
def settle(spread: tl.tensor, previous: tl.tensor, rest: tl.tensor, rate: tl.tensor) -> Any:
    """Whether further iterations would change the plan negligibly, and the new rest and rate.
    ``spread`` is the largest minus the smallest change of ln g in this iteration, ``previous`` that
    of the one before. Before the first iteration ``previous``, ``rest`` and ``rate`` are 1, and the
    answer after it is not to be used. NaN never settles."""
    clean = previous > CLEAN
    ratio = spread / previous
    ratio = tl.where(ratio < FASTEST, FASTEST, ratio)
    rate = tl.where(clean, ratio, rate)
    rest = tl.where(clean, spread, rest * rate)
    return rate * rest <= REST * (1.0 - rate), rest, rate


# ---- what the forward of `monce` saves for its backward ----
#
# (B, 1 + 4 kept, N), int32: the number of iterations made, or 0 if they did not fit and the
# backward has to repeat them, and the potentials after each, as in the history.


@triton.jit
def leave_state(
    state: tl.tensor,
    history: tl.tensor,
    made: tl.tensor,
    kept: tl.tensor,
    slots: tl.tensor,
    columns: tl.tensor,
    n: tl.tensor,
) -> None:
    fitting = tl.where(made <= kept, made, 0)
    first = tl.where(columns == 0, fitting, 0)
    tl.store(state + columns, first, mask=columns < n)
    tl.debug_barrier()  # f is read by other threads than those that stored it
    for t in range(1, kept + 1):
        for which in tl.static_range(4):
            given = history + (t % slots) * 4 * n + which * n + columns
            x = tl.load(given, mask=columns < tl.where(t <= fitting, n, 0), other=0.0)
            to = state + (1 + 4 * (t - 1) + which) * n + columns
            tl.store(to, x.to(tl.int32, bitcast=True), mask=columns < n)


@triton.jit
def take_state(
    history: tl.tensor,
    state: tl.tensor,
    slots: tl.tensor,
    columns: tl.tensor,
    n: tl.tensor,
) -> Any:
    """Copies the saved potentials into the history; returns the number of iterations made."""
    made = tl.load(state)
    for t in range(1, made + 1):
        for which in tl.static_range(4):
            given = state + (1 + 4 * (t - 1) + which) * n + columns
            x = tl.load(given, mask=columns < n, other=0)
            to = history + (t % slots) * 4 * n + which * n + columns
            tl.store(to, x.to(tl.float32, bitcast=True), mask=columns < n)
    return made


# ---- the potentials ----
#
# One program per matrix, one pass over it per iteration. B = 1 image, 128 maps of N = 441, float32:
# a pass reads 128 x 441^2 x 4 = 99.6 MB, 23 us at 4.3 TB/s (a map is 778 KB, and 128 of them are
# twice an H100's L2). It takes 25 M powers of two, one per entry, and about 14 float32 operations
# each: 0.35 G, 6 us at 60 TFLOP/s, and 7 us for the powers at 16 per cycle and multiprocessor.
# Floor: 23 us per iteration; `monce` makes 3 to 6 at epsilon = 1 (predicted 70 to 140 us), a plan
# all 50 (predicted 1.2 ms).


@triton.jit
def column_potentials(
    matrix: tl.tensor,
    potentials: tl.tensor,
    stride_i: tl.tensor,
    stride_j: tl.tensor,
    n: tl.tensor,
    factor: tl.tensor,
    step_high: tl.tensor,
    step_low: tl.tensor,
    COST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """g from f with a running maximum for every column, which is safe for any range of values."""
    columns = tl.arange(0, BLOCK_N)
    tops = tl.full([BLOCK_M, BLOCK_N], FAR, tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        s = load_tile(matrix, stride_i, stride_j, rows, columns, n)
        counted = off_diagonal(rows, columns, n)
        whole, part = split_exponent(score_of(s, COST), factor, step_high, step_low)
        whole_f = tl.load(potentials + rows, mask=rows < n, other=0.0)
        part_f = tl.load(potentials + n + rows, mask=rows < n, other=0.0)
        whole = tl.where(counted, whole + whole_f[:, None], FAR)
        part += part_f[:, None]
        higher = tl.maximum(tops, whole)
        total = total * tl.exp2(tops - higher) + tl.where(
            counted, tl.exp2((whole - higher) + part), 0.0
        )
        tops = higher
    top = tl.max(tops, 0)
    sums = tl.sum(total * tl.exp2(tops - top[None, :]), 0)
    logs = tl.log2(tl.where(columns < n, sums, 1.0))
    rounded = round_to_integer(logs)
    return -(top + rounded), rounded - logs


@triton.jit
def solve_kernel(
    similarity: tl.tensor,
    potentials: tl.tensor,
    steps: tl.tensor,
    state: tl.tensor,
    stride_b: tl.tensor,
    stride_i: tl.tensor,
    stride_j: tl.tensor,
    n: tl.tensor,
    slots: tl.tensor,
    kept: tl.tensor,
    progress: tl.tensor,
    iterations: tl.tensor,
    tolerance: tl.tensor,
    factor: tl.tensor,
    step_high: tl.tensor,
    step_low: tl.tensor,
    COST: tl.constexpr,
    HAS_TOLERANCE: tl.constexpr,
    SETTLE: tl.constexpr,
    STATE: tl.constexpr,
    CONTINUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """STATE: "leave" or "take" the state of `monce`, or neither. CONTINUE: from where pass_kernel
    ended."""
    b = tl.program_id(0).to(tl.int64)
    matrix = similarity + b * stride_b
    history = potentials + b * slots * 4 * n
    columns = tl.arange(0, BLOCK_N)
    real = columns < n
    whole_g = tl.zeros([BLOCK_N], tl.float32)
    part_g = tl.zeros([BLOCK_N], tl.float32)
    for which in tl.static_range(4):
        tl.store(history + which * n + columns, whole_g, mask=real)
    tl.debug_barrier()

    t = iterations * 0
    stopped = iterations * 0
    spread = factor * 0.0 + 1.0
    left = spread
    rate = spread
    if STATE == "take":
        t = take_state(history, state + b * (1 + 4 * kept) * n, slots, columns, n)
        stopped = tl.where(t > 0, 1, 0)
    if CONTINUE:
        t = tl.load(steps + 2 * b)
        stopped = tl.load(steps + 2 * b + 1)
        spread = tl.load(progress + b * 3)
        left = tl.load(progress + b * 3 + 1)
        rate = tl.load(progress + b * 3 + 2)
        whole_g, part_g = load_potential(history, t % slots, 2, columns, n)
    while (t < iterations) & (stopped == 0):
        old = history + (t % slots).to(tl.int64) * 4 * n
        new = history + ((t + 1) % slots).to(tl.int64) * 4 * n
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        error = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(0, n, BLOCK_M, num_stages=STAGES):
            rows = start + tl.arange(0, BLOCK_M)
            s = load_tile(matrix, stride_i, stride_j, rows, columns, n)
            counted = off_diagonal(rows, columns, n)
            whole, part = split_exponent(score_of(s, COST), factor, step_high, step_low)
            whole = tl.where(counted, whole + whole_g[None, :], FAR)
            part += part_g[None, :]
            top = tl.max(whole, 1)
            terms = tl.where(counted, tl.exp2((whole - top[:, None]) + part), 0.0)
            sums = tl.sum(terms, 1)
            inside = rows < n
            sums = tl.where(inside, sums, 1.0)
            total += terms * (1.0 / sums)[:, None]  # rows beyond n have no terms
            logs = tl.log2(sums)
            rounded = round_to_integer(logs)
            whole_f = -(top + rounded)
            part_f = rounded - logs
            if HAS_TOLERANCE:
                # 2^(f - new f) is the row sum of the current plan.
                old_whole = tl.load(old + rows, mask=inside, other=0.0)
                old_part = tl.load(old + n + rows, mask=inside, other=0.0)
                ratio = tl.exp2((old_whole - whole_f) + (old_part - part_f))
                deviation = tl.abs(ratio - 1.0)
                # max() may drop a NaN, the comparison must not
                deviation = tl.where(deviation == deviation, deviation, -FAR)
                error = tl.maximum(error, tl.where(inside, deviation, 0.0))
            tl.store(new + rows, whole_f, mask=inside)
            tl.store(new + n + rows, part_f, mask=inside)
        sums = tl.where(real, tl.sum(total, 0), 1.0)
        smallest = tl.min(sums, 0)
        rest = part_g - tl.log2(sums)
        rounded = round_to_integer(rest)
        new_whole = whole_g + rounded
        new_part = rest - rounded
        tl.debug_barrier()  # f is read by other threads than those that stored it
        if smallest < TINY:
            new_whole, new_part = column_potentials(
                matrix,
                new,
                stride_i,
                stride_j,
                n,
                factor,
                step_high,
                step_low,
                COST,
                BLOCK_M,
                BLOCK_N,
            )
        new_part += 0.0 * tl.sum(tl.where(real, new_part, 0.0), 0)  # one NaN makes all of them NaN
        tl.store(new + 2 * n + columns, new_whole, mask=real)
        tl.store(new + 3 * n + columns, new_part, mask=real)

        if SETTLE:
            change = (new_whole - whole_g) + (new_part - part_g)
            highest = tl.max(tl.where(real, change, FAR), 0)
            lowest = tl.min(tl.where(real, change, -FAR), 0)
            previous = spread
            spread = (highest - lowest) * LN2
            settled, left, rate = settle(spread, previous, left, rate)
            stopped = tl.where((t > 0) & settled, 1, 0)
        whole_g = new_whole
        part_g = new_part
        t += 1
        if HAS_TOLERANCE:  # noqa: SIM102 (known when compiling)
            # The error is that of the previous iterate; the first iteration has none.
            if (t > 1) & (tl.max(error, 0) <= tolerance):
                stopped = stopped * 0 + 2
                t -= 1
    tl.store(steps + 2 * b, t)  # iterations made, then the number that their result is valid for
    tl.store(steps + 2 * b + 1, tl.where(stopped == 1, iterations, t))
    if STATE == "leave":
        leave_state(state + b * (1 + 4 * kept) * n, history, t, kept, slots, columns, n)


# Large maps: a step for each of the first iterations, with many programs per map, and all steps in
# one launch (turns.py). A program takes some rows. It first computes g from the column sums that
# the step before left in parts; every program does so for itself, in the same order. Once a map has
# settled, or a column's sum is too small, its programs do nothing; solve_kernel goes on from there.


@triton.jit(do_not_specialize=("maps", "last"))
def pass_kernel(
    counters: tl.tensor,
    similarity: tl.tensor,
    potentials: tl.tensor,
    partial: tl.tensor,
    steps: tl.tensor,
    progress: tl.tensor,
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
    COST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Computes g of iteration t - 1, then, unless t = `last`, the rows' half of iteration t.
    `partial`: the column sums of even and odd iterations, (2, B, programs, N). `progress` and
    `steps`, from which solve_kernel goes on, alternate as well, so that no program reads what
    another one writes."""
    drawn = draw(counters)
    wait(counters, drawn // (maps * programs) * (maps * programs))
    t = drawn // (maps * programs) + 1
    b = (drawn % (maps * programs) // programs).to(tl.int64)
    part_of_map = drawn % programs
    history = potentials + b * slots * 4 * n
    columns = tl.arange(0, BLOCK_N)
    real = columns < n
    old_steps = steps + ((t + 1) % 2 * maps + b) * 2
    new_steps = steps + (t % 2 * maps + b) * 2
    old_progress = progress + ((t + 1) % 2 * maps + b) * 3
    new_progress = progress + (t % 2 * maps + b) * 3

    made = t * 0
    ended = t * 0
    spread = factor * 0.0 + 1.0
    left = spread
    rate = spread
    whole_g = tl.zeros([BLOCK_N], tl.float32)
    part_g = tl.zeros([BLOCK_N], tl.float32)
    if t > 1:
        made = tl.load(old_steps)
        ended = tl.load(old_steps + 1)
        spread = tl.load(old_progress)
        left = tl.load(old_progress + 1)
        rate = tl.load(old_progress + 2)
        if ended == 0:
            sums = tl.zeros([BLOCK_N], tl.float32)
            given = partial + (((t + 1) % 2 * maps + b) * programs) * n + columns
            for other in range(0, programs):
                sums += tl.load(given + other * n, mask=real, other=0.0)
            sums = tl.where(real, sums, 1.0)
            old_whole, old_part = load_potential(history, made, 2, columns, n)
            exact = old_part - tl.log2(sums)
            rounded = round_to_integer(exact)
            whole_g = old_whole + rounded
            part_g = exact - rounded
            # One NaN makes all of them NaN.
            part_g += 0.0 * tl.sum(tl.where(real, part_g, 0.0), 0)
            change = rounded + (part_g - old_part)
            highest = tl.max(tl.where(real, change, FAR), 0)
            lowest = tl.min(tl.where(real, change, -FAR), 0)
            previous = spread
            spread = (highest - lowest) * LN2
            settled, left, rate = settle(spread, previous, left, rate)
            # 2: solve_kernel repeats this iteration
            ended = tl.where(tl.min(sums, 0) < TINY, 2, tl.where((made > 0) & settled, 1, 0))
            made = tl.where(ended == 2, made, made + 1)
    if part_of_map == 0:
        tl.store(new_steps, made)
        tl.store(new_steps + 1, tl.where(t == last, tl.where(ended == 1, 1, 0), ended))
        tl.store(new_progress, spread)
        tl.store(new_progress + 1, left)
        tl.store(new_progress + 2, rate)
        to = history + made * 4 * n + 2 * n + columns
        fresh = tl.where((made == t - 1) & (ended < 2), n, 0)
        tl.store(to, whole_g, mask=columns < fresh)
        tl.store(to + n, part_g, mask=columns < fresh)
        if t == 1:
            tl.store(history + columns, whole_g, mask=real)
            tl.store(history + n + columns, whole_g, mask=real)
    first = part_of_map * rows_of_program
    end = tl.minimum(n, first + rows_of_program)
    end = tl.where((ended == 0) & (t < last), end, first)
    matrix = similarity + b * stride_b
    new = history + t * 4 * n
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(first, end, BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        s = load_tile(matrix, stride_i, 1, rows, columns, n)
        counted = off_diagonal(rows, columns, n) & (rows[:, None] < end)
        whole, part = split_exponent(score_of(s, COST), factor, step_high, step_low)
        whole = tl.where(counted, whole + whole_g[None, :], FAR)
        part += part_g[None, :]
        top = tl.max(whole, 1)
        terms = tl.where(counted, tl.exp2((whole - top[:, None]) + part), 0.0)
        sums = tl.sum(terms, 1)
        inside = rows < end
        sums = tl.where(inside, sums, 1.0)
        total += terms * (1.0 / sums)[:, None]
        logs = tl.log2(sums)
        rounded = round_to_integer(logs)
        tl.store(new + rows, -(top + rounded), mask=inside)
        tl.store(new + n + rows, rounded - logs, mask=inside)
    if (ended == 0) & (t < last):
        to = partial + ((t % 2 * maps + b) * programs + part_of_map) * n + columns
        tl.store(to, tl.sum(total, 0), mask=real)
    leave(counters, similarity)


# ---- launches ----


def _solve_options(n: int, cost: str, extra: bool) -> dict[str, Any]:
    """Options of solve_kernel. ``extra``: whether a tolerance or a state needs registers too."""
    return pass_options(n, 4096 if extra or cost == "exp" else 8192, 2)


LARGE = 600
"""Maps of at least so many patches get several programs: one's pass takes longer than a launch."""

SHARED_REGISTERS = 168
"""With this many registers per thread three programs of 4 warps share a multiprocessor."""

PROGRAMS = 1024
"""About so many programs for all maps together, several per multiprocessor. It does not depend on
the GPU, so that sums are added in the same order on every one."""


def programs_of_map(b: int, n: int) -> int:
    return max(1, min(PROGRAMS // b, n // 16))


def _first_passes(
    similarity: Tensor, potentials: Tensor, cost: str, epsilon: float, count: int
) -> tuple[Tensor, Tensor]:
    """Makes up to ``count`` iterations of each map, with many programs; returns the state from
    which solve_kernel goes on."""
    b, n, _ = similarity.shape
    programs = programs_of_map(b, n)
    options = pass_options(n, 2048, 2) | {"maxnreg": SHARED_REGISTERS}
    partial = torch.empty((2, b, programs, n), dtype=torch.float32, device=similarity.device)
    steps = torch.empty((2, b, 2), dtype=torch.int32, device=similarity.device)
    progress = torch.empty((2, b, 3), dtype=torch.float32, device=similarity.device)
    pass_kernel[(b * programs * (count + 1),)](
        turns.counters_for(similarity),
        similarity,
        potentials,
        partial,
        steps,
        progress,
        *similarity.stride()[:2],
        n,
        potentials.shape[1],
        b,
        count + 1,
        programs,
        launch.blocks(n, programs),
        *exponent_scale(cost, epsilon),
        COST=cost,
        **options,
    )
    final = (count + 1) % 2
    return steps[final], progress[final]


def solve(
    similarity: Tensor,
    cost: str,
    epsilon: float,
    iterations: int,
    tolerance: float | None,
    keep: bool,
    *,
    settle: bool = False,
    leave: Tensor | None = None,
    take: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The potentials (B, slots, 4, N), integer and rest of f and of g after iteration t in slot
    t % slots, all of them if ``keep``, else the last two; and counts (B, 2): the iterations made,
    and the number for which their result is valid. With ``settle`` they end once further ones would
    change the plan negligibly. ``leave`` is where the state for the backward is stored; ``take`` is
    such a state, with which hardly any iteration is left to do. Needs N > 1."""
    b, n, _ = similarity.shape
    state = leave if take is None else take
    kept = 0 if state is None else (state.shape[1] - 1) // 4
    slots = iterations + 1 if keep else 2
    if leave is not None:
        slots = max(slots, kept + 2)
    potentials = torch.empty((b, slots, 4, n), dtype=torch.float32, device=similarity.device)
    steps = torch.empty((b, 2), dtype=torch.int32, device=similarity.device)
    progress = potentials
    in_passes = leave is not None and n >= LARGE and programs_of_map(b, n) > 1
    if in_passes:
        steps, progress = _first_passes(
            similarity, potentials, cost, epsilon, min(kept, iterations)
        )
    solve_kernel[(b,)](
        similarity,
        potentials,
        steps,
        steps if state is None else state,
        *similarity.stride(),
        n,
        slots,
        kept,
        progress,
        iterations,
        0.0 if tolerance is None else tolerance,
        *exponent_scale(cost, epsilon),
        COST=cost,
        HAS_TOLERANCE=tolerance is not None,
        SETTLE=settle,
        CONTINUE=in_passes,
        STATE="none" if state is None else "leave" if take is None else "take",
        **_solve_options(n, cost, tolerance is not None or state is not None),
    )
    return potentials, steps
