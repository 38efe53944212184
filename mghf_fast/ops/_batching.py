"""Gradients under `torch.vmap`, which autograd uses to compute several at once
(`is_grads_batched`, `jacobian(vectorize=True)`)."""

from __future__ import annotations

import torch
from torch import Tensor


def is_batched(*tensors: Tensor) -> bool:
    """Whether a tensor carries a dimension of vmap, of either implementation. PyTorch then loops
    over that dimension, except for operators that take or return a list of tensors or write into
    an argument: for these the backward is the reference's, as for a second derivative."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return any(
        functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
        for tensor in tensors
    )
