"""Random numbers for the tests: drawn on the CPU and moved, so that they are the same on every
device, and a test that fails on a GPU can be repeated with the emulated CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Size = int | Sequence[int]
Module = TypeVar("Module", bound=nn.Module)


def _moved(function: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    requires_grad = options.pop("requires_grad", False)
    drawn = function(*arguments, device="cpu", **options)
    return drawn.to(torch.get_default_device()).requires_grad_(requires_grad)


def randn(*size: Size, **options: Any) -> Tensor:
    """``torch.randn`` on the default device, but from the CPU's generator."""
    return _moved(torch.randn, *size, **options)


def rand(*size: Size, **options: Any) -> Tensor:
    return _moved(torch.rand, *size, **options)


def randint(*arguments: Any, **options: Any) -> Tensor:
    return _moved(torch.randint, *arguments, **options)


def randperm(n: int, **options: Any) -> Tensor:
    return _moved(torch.randperm, n, **options)


def randn_like(x: Tensor, **options: Any) -> Tensor:
    """``torch.randn_like``: with the strides and on the device of ``x``."""
    return torch.randn_like(x, device="cpu", **options).to(x.device)


def rand_like(x: Tensor, **options: Any) -> Tensor:
    return torch.rand_like(x, device="cpu", **options).to(x.device)


def module(make: Callable[[], Module]) -> Module:
    """A module with parameters drawn on the CPU."""
    with torch.device("cpu"):
        made = make()
    return made.to(torch.get_default_device())
