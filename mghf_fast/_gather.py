"""Differentiable gathering of all ranks' rows, for losses over a whole distributed batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        own = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, own)
        # Ranks may have unequal shares of an epoch's last batch, but all_gather needs equal ones.
        ctx.counts = [int(count) for count in counts]
        padded = rows.new_zeros((max(ctx.counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in ctx.counts]
        dist.all_gather(everyone, padded)
        return torch.cat([part[:n] for part, n in zip(everyone, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every rank's loss depends on these rows, so its gradient is the sum over the ranks.
        total = grad.clone()
        dist.all_reduce(total)
        return total.split(ctx.counts)[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """(P, ...) of each rank -> (sum of every P, ...), in the order of the default group's ranks.

    P may differ between the ranks; they exchange their numbers of rows first, for which the host
    waits. Returns ``rows`` itself if no process group is initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    gathered: Tensor = _GatherRows.apply(rows.contiguous())
    return gathered
