"""The arithmetic type of sums and statistics, and the precision of matrix products.

``precision`` is the least precision of the products of convolutions and matrices whose factors are
float32: ``"float32"``, an error of at most 1e-5; ``"tf32"``, factors of 11 significant bits;
``"bfloat16"``, factors of 8. A sum of products is in float32 always. Factors that are exact in half
precision need one product in any case, so images of half precision gain little.

``"auto"`` is what PyTorch itself uses for the convolutions that are replaced. On CUDA that is
``torch.backends.cudnn.conv.fp32_precision``, TF32 unless it is set to ``"ieee"``, or
``torch.backends.cudnn.allow_tf32`` to ``False``; elsewhere it is float32. A compiled call keeps the
setting with which it was traced.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ._checks import check_choice

PRECISIONS = ("float32", "tf32", "bfloat16")


def check_precision(precision: object) -> str:
    """Returns ``precision`` if it is ``"auto"`` or one of `PRECISIONS`; raises ``ValueError``
    otherwise."""
    check_choice("precision", precision, ("auto", *PRECISIONS))
    return str(precision)


def product_precision(precision: str, device_type: str) -> str:
    """One of `PRECISIONS`, for ``"auto"`` that of PyTorch's convolutions on this type of device."""
    check_precision(precision)
    if precision != "auto":
        return precision
    return _of_convolutions() if device_type == "cuda" else "float32"


@torch.compiler.assume_constant_result
def _of_convolutions() -> str:
    # Not allow_tf32, which raises once the newer setting has been used. This one follows both, and
    # its parents' where it is not set.
    setting = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if setting == "tf32" else "float32"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else, whatever the storage type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocasting(device_type: str) -> bool:
    """Whether autocast is on for a device type; never for "meta", which has none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Turns autocast off for a device type, also for "meta", which `torch.autocast` refuses."""
    if device_type == "meta":
        return nullcontext()
    context: AbstractContextManager[None] = torch.autocast(device_type, enabled=False)
    return context
