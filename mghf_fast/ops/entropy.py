"""The contract of `entropy`: one operator, without a gradient."""

from __future__ import annotations

from torch import Tensor

from ..precision import accumulation_dtype
from ..reference import entropy as reference
from ._dispatch import Op
from ._registration import Operator
from .native.entropy import Entropy

OP = Op("entropy", backward=None)
OP.implement("reference", reference)
OP.implement("cuda", Entropy("cuda"))
OP.implement("triton", "mghf_fast.kernels.entropy")
OP.implement("cpu", Entropy("cpu"))


@Operator
def entropy(x: Tensor, bins: int, backend: str) -> Tensor:
    return OP.choose(backend, x).forward(x, bins)


@entropy.fake
def _(x: Tensor, bins: int, backend: str) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))


entropy.in_float32_under_autocast()
