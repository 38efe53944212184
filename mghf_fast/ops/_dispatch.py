"""What every op shares: a table of backends, the choice among them, and its registration.

An op is a pair of `torch.library` operators, `mghf_fast::<op>` and `mghf_fast::<op>_backward`. The
backend is an argument of both and is resolved inside, at run time: nothing about the machine is
asked while torch.compile traces.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import native, preferences, trials
from ..backends import BACKENDS, triton_is_interpreted, unavailable_reasons

logger = logging.getLogger("mghf_fast")


@dataclass(frozen=True)
class Implementation:
    """One backend of one op. ``can_run`` gets the op's tensors, and by keyword the options on which
    its kernels depend, and says why it can't, or None."""

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    can_run: Callable[..., str | None]

    def differentiate(self, *args: Any) -> Any:
        assert self.backward is not None, "the op has no gradient"
        return self.backward(*args)


class Op:
    """The backends of one op."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._implementations: dict[str, Implementation] = {}
        self._logged: set[str] = set()

    def implement(
        self,
        backend: str,
        forward: Callable[..., Any],
        backward: Callable[..., Any] | None = None,
        can_run: Callable[..., str | None] = lambda *tensors, **options: None,
    ) -> None:
        self._implementations[backend] = Implementation(forward, backward, can_run)

    def implementation(self, backend: str) -> Implementation:
        return self._implementations[backend]

    def why_not(self, backend: str, *tensors: Tensor, **options: Any) -> str | None:
        """Why ``backend`` cannot run this op on these tensors, in a sentence; None if it can."""
        if (reason := unavailable_reasons().get(backend)) is not None:
            return reason
        if backend not in self._implementations:
            having = ", ".join(repr(b) for b in BACKENDS if b in self._implementations)
            return f"it has no kernel for this op yet (which has: {having})"
        return self._implementations[backend].can_run(*tensors, **options)

    def choose(self, backend: str, *tensors: Tensor, **options: Any) -> Implementation:
        """The implementation to run; a forced backend that can't run it raises ``RuntimeError``."""
        if backend != "auto":
            if (reason := self.why_not(backend, *tensors, **options)) is not None:
                raise RuntimeError(f"backend {backend!r} cannot run {self.name}: {reason}")
            return self._implementations[backend]
        return self._implementations[self.preferred(*tensors, **options)]

    def preferred(self, *tensors: Tensor, **options: Any) -> str:
        """The backend that "auto" picks; why not a better one is logged once."""
        for candidate in preferences.in_order(self.name, tensors, BACKENDS):
            reason = self.why_not(candidate, *tensors, **options)
            if candidate == "triton" and triton_is_interpreted():
                reason = "its interpreter is slow, and for tests that ask for it by name"
            if reason is None and candidate in trials.TRIED and tensors:
                reason = trials.refusal(self.name, candidate, tensors[0])
            if reason is None:
                return candidate
            if (message := f"{candidate} cannot run {self.name}: {reason}") not in self._logged:
                self._logged.add(message)
                logger.debug(message)
        raise AssertionError(f"{self.name} has no reference")  # the reference runs everything


def _cannot_take(tensors: tuple[Tensor, ...], device: str) -> str | None:
    """Why kernels for this type of device cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor.device.type != device:
            return f"it runs on {device} tensors here, and one is on {tensor.device}"
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it takes float32, float16 or bfloat16, and one tensor is {tensor.dtype}"
    return None


def can_run_cpu(*tensors: Tensor) -> str | None:
    """Why the compiled CPU kernels cannot take these tensors, or None."""
    return _cannot_take(tensors, "cpu")


@functools.cache
def _triton_lacks(device: torch.device) -> str | None:
    """What the Triton kernels miss in a GPU, or None."""
    if torch.version.hip is not None:
        return "its kernels are made for NVIDIA GPUs"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return (
            "its kernels need compute capability 8.0 or higher (Ampere and later), and "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        )
    return None


def can_run_triton(*tensors: Tensor) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
    if triton_is_interpreted():
        return _cannot_take(tensors, "cpu")
    if (reason := _cannot_take(tensors, "cuda")) is not None or not tensors:
        return reason
    return _triton_lacks(tensors[0].device)


@functools.cache
def _cuda_lacks(device: torch.device) -> str | None:
    return native.cuda_lacks(torch.cuda.get_device_capability(device))


def can_run_cuda(*tensors: Tensor) -> str | None:
    """Why the compiled CUDA kernels cannot take these tensors, or None."""
    if (reason := _cannot_take(tensors, "cuda")) is not None or not tensors:
        return reason
    return _cuda_lacks(tensors[0].device)


def readable_on_cpu(x: Tensor) -> Tensor:
    """An image as the compiled CPU kernels read it: float32 or bfloat16."""
    return x.float() if x.dtype == torch.float16 else x


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


def register_float32_autocast(op: Any) -> None:
    """Under autocast the op's float16 and bfloat16 inputs are cast to float32 first: its sums and
    exponentials are taken in float32 anyway, and half-precision inputs would only lose digits."""
    for device in ("cpu", "cuda"):
        op.register_autocast(device, torch.float32)


def double_backward_requested() -> bool:
    """Whether autograd is recording the backward itself (`create_graph=True`). The backward then
    runs as the reference's, in plain differentiable PyTorch; kernels have no second derivative."""
    return torch.is_grad_enabled()
