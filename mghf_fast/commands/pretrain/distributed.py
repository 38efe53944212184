"""The processes of one training: those started by ``torchrun``, or a single one without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .settings import PretrainError


class Ranks:
    """This process among ``world``, and their communication."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in order of rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The value of the first rank."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values


def world_size() -> int:
    """Number of processes that ``torchrun`` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def started(device: torch.device) -> Iterator[Ranks]:
    """Joins the processes that ``torchrun`` started, if it did, and leaves them at the end."""
    if (world := world_size()) == 1:
        yield Ranks()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()


def differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The names whose values differ between two descriptions, with both values; ``None`` if one is
    missing."""
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            yield name, one.get(name), other.get(name)


def check_agreement(ranks: Ranks, description: dict[str, Any]) -> None:
    """Checks that every rank has the same configuration and data.

    Raises:
        PretrainError: on every rank, if one differs from the first.
    """
    first, *others = ranks.gather(description)
    for rank, other in enumerate(others, start=1):
        if different := list(differences(first, other)):
            told = "; ".join(f"{name} is {b}, on rank 0 {a}" for name, a, b in different)
            raise PretrainError(f"rank {rank} differs from rank 0: {told}")
