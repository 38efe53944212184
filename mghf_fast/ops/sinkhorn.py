"""The contract of `sinkhorn`: its two operators, their shapes, gradients and backends."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..reference import sinkhorn as reference
from ._dispatch import Op, double_backward_requested
from ._registration import Operator
from .native.sinkhorn import Sinkhorn

OP = Op("sinkhorn")
OP.implement("reference", reference)
OP.implement("cuda", Sinkhorn("cuda"))
OP.implement("triton", "mghf_fast.kernels.sinkhorn")
OP.implement("cpu", Sinkhorn("cpu"))


@Operator
def sinkhorn(
    similarity: Tensor,
    cost: str,
    epsilon: float,
    iterations: int,
    tolerance: float | None,
    backend: str,
) -> Tensor:
    run = OP.choose(backend, similarity).forward
    return run(similarity, cost, epsilon, iterations, tolerance).contiguous()


@Operator
def sinkhorn_backward(
    grad: Tensor,
    similarity: Tensor,
    cost: str,
    epsilon: float,
    iterations: int,
    tolerance: float | None,
    backend: str,
) -> Tensor:
    run = OP.choose(backend, grad, similarity).backward
    return run(grad, similarity, cost, epsilon, iterations, tolerance).contiguous()


@sinkhorn.fake
def _(similarity: Tensor, *_: Any) -> Tensor:
    return similarity.new_empty(similarity.shape)


@sinkhorn_backward.fake
def _(grad: Tensor, similarity: Tensor, *_: Any) -> Tensor:
    return similarity.new_empty(similarity.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    similarity, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(similarity)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (similarity,) = ctx.saved_tensors
    if double_backward_requested():
        grad_similarity = reference.backward(grad, similarity, *ctx.options)
    else:
        grad_similarity = sinkhorn_backward(grad, similarity, *ctx.options, ctx.backend)
    return grad_similarity, None, None, None, None, None


sinkhorn.differentiate(_backward, _setup_context)
sinkhorn.in_float32_under_autocast()
