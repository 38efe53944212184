"""Registers the ops as operators of `torch.library` with little overhead in Python.

`torch.library.custom_op` and `register_autograd` would work, but take 40 microseconds more for a
forward and backward, because they traverse every argument as a tree. Here one autograd node is made
directly from the arguments, and only lists of tensors are flattened.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

_LIBRARY = torch.library.Library("mghf_fast", "FRAGMENT")

Function = TypeVar("Function", bound=Callable[..., Any])


class Operator:
    """``mghf_fast::<name of the function>``, which runs ``function`` on any device.

    The schema is inferred from the function's annotations; no argument is modified.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.run = function
        """The function itself, without the dispatcher."""
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        schema = torch.library.infer_schema(function, mutates_args=())
        tags = (torch.Tag.pt2_compliant_tag,)
        parameters = inspect.signature(function).parameters.values()
        self._defaults = [p.default for p in parameters]
        _LIBRARY.define(f"{self.__name__}{schema}", tags=tags)
        _LIBRARY.impl(self.__name__, function, "CompositeExplicitAutograd")
        self.overload: Any = getattr(torch.ops.mghf_fast, self.__name__).default

    def __call__(self, *arguments: Any) -> Any:
        return self.overload(*arguments)

    def fake(self, function: Function) -> Function:
        """Registers the function that gives the shapes, types and strides of the results."""
        torch.library.register_fake(f"mghf_fast::{self.__name__}", function, lib=_LIBRARY)
        return function

    def in_float32_under_autocast(self) -> None:
        """Makes autocast cast the op's float16 and bfloat16 inputs to float32: its sums and
        exponentials are in float32 anyway, and half-precision inputs would only lose digits."""
        for device in ("cpu", "cuda"):
            name = f"mghf_fast::{self.__name__}"
            torch.library.register_autocast(name, device, torch.float32, lib=_LIBRARY)

    def differentiate(
        self, backward: Callable[..., Any], setup_context: Callable[[Any, Any, Any], None]
    ) -> None:
        """Registers the gradient, as `torch.library.register_autograd` does: ``setup_context(ctx,
        inputs, output)`` saves what ``backward(ctx, *grads)`` needs, which returns the gradient of
        each argument, a list for a list of tensors."""
        overload, defaults = self.overload, self._defaults

        class Node(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, lengths: Sequence[int | None], *flat: Any) -> Any:
                ctx.lengths = lengths
                inputs = _nested(flat, lengths)
                with torch._C._AutoDispatchBelowAutograd():
                    output = overload(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                flat = ctx.needs_input_grad
                ctx.needs_input_grad = _nested(flat[1:], ctx.lengths)
                try:
                    found = backward(ctx, *grads)
                finally:
                    ctx.needs_input_grad = flat
                found = found if isinstance(found, tuple) else (found,)
                return None, *_flat(found, ctx.lengths)

        def kernel(*arguments: Any) -> Any:
            # The dispatcher leaves out trailing arguments that have their default.
            arguments += tuple(defaults[len(arguments) :])
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
                lengths = [len(a) if isinstance(a, (list, tuple)) else None for a in arguments]
                return _applied(Node, lengths, *_flat(arguments, lengths))
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*arguments)

        Node.__name__ = Node.__qualname__ = f"{self.__name__}_node"
        _LIBRARY.impl(self.__name__, kernel, "Autograd")


def _applied(node: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``node.apply``, under the transforms of `torch.func` too.

    ``apply`` refuses these, because it would have to choose the level at which the node is recorded
    (and so do operators of `torch.library.custom_op`). Here the dispatcher has chosen it, as for
    PyTorch's own operators, so the node is made directly.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return node.apply(*arguments)
    from torch._functorch import autograd_function

    make: Any = super(torch.autograd.Function, node)
    with autograd_function.enable_single_level_autograd_function():  # type: ignore[attr-defined]
        return make.apply(*arguments)


def _flat(values: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    flat: list[Any] = []
    for value, length in zip(values, lengths, strict=True):
        if length is None:
            flat.append(value)
        else:
            flat.extend(value)
    return flat


def _nested(flat: Sequence[Any], lengths: Sequence[int | None]) -> tuple[Any, ...]:
    nested: list[Any] = []
    start = 0
    for length in lengths:
        nested.append(flat[start] if length is None else list(flat[start : start + length]))
        start += 1 if length is None else length
    return tuple(nested)
