"""Steps of which each reads what other programs wrote in the one before, as a single launch.

Every program draws a number when it starts, and numbers are given to the steps in order. It then
waits until all programs of the steps before its own have left. Those have smaller numbers, so they
run already or have ended, and none of them waits for a later one: the waiting ends in whatever
order a GPU starts programs, and however few it has room for.

    drawn = draw(counters)
    wait(counters, drawn // programs_of_a_step * programs_of_a_step)
    ... step drawn // programs_of_a_step ...
    leave(counters, result)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PROGRAMS = 1 << 30
LEFT = tl.constexpr(32)
"""The counter of the programs that have left. The other one, 0, is the next program's number; they
are in different sectors of memory."""
LOST = tl.constexpr(1 << 30)
MOST_POLLS = tl.constexpr(1 << 23)
"""So often a program looks, some seconds long, before it gives up."""


def counters_for(tensor: Tensor) -> Tensor:
    """The counters of one launch on the tensor's device: zeros, which is one launch more."""
    return torch.zeros(2 * LEFT.value, dtype=torch.int32, device=tensor.device)


@triton.jit
def draw(counters: tl.tensor) -> Any:
    return tl.atomic_add(counters, 1, sem="relaxed")


@triton.jit
def wait(counters: tl.tensor, count: tl.tensor) -> None:
    """Waits until ``count`` programs have left, or one gives up."""
    left = count * 0
    polls = count * 0
    while (left < count) & (polls < MOST_POLLS):
        left = tl.load(counters + LEFT, volatile=True)
        polls += 1
    # Sees what the others wrote, and is the same for all threads.
    left = tl.atomic_add(counters + LEFT, 0, sem="acquire")
    if left < count:
        tl.atomic_max(counters + LEFT, LOST)


@triton.jit
def leave(counters: tl.tensor, result: tl.tensor) -> None:
    """Ends a program. If one has given up, the first element of the result is NaN: a fault then
    shows there, and not in a launch that never ends."""
    tl.debug_barrier()  # all threads have written
    left = tl.atomic_add(counters + LEFT, 1, sem="acq_rel")
    tl.store(result, float("nan"), mask=left >= LOST)
