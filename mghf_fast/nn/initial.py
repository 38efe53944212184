"""Initial weights that do not depend on the default device and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def reproducibly(seed: int | None = None) -> Iterator[None]:
    """Modules made in this context have the same weights everywhere: they are drawn on the CPU,
    because a GPU draws other numbers, and in float32, whatever the default device and dtype. A
    ``seed`` is used for the context only; the generator's state is restored."""
    ambient = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(ambient)


@torch.no_grad()
def orthogonal(weight: Tensor, gain: float = 1.0) -> None:
    """:func:`torch.nn.init.orthogonal_` by a float64 QR of the same random numbers, rounded: it
    supports half precision, for which PyTorch has no QR, and gives the same bits on any number of
    threads."""
    rows = weight.shape[0]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    drawn = torch.empty(rows, weight.numel() // rows, dtype=dtype, device=weight.device).normal_()
    wide = drawn.shape[1] > rows
    q, r = torch.linalg.qr((drawn.T if wide else drawn).double())
    q = q * r.diagonal().sign()
    weight.copy_(gain * (q.T if wide else q).reshape(weight.shape))
