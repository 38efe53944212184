"""Products of tiles at the precision that an op is asked for."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

ONE_PRODUCT = {"tf32": "tf32_nearest", "bfloat16": "bf16"}


def dot_precision(precision: str, exact: Any) -> Any:
    """The PRECISION of :func:`dot` for an op's ``precision``, ``exact`` being that for float32."""
    return ONE_PRODUCT.get(precision, exact)


@triton.jit
def nearest_tf32(x: tl.tensor) -> tl.tensor:
    """float32 so that what tensor cores read of it, the bits above the lowest 13, is the nearest
    TF32. A NaN is left as it is: the addition could turn it into a number."""
    bits = x.to(tl.int32, bitcast=True) + 0x1000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """total + a b in float32. PRECISION is `tl.dot`'s, or for factors of float32 one product:
    "tf32_nearest" or "bf16" of their nearest neighbours in that type."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    elif PRECISION == "tf32_nearest":
        return tl.dot(nearest_tf32(a), nearest_tf32(b), total, input_precision="tf32")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)
