"""The contract of `coupling`: the invertible block, its inverse and its gradient.

Besides y, (B, C, H, W), the forward returns a `state` for the backward, uint8, if ``keep`` is true:
the CUDA kernels' is (B, H, W, bytes of a pixel), see `native.coupling.state_shape`, and with it
their gradient recomputes no layer. Every other backend keeps nothing, CUDA likewise for softplus,
and the state is empty, (0,); so it is without ``keep``, which is for calls whose gradient in x will
be wanted and none in the weights. A backward that gets an empty state recomputes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import coupling as reference
from ._batching import is_batched
from ._dispatch import Op, double_backward_requested
from ._registration import Operator
from .layout import empty_like_laid_out, laid_out_as
from .native.coupling import Coupling, state_shape
from .vocabulary import nothing_kept

plain_block, plain_inverse = reference.invertible_block, reference.invertible_block_inverse
"""The block and its inverse as functions of (x, BlockWeights) in plain, differentiable PyTorch."""
log_det = reference.invertible_block_log_det
"""log |det| of the block's Jacobian for each image, (B,), likewise; no backend has a kernel."""


OP = Op("coupling")
OP.implement("reference", reference)
OP.implement("cuda", Coupling("cuda"))
OP.implement("triton", "mghf_fast.kernels.coupling")
OP.implement("cpu", Coupling("cpu"))
INVERSE = Op("coupling_inverse", forward="inverse", backward=None)
INVERSE.implement("reference", reference)
INVERSE.implement("cuda", Coupling("cuda"))
INVERSE.implement("triton", "mghf_fast.kernels.coupling")
INVERSE.implement("cpu", Coupling("cpu"))


@Operator
def coupling(
    x: Tensor,
    weights: list[Tensor],
    activation: str,
    subnet: str,
    clamp: float | None,
    keep: bool,
    backend: str,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """y and the state."""
    run = OP.choose(backend, x, *weights, subnet=subnet).forward
    y, state = run(x, weights, activation, subnet, clamp, keep, precision)
    return laid_out_as(x, y), state


@Operator
def coupling_inverse(
    y: Tensor,
    weights: list[Tensor],
    activation: str,
    subnet: str,
    clamp: float | None,
    backend: str,
) -> Tensor:
    run = INVERSE.choose(backend, y, *weights, subnet=subnet).forward
    return laid_out_as(y, run(y, weights, activation, subnet, clamp))


@Operator
def coupling_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    state: Tensor,
    activation: str,
    subnet: str,
    clamp: float | None,
    need_weights: bool,
    backend: str,
    precision: str = "float32",
) -> list[Tensor]:
    """[gradient of x], followed by those of ``weights`` if they are needed."""
    limited_by = {"subnet": subnet, "need_weights": need_weights}
    # x comes first, as in the forward, so that the same backend is preferred, which has kept state.
    run = OP.choose(backend, x, grad, *weights, **limited_by).backward
    options = (activation, subnet, clamp, need_weights, precision)
    grad_x, *grads = run(grad, x, weights, state, *options)
    return [laid_out_as(x, grad_x), *(g.contiguous() for g in grads)]


@coupling.fake
def _(
    x: Tensor,
    weights: list[Tensor],
    activation: str,
    subnet: str,
    clamp: float | None,
    keep: bool,
    backend: str,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    y = empty_like_laid_out(x, channels=weights[0].shape[0])
    # "auto" may choose any backend when it runs, and nothing is kept where the fakes are used then.
    if backend != "cuda":
        return y, nothing_kept(x)
    return y, x.new_empty(state_shape(x, weights, activation, keep), dtype=torch.uint8)


def keeps_state(x: Tensor, weights: list[Tensor], backend: str) -> bool:
    """``keep`` for a call whose gradient autograd may ask for. While torch.compile traces, the
    state must have a known size, and which backend "auto" is shows only when the graph runs."""
    wanted = torch.is_grad_enabled() and x.requires_grad
    known = backend == "cuda" or not torch.compiler.is_compiling()
    return wanted and known and not any(w.requires_grad for w in weights)


@coupling_inverse.fake
def _(y: Tensor, weights: list[Tensor], *_: Any) -> Tensor:
    return empty_like_laid_out(y)


@coupling_backward.fake
def _(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    state: Tensor,
    activation: str,
    subnet: str,
    clamp: float | None,
    need_weights: bool,
    backend: str,
    precision: str = "float32",
) -> list[Tensor]:
    grad_weights = [w.new_empty(w.shape) for w in weights] if need_weights else []
    return [empty_like_laid_out(x), *grad_weights]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, *ctx.options, _, ctx.backend, ctx.precision = inputs
    ctx.save_for_backward(x, output[1], *weights)


def _setup_inverse_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, weights, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(y, *weights)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Any, ...]:
    x, state, *weights = ctx.saved_tensors
    need_weights = any(ctx.needs_input_grad[1])
    given: tuple[Any, ...] = (grad, x, weights, state, *ctx.options, need_weights)
    if double_backward_requested() or is_batched(grad):
        found = reference.backward(*given)
    else:
        found = coupling_backward(*given, ctx.backend, ctx.precision)
    grad_x, *grad_weights = found
    return grad_x, grad_weights or [None] * len(weights), *(None,) * 6


def _inverse_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # The inverse is used for reconstruction and checks, which rarely need a gradient: autograd
    # through the reference is fast enough.
    again = double_backward_requested()
    saved = ctx.saved_tensors
    with torch.enable_grad():
        # Not the tensors themselves: one may depend on another, as when y is the same block's
        # output, and the derivative would follow that path too. Views stop it at the op's inputs,
        # and a second derivative still reaches the tensors that they are views of.
        inputs = [t.view_as(t) if again else t.detach() for t in saved]
        if not torch._C._are_functorch_transforms_active():  # they allow no requires_grad_()
            inputs = [t if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        x = reference.inverse(inputs[0], inputs[1:], *ctx.options)
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(x, wanted, grad, create_graph=again))
    grads = [next(found) if t.requires_grad else None for t in inputs]
    return grads[0], grads[1:], None, None, None, None


coupling.differentiate(_backward, _setup_context)
coupling_inverse.differentiate(_inverse_backward, _setup_inverse_context)
coupling.in_float32_under_autocast()
coupling_inverse.in_float32_under_autocast()
