"""The layouts of image-shaped results: what the fakes promise, and every backend keeps."""

from __future__ import annotations

import torch
from torch import Tensor


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def laid_out_as(x: Tensor, result: Tensor) -> Tensor:
    """``result``, channels_last if ``x`` is, contiguous otherwise: what the fakes promise."""
    return result.contiguous(memory_format=_memory_format(x))


def empty_like_laid_out(x: Tensor, channels: int | None = None) -> Tensor:
    """The fake of a result with the shape, type and layout of the image-shaped ``x``, or with
    another number of channels."""
    shape = x.shape if channels is None else (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))
