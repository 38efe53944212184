"""Limits shared by several backends' kernels: each function returns why they can't run, or None."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .vocabulary import LEAST_TEMPERATURE


def only_bottleneck(subnet: str) -> str | None:
    if subnet == "bottleneck":
        return None
    return f"its kernels are made for subnet 'bottleneck', and this block's is {subnet!r}"


def block_channels(tensors: Sequence[Tensor]) -> int:
    """Channels of the block whose weights are among the tensors, or 0: the mix's bias is the only
    vector among them and has one entry per channel."""
    return max((t.shape[0] for t in tensors if t.dim() == 1), default=0)


def only_channel_gram(gram: str) -> str | None:
    return "it has kernels for gram='channel' only" if gram == "map" else None


def temperature_too_low(temperatures: tuple[float, float, str]) -> str | None:
    """Checks `dec`'s temperatures: the positives', the negatives', and "inside" or "outside"."""
    *values, place = temperatures
    if place == "inside" and (least := min(values)) < LEAST_TEMPERATURE:
        return (
            f"its kernels' sums could overflow for temperatures below {LEAST_TEMPERATURE}, and "
            f"one is {least:g}"
        )
    return None
