"""The contract of `coupling`: the invertible block, its inverse and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..reference.coupling import (
    invertible_block,
    invertible_block_backward,
    invertible_block_inverse,
    invertible_block_log_det,
)
from ._batching import is_batched
from ._dispatch import (
    Op,
    can_run_cpu,
    can_run_cuda,
    can_run_triton,
    double_backward_requested,
    empty_like_laid_out,
    laid_out_as,
    readable_on_cpu,
    register_float32_autocast,
)
from .vocabulary import BlockWeights

plain_block, plain_inverse = invertible_block, invertible_block_inverse
"""The block and its inverse of (x, BlockWeights) in plain PyTorch, which autograd walks through."""
log_det = invertible_block_log_det
"""log |det| of the block's Jacobian at every image, (B,), likewise: no backend has a kernel."""


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().float().flatten() for t in tensors])


def _native_options(block: BlockWeights) -> tuple[int, int, str, float]:
    """Channels, kernel of the mix, activation, clamp."""
    channels, _, kernel, _ = block.mix_weight.shape
    return channels, kernel, block.activation, block.clamp or 0.0


def _cpu_forward(x: Tensor, block: BlockWeights) -> Tensor:
    y: Tensor = torch.ops.mghf_native.coupling(
        readable_on_cpu(x), _flat(block.tensors()), *_native_options(block)
    )
    return y.to(x.dtype)


def _cpu_backward(
    grad: Tensor, x: Tensor, block: BlockWeights, need_weights: bool
) -> tuple[Tensor, list[Tensor]]:
    weights = block.tensors()
    grad_x, flat = torch.ops.mghf_native.coupling_backward(
        readable_on_cpu(grad),
        readable_on_cpu(x),
        _flat(weights),
        *_native_options(block),
        need_weights,
    )
    if not need_weights:
        return grad_x.to(x.dtype), []
    pieces = flat.split([w.numel() for w in weights])
    # Copies, for the results of an operator must not share memory.
    return grad_x.to(x.dtype), [
        p.view(w.shape).to(w.dtype, copy=True) for p, w in zip(pieces, weights, strict=True)
    ]


def _cpu_inverse(y: Tensor, block: BlockWeights) -> Tensor:
    inverse = torch.linalg.inv(block.mix_weight.detach().flatten(1).double())
    bias = -inverse @ block.mix_bias.detach().double()
    channels, _, activation, clamp = _native_options(block)
    x: Tensor = torch.ops.mghf_native.coupling_inverse(
        readable_on_cpu(y),
        _flat([inverse, bias, *block.tensors()[2:]]),
        channels,
        activation,
        clamp,
    )
    return x.to(y.dtype)


def _cuda_forward(x: Tensor, block: BlockWeights) -> Tensor:
    y: Tensor = native.cuda_ops().coupling(x, _flat(block.tensors()), *_native_options(block))
    return y


def _cuda_backward(
    grad: Tensor, x: Tensor, block: BlockWeights, need_weights: bool
) -> tuple[Tensor, list[Tensor]]:
    grad_x, _ = native.cuda_ops().coupling_backward(
        grad.to(x.dtype), x, _flat(block.tensors()), *_native_options(block), need_weights
    )
    return grad_x, []


def _inverse_weights(block: BlockWeights) -> list[Tensor]:
    # Without the check for a singular matrix, for which the GPU would have to be waited for.
    inverse, _ = torch.linalg.inv_ex(block.mix_weight.detach().flatten(1).double())
    bias = -inverse @ block.mix_bias.detach().double()
    return [inverse.float(), bias.float(), *block.tensors()[2:]]


def _cuda_inverse(y: Tensor, block: BlockWeights) -> Tensor:
    channels, _, activation, clamp = _native_options(block)
    x: Tensor = native.cuda_ops().coupling_inverse(
        y, _flat(_inverse_weights(block)), channels, activation, clamp
    )
    return x


def _triton_forward(x: Tensor, block: BlockWeights) -> Tensor:
    from ..kernels import coupling as kernels

    y = empty_like_laid_out(x, block.mix_weight.shape[0])
    kernels.forward(x, y, block.tensors(), block.activation, block.clamp)
    return y


def _triton_backward(
    grad: Tensor, x: Tensor, block: BlockWeights, need_weights: bool
) -> tuple[Tensor, list[Tensor]]:
    from ..kernels import coupling as kernels

    grad_x, weights = empty_like_laid_out(x), block.tensors()
    grad_weights = kernels.backward(
        grad, x, grad_x, weights, block.activation, block.clamp, need_weights
    )
    if not need_weights:
        return grad_x, []
    return grad_x, [g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True)]


def _triton_inverse(y: Tensor, block: BlockWeights) -> Tensor:
    from ..kernels import coupling as kernels

    x = empty_like_laid_out(y)
    kernels.inverse(y, x, _inverse_weights(block), block.activation, block.clamp)
    return x


def _channels(tensors: tuple[Tensor, ...]) -> int:
    # The bias of the mix is the only vector among them, and has the block's channels.
    return max((t.shape[0] for t in tensors if t.dim() == 1), default=0)


def _can_run_cuda(
    *tensors: Tensor, subnet: str = "bottleneck", need_weights: bool = False
) -> str | None:
    if subnet != "bottleneck":
        return f"its kernels are made for subnet 'bottleneck', and this block's is {subnet!r}"
    if need_weights:
        return (
            "its kernels give the gradient of the image only, and one of the weights is asked for"
        )
    if (channels := _channels(tensors)) > 256:
        return (
            "its kernels keep half of a tile's channels on chip, which goes up to 256 channels, "
            f"and this block has {channels}"
        )
    return can_run_cuda(*tensors)


def _can_run_triton(
    *tensors: Tensor, subnet: str = "bottleneck", need_weights: bool = False
) -> str | None:
    if subnet != "bottleneck":
        return f"its kernels are made for subnet 'bottleneck', and this block's is {subnet!r}"
    if (channels := _channels(tensors)) > 512:
        return (
            "its kernels keep half of a pixel's channels on chip, which goes up to 512 channels, "
            f"and this block has {channels}"
        )
    return can_run_triton(*tensors)


def _can_run_cpu(
    *tensors: Tensor, subnet: str = "bottleneck", need_weights: bool = False
) -> str | None:
    if subnet != "bottleneck":
        return f"its kernels are made for subnet 'bottleneck', and this block's is {subnet!r}"
    return can_run_cpu(*tensors)


OP = Op("coupling")
OP.implement("reference", invertible_block, invertible_block_backward)
OP.implement("cuda", _cuda_forward, _cuda_backward, _can_run_cuda)
OP.implement("triton", _triton_forward, _triton_backward, _can_run_triton)
OP.implement("cpu", _cpu_forward, _cpu_backward, _can_run_cpu)
INVERSE = Op("coupling_inverse")
INVERSE.implement("reference", invertible_block_inverse)
INVERSE.implement("cuda", _cuda_inverse, can_run=_can_run_cuda)
INVERSE.implement("triton", _triton_inverse, can_run=_can_run_triton)
INVERSE.implement("cpu", _cpu_inverse, can_run=_can_run_cpu)


@torch.library.custom_op("mghf_fast::coupling", mutates_args=())
def coupling(
    x: Tensor,
    weights: list[Tensor],
    activation: str,
    subnet: str,
    clamp: float | None,
    backend: str,
) -> Tensor:
    block = BlockWeights.from_tensors(weights, activation, subnet, clamp)
    return laid_out_as(x, OP.choose(backend, x, *weights, subnet=subnet).forward(x, block))


@torch.library.custom_op("mghf_fast::coupling_inverse", mutates_args=())
def coupling_inverse(
    y: Tensor,
    weights: list[Tensor],
    activation: str,
    subnet: str,
    clamp: float | None,
    backend: str,
) -> Tensor:
    block = BlockWeights.from_tensors(weights, activation, subnet, clamp)
    return laid_out_as(y, INVERSE.choose(backend, y, *weights, subnet=subnet).forward(y, block))


@torch.library.custom_op("mghf_fast::coupling_backward", mutates_args=())
def coupling_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    activation: str,
    subnet: str,
    clamp: float | None,
    need_weights: bool,
    backend: str,
) -> list[Tensor]:
    """[gradient of x], followed by those of ``weights`` if they are needed."""
    block = BlockWeights.from_tensors(weights, activation, subnet, clamp)
    run = OP.choose(backend, grad, x, *weights, subnet=subnet, need_weights=need_weights)
    grad_x, grad_weights = run.differentiate(grad, x, block, need_weights)
    return [laid_out_as(x, grad_x), *(g.contiguous() for g in grad_weights)]


@coupling.register_fake
def _(x: Tensor, weights: list[Tensor], *_: Any) -> Tensor:
    return empty_like_laid_out(x, channels=weights[0].shape[0])


@coupling_inverse.register_fake
def _(y: Tensor, weights: list[Tensor], *_: Any) -> Tensor:
    return empty_like_laid_out(y)


@coupling_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    activation: str,
    subnet: str,
    clamp: float | None,
    need_weights: bool,
    backend: str,
) -> list[Tensor]:
    grad_weights = [w.new_empty(w.shape) for w in weights] if need_weights else []
    return [empty_like_laid_out(x), *grad_weights]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(x, *weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    need_weights = any(ctx.needs_input_grad[1])
    if double_backward_requested() or is_batched(grad):
        block = BlockWeights.from_tensors(weights, *ctx.options)
        grad_x, grad_weights = invertible_block_backward(grad, x, block, need_weights)
    else:
        grad_x, *grad_weights = coupling_backward(
            grad, x, weights, *ctx.options, need_weights, ctx.backend
        )
    return grad_x, grad_weights or [None] * len(weights), None, None, None, None


def _inverse_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # The inverse serves reconstruction and checks, which rarely need a gradient: plain autograd
    # through the reference is enough.
    again = double_backward_requested()
    saved = ctx.saved_tensors
    with torch.enable_grad():
        # Not the tensors themselves: they may have a history that leads to each other, as where y
        # comes out of the same block, and the derivative would walk through it. Views keep to the
        # op, and a derivative of the derivative still reaches what they are views of.
        inputs = [t.view_as(t) if again else t.detach() for t in saved]
        inputs = [t if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        block = BlockWeights.from_tensors(inputs[1:], *ctx.options)
        x = invertible_block_inverse(inputs[0], block)
        grads = torch.autograd.grad(x, inputs, grad, create_graph=again)
    return grads[0], list(grads[1:]), None, None, None, None


coupling.register_autograd(_backward, setup_context=_setup_context)
coupling_inverse.register_autograd(_inverse_backward, setup_context=_setup_context)
register_float32_autocast(coupling)
register_float32_autocast(coupling_inverse)
