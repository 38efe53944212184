"""Argument checks of the public functions. Every message names the argument, what came and what is
allowed; types raise `TypeError`, values `ValueError`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, x: Any, shape: str, *, tangents: bool = False) -> None:
    """Requires a dense floating-point tensor, not empty, with the dimensions that ``shape`` names,
    as in "(B, C, H, W)". A tangent of forward-mode differentiation is allowed only with
    ``tangents``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {x.layout}")
    if x.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    if not tangents:
        refuse_tangent(name, x)


def refuse_tangent(name: str, x: Tensor) -> None:
    """Refuses a tangent: operators of `torch.library` drop it, and the derivative would be 0."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(x).tangent is None and not _has_hidden_tangent(x):
        return
    raise NotImplementedError(
        f"{name} carries a tangent, and the fused operators have no forward-mode derivative: "
        f"use reverse mode, such as torch.autograd.grad, for second derivatives too"
    )


def _has_hidden_tangent(x: Tensor) -> bool:
    """Whether ``x`` belongs to a forward-mode transform of `torch.func` outside of another one, as
    in ``jvp(grad(f))``, which hides its tangent."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
        level = functorch.maybe_get_level(x)
        for interpreter in functorch.get_interpreter_stack() or ():
            if interpreter.key() == functorch.TransformType.Jvp and interpreter.level() == level:
                return True
    return False


def is_traced() -> bool:
    """Whether `torch.jit.trace` is recording, in which sizes are tensors."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def is_readable(x: Tensor) -> bool:
    """Whether the values of ``x`` can be read without disturbing what watches the operations: not
    a tensor without values, and no trace, CUDA graph or dispatch mode (`make_fx`, a fake mode)."""
    if x.device.type == "meta" or hasattr(x, "fake_mode") or is_traced():
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not torch._C._len_torch_dispatch_stack()


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must be on the same device, got {x.device} and {other.device}"
        )


def check_pair(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Requires equal shapes and devices."""
    if x.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape, "
            f"got {tuple(x.shape)} and {tuple(other.shape)}"
        )
    check_device(name, x, other_name, other)


def check_order(name: str, x: Tensor, constant_name: str, constant: Tensor) -> None:
    """Refuses a pair in which only the constant requires a gradient, which would be lost silently:
    LPIPS is symmetric, and many callers pass the ground truth first."""
    if torch.is_grad_enabled() and constant.requires_grad and not x.requires_grad:
        raise ValueError(
            f"{constant_name} requires a gradient and {name} does not, but the gradient goes to "
            f"{name} alone: pass {name} first and {constant_name} second, or detach "
            f"{constant_name}"
        )


def check_differentiable(name: str, result: Tensor, image: Tensor) -> None:
    """Refuses a result of the user's module ``name`` that has lost the image's gradient: beside
    another loss nobody would notice that this one trains nothing."""
    if torch.is_grad_enabled() and image.requires_grad and not result.requires_grad:
        raise ValueError(
            f"{name} must be differentiable in the image, got a result without a gradient: it "
            "detaches its result or runs under torch.no_grad() or torch.inference_mode()"
        )


def promoted(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in their common floating type, by PyTorch's rules of promotion."""
    if x.dtype == other.dtype:
        return x, other
    dtype = torch.promote_types(x.dtype, other.dtype)
    return x.to(dtype), other.to(dtype)


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` as a Python integer, from Python's, numpy's or, under `torch.jit.trace`, a traced
    size."""
    if isinstance(value, Tensor) and is_traced():
        value = value.item()
    elif not isinstance(value, (int, torch.SymInt)) and isinstance(value, numbers.Integral):
        value = int(value)
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return cast(int, value)  # a traced SymInt stays one


def check_number(name: str, value: Any, *, positive: bool = False) -> float:
    """``value``, a finite real number of Python or numpy, as Python's; with ``positive``, above
    zero."""
    if not isinstance(value, (int, float)) and isinstance(value, numbers.Real):
        value = float(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    # Not math.isfinite, which torch.compile(dynamic=True) cannot trace; NaN fails the comparisons.
    if not (-math.inf < value < math.inf) or (positive and value <= 0):
        kind = "finite and above 0" if positive else "finite"
        raise ValueError(f"{name} must be {kind}, got {value}")
    return value


def check_numbers(name: str, values: Any, count: int, *, positive: bool = False) -> list[float]:
    """``count`` numbers, from a list, a tuple, an array or a configuration library's sequence."""
    words = {2: "two", 3: "three"}
    try:
        if isinstance(values, (str, bytes)):
            raise TypeError
        listed = list(values)
    except TypeError:
        listed = []
    if len(listed) != count:
        raise ValueError(f"{name} must be {words[count]} numbers, got {values!r}")
    return [check_number(name, value, positive=positive) for value in listed]


def check_even_channels(name: str, channels: int) -> None:
    if channels % 2 or channels < 2:
        raise ValueError(f"{name} must have an even number of channels, 2 or more, got {channels}")
