"""DECLoss in Triton. See mghf_fast/reference/dec.py for the mathematics.

With unit patches s, g and E = exp(./t) the loss needs, for every row i, the sums over its positives
and its negatives j of E(<s_i, s_j>) + 2 E(<g_i, s_j>). The pairs are visited tile by tile and never
stored. A program takes a block of rows and one of a few runs of columns; the runs are added in
order afterwards.

Thresholds. A pair is positive if the float32 sum of (G_id - G_jd)^2 is at most `limit`. First this
is computed as |G_i|^2 + |G_j|^2 - 2 <G_i, G_j>; a tile with a pair that this leaves within its
rounding error of the limit computes the sum of differences.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from mghf_fast.backends import can_run_triton
from mghf_fast.kernels.dec_kernels import (
    backward_kernel,
    factor_kernel,
    forward_kernel,
    loss_kernel,
    pack_kernel,
    project_kernel,
    row_kernel,
)
from mghf_fast.kernels.launch import blocks, on_device_of
from mghf_fast.ops.limits import temperature_too_low

# ---- options ----


@functools.cache
def _largest_positive(threshold_db: float, rmse: bool, max_value: float, depth: int) -> float:
    """The largest float32 squared distance at which a pair is positive by the reference's formula,
    evaluated in float32 step by step; below 0 if there is none."""
    threshold, peak = np.float32(threshold_db), np.float32(max_value)
    divisor = np.float32(math.sqrt(depth) if rmse else 1)

    def positive(bits: int) -> bool:
        with np.errstate(all="ignore"):
            distance = np.sqrt(np.uint32(bits).view(np.float32)) / divisor
            return bool(np.float32(-20) * np.log10(distance / peak) >= threshold)

    yes, no = 0, 0x7F800000  # infinity's bits
    if not positive(yes):
        return -1.0
    while no - yes > 1:  # positive floats are ordered as their bits are
        middle = (yes + no) // 2
        yes, no = (middle, no) if positive(middle) else (yes, middle)
    return float(np.uint32(yes).view(np.float32))


def _float32(x: float) -> float:
    """x, or infinity if it is beyond float32's range, because launches refuse such numbers."""
    return math.copysign(math.inf, x) if abs(x) > torch.finfo(torch.float32).max else x


@dataclass(frozen=True)
class _Options:
    threshold_db: float
    positive_temperature: float
    negative_temperature: float
    temperature: str
    similarity: str
    max_value: float
    norm_floor: float

    @property
    def inside(self) -> bool:
        return self.temperature == "inside"

    def exponents(self) -> tuple[float, float]:
        """log2(e) / t for positives and negatives, by which a cosine is multiplied for a power of
        2. Bounded to stay finite; e^1e30 and e^-1e30 are infinity and 0 all the same."""
        temperatures = (self.positive_temperature, self.negative_temperature)
        positive, negative = (
            min(math.log2(math.e) / (t if self.inside else 1), 1e30) for t in temperatures
        )
        return positive, negative

    def limits(self, depth: int) -> tuple[float, float, float, float]:
        """limit, positive_below, negative_above, margin."""
        limit = _largest_positive(
            self.threshold_db, self.similarity == "rmse", self.max_value, depth
        )
        roundoff = 2.0**-24
        # The sum of differences is within (D + 4) roundoffs of the exact distance (twice that, for
        # the roundings here), and may lose squares below float32's normal range.
        own = 2 * (depth + 4) * roundoff
        tiny = depth * 1e-37
        # tf32x3 leaves out products below 2^-20 of the whole ones, and tensor cores truncate where
        # they add; |G_i|^2 + |G_j|^2 bounds 2 <G_i, G_j> and all that adds up to it.
        margin = 5 * (depth + 32) * roundoff
        below = _float32(limit * (1 - own) - tiny)
        above = _float32(limit * (1 + own) + tiny)
        if own >= 0.25 or margin >= 0.25 or above == math.inf:  # only the differences can decide
            return limit, -math.inf, math.inf, margin
        return limit, below, above, margin


# ---- block sizes ----

FORWARD_BLOCKS = {"BLOCK_I": 64, "BLOCK_J": 64, "BLOCK_K": 16}
BACKWARD_BLOCKS = {"BLOCK_I": 32, "BLOCK_J": 16, "BLOCK_K": 16}
PACK = {"num_warps": 4, "num_stages": 2}
FORWARD = {"num_warps": 8, "num_stages": 3}
BACKWARD = {"num_warps": 8, "num_stages": 2}
PROJECT = {"num_warps": 4, "num_stages": 2}
ROWS = {"BLOCK": 128, "num_warps": 4, "num_stages": 2}
ALL_ROWS = {"BLOCK": 1024, "num_warps": 4, "num_stages": 2}

_MULTIPLE = 64  # patches are padded to a multiple of this, which every BLOCK_I and BLOCK_J divides
_PROGRAMS = 512  # in a grid: enough to fill a GPU


def _padded_depth(depth: int) -> int:
    return blocks(depth, 32) * 32


def _depth_constants(depth: int) -> dict[str, Any]:
    return {"DEPTH": depth, "PADDED": _padded_depth(depth)}


def _pack_constants(depth: int) -> dict[str, Any]:
    return _depth_constants(depth) | {"BLOCK_P": 16, "BLOCK_K": 32}


def _forward_constants(depth: int) -> dict[str, Any]:
    return _depth_constants(depth) | FORWARD_BLOCKS


def _backward_constants(depth: int) -> dict[str, Any]:
    block = min(int(triton.next_power_of_2(_padded_depth(depth))), 256)
    return _depth_constants(depth) | BACKWARD_BLOCKS | {"BLOCK_D": block}


def _project_constants(depth: int) -> dict[str, Any]:
    block = max(16, int(triton.next_power_of_2(depth)))
    return _depth_constants(depth) | {"BLOCK_P": max(1, min(16, 4096 // block)), "BLOCK_D": block}


def _runs(padded_patches: int, block_i: int, block_j: int) -> tuple[int, int]:
    """The number of columns in a run, and of runs."""
    tiles = blocks(padded_patches, block_j)
    splits = max(1, min(tiles, _PROGRAMS // blocks(padded_patches, block_i)))
    run = blocks(tiles, splits)
    return run * block_j, blocks(tiles, run)


# ---- launches ----


class _Packed:
    """The patches, padded and normalised for the products."""

    def __init__(self, sr: Tensor, gt: Tensor, norm_floor: float) -> None:
        self.patches, self.depth = sr.shape
        self.padded_patches = blocks(self.patches, _MULTIPLE) * _MULTIPLE
        constants = _pack_constants(self.depth)
        shape = (self.padded_patches, constants["PADDED"])
        self.unit = sr.new_empty(shape, dtype=torch.float32)
        self.patch = torch.empty_like(self.unit)
        vectors = sr.new_empty((3, self.padded_patches), dtype=torch.float32)
        self.norm, self.inverse, self.squared = vectors
        pack_kernel[(blocks(self.padded_patches, constants["BLOCK_P"]),)](
            sr,
            gt,
            self.unit,
            self.patch,
            self.norm,
            self.inverse,
            self.squared,
            self.patches,
            *sr.stride(),
            *gt.stride(),
            norm_floor,
            **constants,
            **PACK,
        )
        self.values = self.patch.t().contiguous()


def forward(
    sr: Tensor,
    gt: Tensor,
    threshold_db: float,
    positive_temperature: float,
    negative_temperature: float,
    temperature: str,
    similarity: str,
    max_value: float,
    norm_floor: float,
) -> tuple[Tensor, Tensor]:
    """The loss, and for every row the sums of exp(cos(S_i, S_j)/t) + 2 exp(cos(G_i, S_j)/t) over
    its positives and its negatives, (2, P), the latter -1 where it has none. With the temperature
    outside, exp(cos) takes the place of exp(cos/t)."""
    temperatures = (positive_temperature, negative_temperature, temperature)
    o = _Options(threshold_db, *temperatures, similarity, max_value, norm_floor)
    if sr.numel() == 0:
        return sr.new_zeros((), dtype=torch.float32), sr.new_zeros(
            (2, sr.shape[0]), dtype=torch.float32
        )
    with on_device_of(sr):
        p = _Packed(sr, gt, o.norm_floor)
        constants = _forward_constants(p.depth)
        run, splits = _runs(p.padded_patches, constants["BLOCK_I"], constants["BLOCK_J"])
        partial = p.unit.new_empty((splits, 2, p.padded_patches))
        any_negative = p.unit.new_empty((splits, p.padded_patches), dtype=torch.int32)
        forward_kernel[(blocks(p.padded_patches, constants["BLOCK_I"]), splits)](
            p.unit,
            p.patch,
            p.values,
            p.inverse,
            p.squared,
            partial,
            any_negative,
            p.patches,
            p.padded_patches,
            run,
            *o.exponents(),
            *o.limits(p.depth),
            **constants,
            **FORWARD,
        )
        # 1 / t outside the exponentials
        offset = 0.0 if o.inside else math.log(o.negative_temperature / o.positive_temperature)
        loss = p.unit.new_empty(())
        statistics = p.unit.new_empty((2, p.patches))
        ratios = p.unit.new_empty(p.patches, dtype=torch.float64)
        row_kernel[(blocks(p.patches, ROWS["BLOCK"]),)](
            partial,
            any_negative,
            statistics,
            ratios,
            p.patches,
            p.padded_patches,
            splits,
            offset,
            **ROWS,
        )
        loss_kernel[(1,)](ratios, statistics, loss, p.patches, **ALL_ROWS)
    return loss, statistics


def backward(
    grad: Tensor,
    sr: Tensor,
    gt: Tensor,
    statistics: Tensor,
    threshold_db: float,
    positive_temperature: float,
    negative_temperature: float,
    temperature: str,
    similarity: str,
    max_value: float,
    norm_floor: float,
) -> Tensor:
    """The gradient of sr, contiguous."""
    temperatures = (positive_temperature, negative_temperature, temperature)
    o = _Options(threshold_db, *temperatures, similarity, max_value, norm_floor)
    grad_sr = torch.empty_like(sr, memory_format=torch.contiguous_format)
    if sr.numel() == 0:
        return grad_sr
    with on_device_of(sr):
        p = _Packed(sr, gt, o.norm_floor)
        factors = p.unit.new_empty((2, p.padded_patches))
        factor_kernel[(blocks(p.padded_patches, ALL_ROWS["BLOCK"]),)](
            grad,
            statistics.contiguous(),
            factors,
            1 / o.positive_temperature if o.inside else 1.0,
            1 / o.negative_temperature if o.inside else 1.0,
            p.patches,
            p.padded_patches,
            **ALL_ROWS,
        )
        constants = _backward_constants(p.depth)
        run, splits = _runs(p.padded_patches, constants["BLOCK_I"], constants["BLOCK_J"])
        partial = p.unit.new_empty((splits, *p.unit.shape))
        grid = (
            blocks(p.padded_patches, constants["BLOCK_I"]),
            splits,
            blocks(constants["PADDED"], constants["BLOCK_D"]),
        )
        backward_kernel[grid](
            p.unit,
            p.patch,
            p.values,
            p.inverse,
            p.squared,
            factors[0],
            factors[1],
            partial,
            p.patches,
            p.padded_patches,
            run,
            *o.exponents(),
            *o.limits(p.depth),
            **constants,
            **BACKWARD,
        )
        constants = _project_constants(p.depth)
        project_kernel[(blocks(p.patches, constants["BLOCK_P"]),)](
            partial,
            p.unit,
            p.norm,
            grad_sr,
            p.patches,
            p.padded_patches,
            splits,
            o.norm_floor,
            **constants,
            **PROJECT,
        )
    return grad_sr


def can_run(
    *tensors: Tensor, temperatures: tuple[float, float, str] = (1, 1, ""), **options: Any
) -> str | None:
    return temperature_too_low(temperatures) or can_run_triton(*tensors)
