"""Gradients under `torch.vmap`, which is how autograd takes several at once (`is_grads_batched`,
`jacobian(vectorize=True)`)."""

from __future__ import annotations

import torch
from torch import Tensor


def is_batched(*tensors: Tensor) -> bool:
    """Whether one of them carries a dimension of vmap, new or old. PyTorch runs an operator over it
    one by one, but none that takes or returns a list of tensors or writes into an argument; of
    these the backward then is the reference's, in plain PyTorch, as for a second derivative."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return any(
        functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
        for tensor in tensors
    )
