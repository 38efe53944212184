"""Histogram entropies of feature maps. See mghf_fast/reference/entropy.py for the definition.

    bin(v) = min(floor((v - min) / (max - min) * bins), bins - 1)     p = counts / (H W)
    entropy = -sum p ln p / ln(bins)

A first sweep finds each map's range, run by run of pixels, a second one counts. The bin of a value
is computed as in the reference, every operation rounded to float32, and counts are integers, so
they equal the reference's in any order. The sum over the bins is float64, as in the reference, so
that ties stay ties.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mghf_fast.backends import can_run_triton
from mghf_fast.kernels import launch
from mghf_fast.kernels.image import (
    Runs,
    layout_of,
    pixel_offsets,
    place_of,
    power_of_two,
    runs_of,
)

PROGRAMS = 2048
MOST_HISTOGRAM_BINS = 1024
"""With more bins than a program's histogram can hold, values are counted one by one in memory."""


# Smallest and largest values.
#
#     low, high (B, C) over a run; a NaN counts as infinity, so that the map's range is not finite.
#
# Floor for B = 1, C = 128, 512 x 512: reads 134 MB (float32; bfloat16 67), writes next to nothing,
# no products: 31 us at 4.3 TB/s (16 us). About 4 instructions a value: 5 us.
@triton.jit
def _range_kernel(
    x,
    lows,
    highs,
    images,
    channels,
    pixels,
    width,
    runs,
    run_pixels,
    x_batch,
    x_channel,
    x_row,
    x_column,
    X_FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b, run, c = place_of(channels, runs, BLOCK_C)
    rows = x + b * x_batch + c.to(tl.int64)[:, None] * x_channel
    infinity = float("inf")
    low = tl.full([BLOCK_C, BLOCK_P], infinity, tl.float32)
    high = tl.full([BLOCK_C, BLOCK_P], -infinity, tl.float32)
    begin = run * run_pixels
    end = tl.minimum(begin + run_pixels, pixels)
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (c < channels)[:, None] & (p < pixels)[None, :]
        offsets = pixel_offsets(p, width, x_row, x_column, X_FLAT)
        value = tl.load(rows + offsets[None, :], mask=inside, other=0).to(tl.float32)
        value = tl.where(value == value, value, infinity)
        low = tl.minimum(low, tl.where(inside, value, infinity))
        high = tl.maximum(high, tl.where(inside, value, -infinity))
    target = (run * images + b) * channels + c
    tl.store(lows + target, tl.min(low, axis=1), mask=c < channels)
    tl.store(highs + target, tl.max(high, axis=1), mask=c < channels)


@triton.jit
def bins_of(value, low, extent, bins):
    """The bins of values. A value without one (0 / 0 in a constant map, or a NaN) is put into the
    first."""
    # `/` is an approximation, which could move a value beside an edge into another bin.
    position = tl.div_rn(value - low, extent) * bins
    position = tl.where(position == position, position, 0.0)
    position = tl.minimum(tl.maximum(position, 0.0), bins - 1.0)
    return position.to(tl.int32)


@triton.jit
def _image_of(x, other, images, b, x_batch):
    """Image b of two stacks of as many images and the same strides; of one, if the other is not
    reached."""
    source = x
    if b >= images:
        source = other
    return source + b % images * x_batch


# Counts of maps that are contiguous: program = a run of a map.
#
# Floor for B = 1, C = 128, 512 x 512: reads 134 MB (67), 31 us (16 us); 33.5 M values are put into
# bins at about 100 instructions per 32 (a division, and a ballot for each bit of the bin): 0.12 ms
# on 132 SMs, which is what bounds it.
@triton.jit
def _count_maps_kernel(
    x,
    other,
    images,
    lows,
    highs,
    counts,
    channels,
    pixels,
    width,
    runs,
    run_pixels,
    bins,
    x_batch,
    x_channel,
    x_row,
    x_column,
    X_FLAT: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0)
    run = program % runs
    channel = program // runs % channels
    b = (program // runs // channels).to(tl.int64)
    row = b * channels + channel
    base = _image_of(x, other, images, b, x_batch) + channel.to(tl.int64) * x_channel
    low = tl.load(lows + row)
    extent = tl.load(highs + row) - low
    count = tl.zeros([BINS], tl.int32)
    begin = run * run_pixels
    end = tl.minimum(begin + run_pixels, pixels)
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        offsets = pixel_offsets(p, width, x_row, x_column, X_FLAT)
        value = tl.load(base + offsets, mask=p < pixels, other=0).to(tl.float32)
        count += tl.histogram(bins_of(value, low, extent, bins), BINS, mask=p < pixels)
    i = tl.arange(0, BINS)
    tl.atomic_add(counts + row * bins + i, count, mask=(i < bins) & (count > 0), sem="relaxed")


# Counts where a pixel's channels are contiguous: program = a run of the pixels of 8 channels,
# which are a whole sector of float32. The block of bins is halved three times into one vector for
# each channel. Floor as above.
@triton.jit
def _count_rows_kernel(
    x,
    other,
    images,
    lows,
    highs,
    counts,
    channels,
    pixels,
    width,
    runs,
    run_pixels,
    bins,
    x_batch,
    x_channel,
    x_row,
    x_column,
    X_FLAT: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b, run, c = place_of(channels, runs, 8)
    columns = _image_of(x, other, images, b, x_batch) + c.to(tl.int64)[None, :] * x_channel
    low = tl.load(lows + b * channels + c, mask=c < channels, other=0)
    extent = tl.load(highs + b * channels + c, mask=c < channels, other=0) - low
    count0 = tl.zeros([BINS], tl.int32)
    count1 = tl.zeros([BINS], tl.int32)
    count2 = tl.zeros([BINS], tl.int32)
    count3 = tl.zeros([BINS], tl.int32)
    count4 = tl.zeros([BINS], tl.int32)
    count5 = tl.zeros([BINS], tl.int32)
    count6 = tl.zeros([BINS], tl.int32)
    count7 = tl.zeros([BINS], tl.int32)
    begin = run * run_pixels
    end = tl.minimum(begin + run_pixels, pixels)
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        offsets = pixel_offsets(p, width, x_row, x_column, X_FLAT)
        inside = (p < pixels)[:, None] & (c < channels)[None, :]
        value = tl.load(columns + offsets[:, None], mask=inside, other=0).to(tl.float32)
        index = bins_of(value, low[None, :], extent[None, :], bins)
        even, odd = tl.split(tl.reshape(index, [BLOCK_P, 4, 2]))
        even04, even26 = tl.split(tl.reshape(even, [BLOCK_P, 2, 2]))
        odd15, odd37 = tl.split(tl.reshape(odd, [BLOCK_P, 2, 2]))
        index0, index4 = tl.split(even04)
        index2, index6 = tl.split(even26)
        index1, index5 = tl.split(odd15)
        index3, index7 = tl.split(odd37)
        count0 += tl.histogram(index0, BINS, mask=p < pixels)
        count1 += tl.histogram(index1, BINS, mask=p < pixels)
        count2 += tl.histogram(index2, BINS, mask=p < pixels)
        count3 += tl.histogram(index3, BINS, mask=p < pixels)
        count4 += tl.histogram(index4, BINS, mask=p < pixels)
        count5 += tl.histogram(index5, BINS, mask=p < pixels)
        count6 += tl.histogram(index6, BINS, mask=p < pixels)
        count7 += tl.histogram(index7, BINS, mask=p < pixels)
    first_channel = tl.program_id(0) % tl.cdiv(channels, 8) * 8
    _add_counts(counts, count0, b, channels, first_channel + 0, bins, BINS)
    _add_counts(counts, count1, b, channels, first_channel + 1, bins, BINS)
    _add_counts(counts, count2, b, channels, first_channel + 2, bins, BINS)
    _add_counts(counts, count3, b, channels, first_channel + 3, bins, BINS)
    _add_counts(counts, count4, b, channels, first_channel + 4, bins, BINS)
    _add_counts(counts, count5, b, channels, first_channel + 5, bins, BINS)
    _add_counts(counts, count6, b, channels, first_channel + 6, bins, BINS)
    _add_counts(counts, count7, b, channels, first_channel + 7, bins, BINS)


@triton.jit
def _add_counts(counts, count, b, channels, channel, bins, BINS: tl.constexpr):
    i = tl.arange(0, BINS)
    end = tl.where(channel < channels, bins, 0)
    target = counts + (b * channels + channel) * bins + i
    tl.atomic_add(target, count, mask=(i < end) & (count > 0), sem="relaxed")


# Counts in memory, for more bins than a program can hold.
#
# Floor as above, plus an atomic addition for each value: 33.5 M, about 0.3 ms.
@triton.jit
def _count_in_memory_kernel(
    x,
    other,
    images,
    lows,
    highs,
    counts,
    channels,
    pixels,
    width,
    runs,
    run_pixels,
    bins,
    x_batch,
    x_channel,
    x_row,
    x_column,
    X_FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b, run, c = place_of(channels, runs, BLOCK_C)
    rows = _image_of(x, other, images, b, x_batch) + c.to(tl.int64)[:, None] * x_channel
    low = tl.load(lows + b * channels + c, mask=c < channels, other=0)[:, None]
    extent = tl.load(highs + b * channels + c, mask=c < channels, other=0)[:, None] - low
    targets = counts + (b * channels + c)[:, None] * bins
    one = tl.full([BLOCK_C, BLOCK_P], 1, tl.int32)
    begin = run * run_pixels
    end = tl.minimum(begin + run_pixels, pixels)
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (c < channels)[:, None] & (p < pixels)[None, :]
        offsets = pixel_offsets(p, width, x_row, x_column, X_FLAT)
        value = tl.load(rows + offsets[None, :], mask=inside, other=0).to(tl.float32)
        index = bins_of(value, low, extent, bins)
        tl.atomic_add(targets + index, one, mask=inside, sem="relaxed")


# Entropies of maps from their counts; NaN where a range is not finite. One program a map.
#
# Floor: reads counts that were just written, 131 KB for C = 128 and 256 bins, under 1 us.
@triton.jit
def _entropy_kernel(counts, lows, highs, entropies, pixels, bins, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, bins, BLOCK):
        i = first + tl.arange(0, BLOCK)
        count = tl.load(counts + row * bins + i, mask=i < bins, other=0)
        p = tl.where(count > 0, count, pixels).to(tl.float64) / pixels  # 0 ln 0 = 1 ln 1 = 0
        total -= p * tl.log(p)
    entropy = tl.sum(total, axis=0) / tl.sum(tl.log(tl.zeros([1], tl.float64) + bins), axis=0)
    extent = tl.load(highs + row) - tl.load(lows + row)
    entropy = tl.where(extent - extent == 0, entropy, float("nan"))
    tl.store(entropies + row, entropy.to(entropies.dtype.element_ty))


# ---- launches ----


def _tile(by_maps: bool, channels: int) -> dict[str, Any]:
    """Block sizes of the kernels that hold a tile of channels and pixels."""
    if by_maps:
        return {"BLOCK_C": 1, "BLOCK_P": 2048}
    block = power_of_two(channels, 1, 32)
    return {"BLOCK_C": block, "BLOCK_P": 2048 // block}


def _counting(by_maps: bool, bins: int) -> dict[str, Any]:
    """Block sizes of the kernels with histograms."""
    return {"BINS": power_of_two(bins, 128, 1024), "BLOCK_P": 2048 if by_maps else 1024}


def ranges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each map, (B, C) float32. For a map with a NaN or an infinity
    at least one of the two is not finite."""
    batch, channels, height, width = x.shape
    layout, pixels = layout_of(x), height * width
    tile = _tile(layout.by_maps, channels)
    others = batch * launch.blocks(channels, tile["BLOCK_C"])
    runs = runs_of(pixels, tile["BLOCK_P"], others, PROGRAMS)
    partial = torch.empty(2, runs.number, batch, channels, dtype=torch.float32, device=x.device)
    _range_kernel[(others * runs.number,)](
        x,
        partial[0],
        partial[1],
        batch,
        channels,
        pixels,
        width,
        runs.number,
        runs.size,
        *layout.strides,
        X_FLAT=layout.flat,
        **tile,
        num_warps=4,
        num_stages=2,
    )
    return partial[0].amin(0), partial[1].amax(0)


def counts_of(
    x: Tensor, low: Tensor, high: Tensor, bins: int, counts: Tensor, other: Tensor | None = None
) -> None:
    """Adds each map's histogram over [low, high] to ``counts``, (B, C, bins) int32. ``low`` and
    ``high`` are contiguous, one number per map. With ``other``, of the shape, dtype and strides of
    ``x``, all three hold the numbers of both, (2, B, C) and (2, B, C, bins)."""
    batch, channels, height, width = x.shape
    layout, pixels = layout_of(x), height * width
    images = batch if other is None else 2 * batch
    options: dict[str, Any]
    if bins > MOST_HISTOGRAM_BINS:
        kernel, options = _count_in_memory_kernel, _tile(layout.by_maps, channels)
        others = images * launch.blocks(channels, options["BLOCK_C"])
    else:
        options = _counting(layout.by_maps, bins)
        kernel = _count_maps_kernel if layout.by_maps else _count_rows_kernel
        others = images * (channels if layout.by_maps else launch.blocks(channels, 8))
    runs: Runs = runs_of(pixels, options["BLOCK_P"], others, PROGRAMS)
    kernel[(others * runs.number,)](
        x,
        x if other is None else other,
        batch,
        low,
        high,
        counts,
        channels,
        pixels,
        width,
        runs.number,
        runs.size,
        bins,
        *layout.strides,
        X_FLAT=layout.flat,
        **options,
        num_warps=4,
        num_stages=2,
    )


def entropies_of(
    counts: Tensor, low: Tensor, high: Tensor, pixels: int, dtype: torch.dtype
) -> Tensor:
    """(..., bins) -> (...), all contiguous. ``dtype`` is float64 where entropies are compared."""
    bins = counts.shape[-1]
    entropy = counts.new_empty(counts.shape[:-1], dtype=dtype)
    _entropy_kernel[(entropy.numel(),)](
        counts,
        low,
        high,
        entropy,
        pixels,
        bins,
        BLOCK=power_of_two(bins, 32, 256),
        num_warps=1,
        num_stages=1,
    )
    return entropy


def forward(x: Tensor, bins: int) -> Tensor:
    """(B, C, H, W) -> (B, C) float32."""
    with launch.on_device_of(x):
        low, high = ranges(x)
        counts = torch.zeros(*x.shape[:2], bins, dtype=torch.int32, device=x.device)
        counts_of(x, low, high, bins, counts)
        return entropies_of(counts, low, high, x.shape[2] * x.shape[3], torch.float32)


can_run = can_run_triton
