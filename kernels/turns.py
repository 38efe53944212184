"""Steps of which each reads what other programs wrote in the one before, as a single launch.

Every program draws a number when it starts, and numbers are given to the steps in order. It then
waits until all programs of the steps before its own have left. Those have smaller numbers, so they
run already or have ended, and none of them waits for a later one: the waiting ends in whatever
order a GPU starts programs, and however few it has room for.

    drawn = draw(counters)
    wait(counters, drawn // programs_of_a_step * programs_of_a_step)
    ... step drawn // programs_of_a_step ...
    leave(counters, result)

The last program to leave sets the counters back to zero for the next launch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The counters, in different sectors of memory: the next program's number is the first.
LEFT = tl.constexpr(32)
"""How many programs have left."""
LOST = tl.constexpr(64)
"""Whether a program has given up."""
COUNTERS = 96
MOST_POLLS = tl.constexpr(1 << 23)
"""So often a program looks, some seconds long, before it gives up."""


def counters_for(tensor: Tensor) -> Tensor:
    """Zeros on the tensor's device for the next launch on its current stream: those of the stream,
    whose launches follow each other, or in a CUDA graph new ones."""
    if not tensor.is_cuda:
        return _counters(tensor.device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _counters.__wrapped__(tensor.device, 0)
    return _counters(tensor.device, torch.cuda.current_stream(tensor.device).cuda_stream)


@functools.cache
def _counters(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def draw(counters: tl.tensor) -> Any:
    return tl.atomic_add(counters, 1, sem="relaxed")


@triton.jit
def wait(counters: tl.tensor, count: tl.tensor) -> None:
    """Waits until ``count`` programs have left, or one gives up."""
    left = count * 0
    polls = tl.load(counters + LOST, volatile=True) * MOST_POLLS
    while (left < count) & (polls < MOST_POLLS):
        left = tl.load(counters + LEFT, volatile=True)
        polls += 1
    # Sees what the others wrote, and is the same for all threads.
    left = tl.atomic_add(counters + LEFT, 0, sem="acquire")
    if left < count:
        tl.atomic_max(counters + LOST, 1)


@triton.jit
def leave(counters: tl.tensor, result: tl.tensor) -> None:
    """Ends a program. If one has given up, the first element of the result is NaN: a fault then
    shows there, and not in a launch that never ends."""
    tl.debug_barrier()  # all threads have written
    left = tl.atomic_add(counters + LEFT, 1, sem="acq_rel") + 1
    if left == tl.num_programs(0):
        lost = tl.load(counters + LOST, volatile=True)
        tl.store(result, float("nan"), mask=lost != 0)
        tl.store(counters, 0)
        tl.store(counters + LEFT, 0)
        tl.store(counters + LOST, 0)
