"""The contract of `entropy`: one operator, without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..precision import accumulation_dtype
from ..reference.entropy import channel_entropy
from ._dispatch import (
    Op,
    can_run_cpu,
    can_run_cuda,
    can_run_triton,
    readable_on_cpu,
    register_float32_autocast,
)


def _cpu_forward(x: Tensor, bins: int) -> Tensor:
    result: Tensor = torch.ops.mghf_native.entropy(readable_on_cpu(x), bins)
    return result


def _cuda_forward(x: Tensor, bins: int) -> Tensor:
    result: Tensor = native.cuda_ops().entropy(x, bins)
    return result


def _triton_forward(x: Tensor, bins: int) -> Tensor:
    from ..kernels import entropy as kernels

    return kernels.channel_entropy(x, bins)


OP = Op("entropy")
OP.implement("reference", channel_entropy)
OP.implement("cuda", _cuda_forward, can_run=can_run_cuda)
OP.implement("triton", _triton_forward, can_run=can_run_triton)
OP.implement("cpu", _cpu_forward, can_run=can_run_cpu)


@torch.library.custom_op("mghf_fast::entropy", mutates_args=())
def entropy(x: Tensor, bins: int, backend: str) -> Tensor:
    result: Tensor = OP.choose(backend, x).forward(x, bins)
    return result


@entropy.register_fake
def _(x: Tensor, bins: int, backend: str) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))


register_float32_autocast(entropy)
