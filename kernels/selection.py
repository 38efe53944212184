"""The last steps of the content-style terms: which maps are kept and with which weights, and the
terms, from the statistics of the maps and the products of the kept ones.

    I = 1 - (H(G) + H(S)) / 2,   w = (1 + alpha I)^gamma
    naive = mean over all maps of mean D^2
    mse = mean over the kept of w^2 mean D^2,   correlation = mean over the kept of 1 - rho
    difference_ij = w_i w_j (P_ij + P_ji) / (2 M n),   gram = sum difference^2 / M

Sums are taken in float64, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mghf_fast.kernels import launch
from mghf_fast.kernels.image import power_of_two


@triton.jit
def _power(base, exponent, KIND: tl.constexpr):
    """base^exponent as pow has it: 1 for the exponent 0, and NaN for a negative base unless the
    exponent is an integer."""
    power = tl.exp(exponent * tl.log(tl.abs(base)))
    if KIND == "zero":
        power = tl.full(base.shape, 1.0, tl.float64)
    elif KIND == "odd":
        power = tl.where(base < 0, -power, power)
    elif KIND == "fraction":
        power = tl.where(base < 0, float("nan"), power)
    return power


@triton.jit
def _importance(entropies, c, images, channels):
    """The importance in float64, and in float32 for comparisons, in which values that differ only
    by rounding are equal. A NaN counts as the largest."""
    h = tl.load(entropies + c, mask=c < channels, other=0)
    h += tl.load(entropies + images * channels + c, mask=c < channels, other=0)
    importance = 1 - h / 2
    compared = importance.to(tl.float32)
    return importance, tl.where(compared == compared, compared, float("inf"))


# The kept maps by rank, with their weights and moments, and three of the terms. One program per
# image. A map's rank is the number of maps before it: C^2 comparisons, 16,384 for C = 128.
#
# Floor: reads and writes some KB; a few us, most of them latency.
@triton.jit
def _select_kernel(
    entropies,
    statistics,
    naive,
    mse,
    correlation,
    kept,
    weights,
    moments,
    alpha,
    gamma,
    images,
    channels,
    maps,
    STATISTICS: tl.constexpr,
    MOMENTS: tl.constexpr,
    DISTANCE: tl.constexpr,
    SQUARE: tl.constexpr,
    EXPONENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    entropies += b * channels
    c = tl.arange(0, BLOCK)
    importance, mine = _importance(entropies, c, images, channels)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, channels, BLOCK_OTHERS):
        other = first + tl.arange(0, BLOCK_OTHERS)
        _, theirs = _importance(entropies, other, images, channels)
        before = theirs[None, :] > mine[:, None]
        before |= (theirs[None, :] == mine[:, None]) & (other[None, :] < c[:, None])
        rank += tl.sum((before & (other < channels)[None, :]).to(tl.int32), axis=1)
    inside = c < channels
    chosen = inside & (rank < maps)
    weight = _power(1 + alpha * importance, gamma, EXPONENT)
    weight = weight.to(tl.float32)  # as the backward reads it
    target = b * maps + rank
    tl.store(kept + target, c.to(tl.int64), mask=chosen)
    tl.store(weights + target, weight, mask=chosen)
    source = statistics + b * STATISTICS * channels + c
    for row in tl.static_range(MOMENTS):
        moment = tl.load(source + row * channels, mask=chosen, other=0)
        tl.store(moments + (b * MOMENTS + row) * maps + rank, moment.to(tl.float32), mask=chosen)
    square = tl.load(source + SQUARE * channels, mask=inside, other=0)
    distance = tl.load(source + DISTANCE * channels, mask=chosen, other=0)
    weighted = tl.where(chosen, weight.to(tl.float64) * weight * square, 0.0)
    tl.store(naive + b, (tl.sum(square, axis=0) / channels).to(tl.float32))
    tl.store(mse + b, (tl.sum(weighted, axis=0) / maps).to(tl.float32))
    tl.store(correlation + b, (tl.sum(distance, axis=0) / maps).to(tl.float32))


# A tile of Gram's difference from the runs' products P, and the sum of its squares. An image's last
# program, by its ticket, adds up those of all.
#
# Floor for B = 1, M = 64 and 256 runs: reads 4.2 MB twice, 2 us.
@triton.jit
def _difference_kernel(
    partial,
    weights,
    difference,
    squares,
    tickets,
    gram,
    maps,
    runs,
    pixels,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(maps, BLOCK)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    j = program // blocks % blocks * BLOCK + tl.arange(0, BLOCK)
    b = (program // blocks // blocks).to(tl.int64)
    inside = (i < maps)[:, None] & (j < maps)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK, BLOCK], tl.float64)
    for first in range(0, runs, BLOCK_R):
        run = first + tl.arange(0, BLOCK_R)
        known = (run < runs)[:, None, None] & inside[None, :, :]
        source = partial + ((b * runs + run) * maps * maps)[:, None, None]
        at = (i[:, None] * maps + j[None, :])[None, :, :]
        total += tl.load(source + at, mask=known, other=0).to(tl.float64)
        at = (j[None, :] * maps + i[:, None])[None, :, :]
        total += tl.load(source + at, mask=known, other=0).to(tl.float64)
    of_i = tl.load(weights + b * maps + i, mask=i < maps, other=0).to(tl.float64)
    of_j = tl.load(weights + b * maps + j, mask=j < maps, other=0).to(tl.float64)
    scale = tl.zeros([BLOCK], tl.float64) + 2 * maps
    value = tl.sum(total, axis=0) / (scale * pixels)[:, None] * of_i[:, None] * of_j[None, :]
    tl.store(difference + (b * maps + i[:, None]) * maps + j[None, :], value.to(tl.float32), inside)
    square = tl.sum(tl.sum(tl.where(inside, value * value, 0.0), axis=1), axis=0)
    tl.store(squares + program, (square / maps).to(tl.float32))
    tl.debug_barrier()
    if tl.atomic_add(tickets + b, 1, sem="acq_rel") == blocks * blocks - 1:
        total_squares = tl.zeros([BLOCK_S], tl.float32)
        for first in range(0, blocks * blocks, BLOCK_S):
            k = first + tl.arange(0, BLOCK_S)
            source = squares + b * blocks * blocks + k
            total_squares += tl.load(source, mask=k < blocks * blocks, other=0)
        tl.store(gram + b, tl.sum(total_squares, axis=0))


# ---- launches ----

DIFFERENCE_BLOCKS = {"BLOCK": 8, "BLOCK_R": 16, "BLOCK_S": 128}


def _kind(exponent: float) -> str:
    if exponent == 0:
        return "zero"
    return {0.0: "even", 1.0: "odd"}.get(exponent % 2, "fraction")


def select(
    entropies: Tensor,
    statistics: Tensor,
    top_m: int,
    alpha: float,
    gamma: float,
    *,
    moments: int,
    distance: int,
    square: int,
) -> tuple[Tensor, ...]:
    """naive, mse, correlation, (B,); kept, weights, (B, M); moments, (B, rows, M). From entropies
    (2, B, C) and statistics (B, rows, C), both float64, of which ``moments`` rows are kept and
    ``distance`` and ``square`` are row numbers."""
    _, images, channels = entropies.shape
    of_terms = [statistics.new_empty(images, dtype=torch.float32) for _ in range(3)]
    kept = statistics.new_empty(images, top_m, dtype=torch.int64)
    weights = statistics.new_empty(images, top_m, dtype=torch.float32)
    of_kept = statistics.new_empty(images, moments, top_m, dtype=torch.float32)
    block = power_of_two(channels, 16, 1 << 30)
    _select_kernel[(images,)](
        entropies,
        statistics,
        *of_terms,
        kept,
        weights,
        of_kept,
        alpha,
        gamma,
        images,
        channels,
        top_m,
        STATISTICS=statistics.shape[1],
        MOMENTS=moments,
        DISTANCE=distance,
        SQUARE=square,
        EXPONENT=_kind(gamma),
        BLOCK=block,
        BLOCK_OTHERS=max(1, 8192 // block),
        num_warps=8,
        num_stages=1,
    )
    return *of_terms, kept, weights, of_kept


def gram_difference(
    partial: Tensor, weights: Tensor, pixels: int, tickets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gram(w S) - Gram(w G), (B, M, M), and the term, (B,), from the runs' products
    (B, runs, M, M). ``tickets`` are zeros, (B,) int32."""
    images, runs, maps, _ = partial.shape
    blocks = launch.blocks(maps, DIFFERENCE_BLOCKS["BLOCK"])
    difference = partial.new_empty(images, maps, maps)
    squares = partial.new_empty(images, blocks * blocks)
    gram = partial.new_empty(images)
    _difference_kernel[(squares.numel(),)](
        partial,
        weights,
        difference,
        squares,
        tickets,
        gram,
        maps,
        runs,
        pixels,
        **DIFFERENCE_BLOCKS,
        num_warps=4,
        num_stages=1,
    )
    return difference, gram
