"""Triton's interpreter, which runs kernels without a GPU: made faster, with a GPU's bfloat16, and
with sizes that suit it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import emulated
import numpy as np
import pytest
import torch

from mghf_fast.backends import triton_is_interpreted


def interprets(backend: str) -> bool:
    return backend == "triton" and triton_is_interpreted()


def is_slow(backend: str) -> bool:
    """Whether the backend's kernels are interpreted or emulated: they take milliseconds for every
    program and every iteration of a loop."""
    return interprets(backend) or (backend == "cuda" and emulated.FOLDER is not None)


def fitted(backend: str, size: tuple[int, ...], most: tuple[int, ...]) -> tuple[int, ...]:
    """``size``, limited to ``most`` if the backend's kernels are slow."""
    return tuple(map(min, size, most)) if is_slow(backend) else size


def hasten() -> None:
    """Keeps the interpreter from patching Triton's language at every call of a kernel's functions,
    which takes up to half of its time, because the kernel's launch has already patched it."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @functools.cache
    def languages(fn: Any) -> list[Any]:
        return [module for module in (tl, tl.core) if module in fn.__globals__.values()]

    def patch_if_needed(fn: Any) -> Any:
        if any(tl.core.is_builtin(language.load) for language in languages(fn)):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_if_needed


def round_bfloat16() -> None:
    """Makes the interpreter round to bfloat16 instead of truncating, and multiply matrices of
    bfloat16 instead of their bits."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        types = source.dtype.scalar, target.scalar
        if types == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            bits = rounded.view(torch.int16).numpy().view(np.uint16)
            return TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return cast(self, source, target)

    def float32_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        factors = (
            rounding_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, *factors, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = rounding_cast, float32_dot


def cut_tf32() -> None:
    """Makes the interpreter's products in "tf32" read of a float32 what tensor cores read of it,
    all but the lowest 13 bits."""
    import triton.language as tl
    from triton._C.libtriton.ir import INPUT_PRECISION
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def cut(x: Any) -> Any:
        if x.dtype.scalar != tl.float32:
            return x
        read = np.ascontiguousarray(x.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return TensorHandle(read.view(np.float32), tl.float32)

    def dot_of_tf32(self: Any, a: Any, b: Any, total: Any, precision: Any, *rest: Any) -> Any:
        factors = (cut(a), cut(b)) if precision == INPUT_PRECISION.TF32 else (a, b)
        return dot(self, *factors, total, precision, *rest)

    InterpreterBuilder.create_dot = dot_of_tf32


@contextlib.contextmanager
def another_order() -> Iterator[None]:
    """Runs a kernel's programs from the last to the first, with new memory full of NaN."""
    from triton.runtime.interpreter import interpreter_builder as builder

    forward, threshold = builder.set_grid_idx, torch.are_deterministic_algorithms_enabled()

    def reversed_index(*index: int) -> None:
        forward(*(n - 1 - i for n, i in zip(builder.grid_dim, index, strict=True)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", reversed_index)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(threshold)
