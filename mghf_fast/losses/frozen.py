"""Frozen weights: modules within a loss whose tensors are buffers instead of parameters.

A parameter would be subject to a parent's ``requires_grad_(True)`` and to an optimizer of the
parent's parameters, and would be part of every checkpoint. A buffer still follows ``.to()``,
copies, pickles and DataParallel's replicas.
"""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._warnings import warn_caller


class Unregistered(nn.Module):
    """Runs a module without registering it. It is for TorchScript modules, whose parameters are
    part of their program and cannot become buffers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # Bypasses nn.Module's bookkeeping. The copies by device are for DataParallel's replicas,
        # which share this object; frozen weights never go stale.
        self.__dict__["module"] = module
        self.__dict__["copies"] = {}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        module = self.__dict__["module"]
        yield from module.named_parameters()
        yield from module.named_buffers()

    def forward(self, image: Tensor) -> Any:
        module = self.__dict__["module"]
        own = next((tensor for _, tensor in self.tensors()), image)
        if own.device != image.device:
            copies = self.__dict__["copies"]
            if image.device not in copies:
                copies[image.device] = copy.deepcopy(module).to(image.device)
            module = copies[image.device]
        return module(image)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Unregistered:
        super()._apply(fn, recurse)
        self.__dict__["module"]._apply(fn)
        self.__dict__["copies"].clear()
        return self

    def train(self, mode: bool = True) -> Unregistered:
        return self  # always in evaluation mode

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "copies": {}}
        if isinstance(self.__dict__["module"], torch.jit.ScriptModule):
            torch.jit.save(self.__dict__["module"], file := io.BytesIO())
            state["module"] = file.getvalue()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(state["module"], bytes):
            self.__dict__["module"] = torch.jit.load(io.BytesIO(state["module"]))


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in evaluation mode. Unlike `copy.deepcopy` it also copies tensors that a
    forward left on the module, as old-style weight and spectral norm do."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for tensor in (*vars(part).values(), *part._buffers.values()):
            if isinstance(tensor, Tensor) and not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    with torch.no_grad():  # TorchScript's copies are clones, which would have a history
        return copy.deepcopy(module, memo).eval()


def freeze(module: nn.Module, *, persistent: bool = False) -> nn.Module:
    """``module`` with every parameter turned into a buffer, in place; or, if a part of it is a
    TorchScript module, an :class:`Unregistered` around it.

    Args:
        persistent: whether the tensors are part of a ``state_dict()``.
    """
    for weight in module.parameters():  # TorchScript modules lack requires_grad_
        weight.requires_grad_(False)
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        return Unregistered(module)
    buffers: dict[Tensor, Tensor] = {}  # a parameter that two modules share stays one tensor
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is None:
                continue
            buffer = buffers.setdefault(parameter, parameter.detach())
            del part._parameters[name]
            part.register_buffer(name, buffer, persistent=persistent)
        if not persistent:
            part._non_persistent_buffers_set.update(part._buffers)
    return module


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, whether or not a ``state_dict()`` has them."""
    if isinstance(module, Unregistered):
        return dict(module.tensors())
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def floating_type(module: nn.Module) -> torch.dtype:
    """The floating type that a module computes in: the common type of its parameters, else of its
    buffers, else float32."""
    for tensors in (module.parameters(), module.buffers()):
        if dtypes := {t.dtype for t in tensors if t.is_floating_point()}:
            dtype = dtypes.pop()
            for other in dtypes:
                dtype = torch.promote_types(dtype, other)
            return dtype
    return torch.float32


def digest(module: nn.Module) -> str:
    """The first 12 hexadecimal digits of a SHA-256 over names, types, shapes and values."""
    total = hashlib.sha256()
    for name, tensor in sorted(named_tensors(module).items()):
        if tensor.device.type == "meta":
            return "on meta"
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return total.hexdigest()[:12]


class HoldsFrozen(nn.Module):
    """Base of losses with frozen parts. It accepts a state_dict with frozen weights, as earlier
    versions wrote, but keeps its own weights and warns if they differ."""

    frozen_parts: tuple[str, ...] = ()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        different = []
        for part in self.frozen_parts:
            own, start = named_tensors(self.get_submodule(part)), f"{prefix}{part}."
            for key in [key for key in state_dict if key.startswith(start)]:
                saved, kept = state_dict.pop(key), own.get(key[len(start) :])
                if kept is None or not _equal(saved, kept):
                    different.append(key)
        if different:
            warn_caller(
                f"the state_dict holds other frozen weights than this loss ({len(different)}, "
                f"{different[0]!r} first), which keeps its own: its values will differ from those "
                "of the loss that was saved, unless it is made with the same extractor"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)


def _equal(saved: Tensor, kept: Tensor) -> bool:
    if saved.shape != kept.shape:
        return False
    if kept.device.type == "meta" or saved.device.type == "meta":
        return True
    return torch.equal(saved.detach().to(kept.device, kept.dtype), kept)
