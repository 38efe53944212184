"""What every op shares: a table of backends, the choice among them, and its registration.

An op is a pair of `torch.library` operators, `mghf_fast::<op>` and `mghf_fast::<op>_backward`. The
backend is an argument of both and is resolved inside, at run time: torch.compile's tracing queries
nothing about the machine.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import preferences, trials
from ..backends import BACKENDS, BackendError, triton_is_interpreted, unavailable_reasons
from ..source_tree import BARE_SOURCE_TREE

logger = logging.getLogger("mghf_fast")


def epoch() -> tuple[int, int]:
    """A counter: while it is unchanged, :meth:`Op.choose` gives the same result for the same
    arguments. It changes when trials or the tuned table are forgotten."""
    return trials.forgotten, preferences.forgotten


def _no_gradient(*_: Any) -> Any:
    raise NotImplementedError("this op has no such gradient")


@dataclass(frozen=True)
class Implementation:
    """One backend of one op, with the interface common to all: ``forward`` and ``backward`` have
    the signatures of the op's two operators, without the backend's name. ``can_run`` takes the op's
    tensors, and as keywords the options on which kernels depend, and returns why it cannot run, or
    None. Only `patches` has ``add_backward``, which adds the gradient of x to its first argument.
    ``frozen`` gives the implementation for weights that never change, if there is another.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    can_run: Callable[..., str | None]
    add_backward: Callable[..., None] = _no_gradient
    frozen: Callable[[], Implementation] | None = None

    def for_frozen_weights(self) -> Implementation:
        return self if self.frozen is None else self.frozen()


def _implementation(
    module: Any, forward: str = "forward", backward: str | None = "backward"
) -> Implementation:
    frozen = getattr(module, "frozen", None)
    return Implementation(
        getattr(module, forward),
        _no_gradient if backward is None else getattr(module, backward),
        module.can_run,
        getattr(module, "add_backward", Implementation.add_backward),
        None if frozen is None else lambda: _implementation(frozen(), forward, backward),
    )


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "mghf_fast.kernels":
            raise ImportError(BARE_SOURCE_TREE) from error
        raise


class Op:
    """The backends of one op.

    Args:
        forward, backward: the names of the functions in a backend's module; an op without a
            gradient has no ``backward``.
    """

    def __init__(
        self, name: str, *, forward: str = "forward", backward: str | None = "backward"
    ) -> None:
        self.name = name
        self._functions = forward, backward
        self._modules: dict[str, Any] = {}
        self._implementations: dict[str, Implementation] = {}
        self._logged: set[str] = set()

    def implement(self, backend: str, module: Any) -> None:
        """Registers ``module``, which has the functions of :class:`Implementation`; a module given
        by name is imported at its first use."""
        self._modules[backend] = module

    @property
    def backends(self) -> tuple[str, ...]:
        """Those that have an implementation of the op, whether or not they run on this machine."""
        return tuple(backend for backend in BACKENDS if backend in self._modules)

    def implementation(self, backend: str) -> Implementation:
        if (known := self._implementations.get(backend)) is not None:
            return known
        module = self._modules[backend]
        if isinstance(module, str):
            module = _imported(module)
        return self._implementations.setdefault(backend, _implementation(module, *self._functions))

    def why_not(self, backend: str, *tensors: Tensor, **options: Any) -> str | None:
        """Why ``backend`` cannot run this op on these tensors, in a sentence; None if it can."""
        if (reason := unavailable_reasons().get(backend)) is not None:
            return reason
        if backend not in self._modules:
            having = ", ".join(map(repr, self.backends))
            return f"it has no kernel for this op yet (which has: {having})"
        return self.implementation(backend).can_run(*tensors, **options)

    def choose(self, backend: str, *tensors: Tensor, **options: Any) -> Implementation:
        """The implementation to run; a forced backend that can't run it raises ``BackendError``."""
        if backend != "auto":
            if (reason := self.why_not(backend, *tensors, **options)) is not None:
                raise BackendError(f"backend {backend!r} cannot run {self.name}: {reason}")
            return self.implementation(backend)
        return self.implementation(self.preferred(*tensors, **options))

    def preferred(self, *tensors: Tensor, **options: Any) -> str:
        """The backend that "auto" picks; logs once why it rejects a better one."""
        need_weights = bool(options.get("need_weights", False))
        for candidate in preferences.in_order(self.name, tensors, BACKENDS, need_weights):
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


def double_backward_requested() -> bool:
    """Whether autograd is recording the backward itself (`create_graph=True`). Kernels have no
    second derivative, so the backward is then the reference's, in differentiable PyTorch."""
    return torch.is_grad_enabled()
