"""The layouts of image-shaped results, the same in the fakes and in every backend."""

from __future__ import annotations

import torch
from torch import Tensor


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def laid_out_as(x: Tensor, result: Tensor) -> Tensor:
    """``result`` in the layout that the fakes give: channels_last if ``x`` is, else contiguous."""
    return result.contiguous(memory_format=_memory_format(x))


def empty_like_laid_out(x: Tensor, channels: int | None = None) -> Tensor:
    """An empty result with the shape, type and layout of the image-shaped ``x``, optionally with
    another number of channels."""
    shape = x.shape if channels is None else (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))
