"""Argument checks of the public functions. Every message names the argument, what came and what is
allowed; types raise `TypeError`, values `ValueError`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, x: Any, shape: str) -> None:
    """A floating-point tensor with the dimensions that ``shape`` spells, as in "(B, C, H, W)", and
    no empty one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must be on the same device, got {x.device} and {other.device}"
        )


def check_pair(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Equal shapes, devices and, outside autocast (which unifies them), types."""
    if x.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape, "
            f"got {tuple(x.shape)} and {tuple(other.shape)}"
        )
    check_device(name, x, other_name, other)
    if x.dtype != other.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{name} and {other_name} must have the same dtype, got {x.dtype} and {other.dtype}"
        )


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {bounds}, got {value}")


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """A finite real number; with ``positive``, above zero."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    # Comparisons and not math.isfinite, which torch.compile(dynamic=True) cannot trace; NaN fails.
    if not (-math.inf < value < math.inf) or (positive and value <= 0):
        kind = "finite and above 0" if positive else "finite"
        raise ValueError(f"{name} must be {kind}, got {value}")


def check_even_channels(name: str, channels: int) -> None:
    if channels % 2 or channels < 2:
        raise ValueError(f"{name} must have an even number of channels, 2 or more, got {channels}")
