"""How the kernels see images, (B, C, H, W) of any strides: C rows of pixels, 0 to H W - 1."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mghf_fast.kernels import launch


class Layout(NamedTuple):
    """Strides, in elements, as kernels take them."""

    batch: int
    channel: int
    row: int
    column: int
    flat: bool
    """Whether pixel p lies at p * column, which spares a division per pixel."""

    @property
    def strides(self) -> tuple[int, int, int, int]:
        return self.batch, self.channel, self.row, self.column

    @property
    def by_maps(self) -> bool:
        """Whether a map's pixels lie side by side, and not a pixel's channels."""
        return self.channel != 1 or self.column == 1


def layout_of(x: Tensor) -> Layout:
    batch, channel, row, column = x.stride()
    height, width = x.shape[2:]
    if width == 1:
        return Layout(batch, channel, row, row, True)
    return Layout(batch, channel, row, column, height == 1 or row == width * column)


def power_of_two(count: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``count``, between two powers of two."""
    return max(least, min(most, int(triton.next_power_of_2(count))))


class Runs(NamedTuple):
    """An image's pixels cut into ``number`` runs of ``size``, the last maybe shorter. ``size`` is a
    multiple of the block of pixels, so only the image's last block is partly empty."""

    size: int
    number: int


MOST_RUNS = 512
LEAST_BLOCKS = 4  # per run; with fewer, storing its partial results costs more than computing them


def runs_of(pixels: int, block: int, others: int, programs: int) -> Runs:
    """Runs of whole blocks of pixels, about ``programs`` / ``others`` of them. The number depends
    on the shape alone, so results are the same bits on every GPU."""
    wanted = min(launch.blocks(programs, others), MOST_RUNS)
    size = block * max(launch.blocks(launch.blocks(pixels, wanted), block), LEAST_BLOCKS)
    return Runs(size, launch.blocks(pixels, size))


@triton.jit
def pixel_offsets(p, width, row, column, FLAT: tl.constexpr):
    """Offsets of pixels within a map."""
    if FLAT:
        offsets = p.to(tl.int64) * column
    else:
        offsets = (p // width).to(tl.int64) * row + (p % width).to(tl.int64) * column
    return offsets


@triton.jit
def place_of(channels, runs, BLOCK_C: tl.constexpr):
    """Image, run and channels of this program. The channel blocks of a run are consecutive
    programs, because they may share cache lines."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    run = program // blocks % runs
    b = (program // blocks // runs).to(tl.int64)
    return b, run, c
