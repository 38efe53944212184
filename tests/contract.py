"""Checks that all ops' test files share. `fn` is always a function of the tensors alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import draws
import interpreter
import torch
from torch import Tensor

VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Function = Callable[..., Any]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Relative L2 error in float64."""
    got, expected = got.detach().double(), expected.detach().double()
    scale = torch.linalg.vector_norm(expected).clamp_min(1e-30)
    return float(torch.linalg.vector_norm(got - expected) / scale)


def outputs(fn: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
    result = fn(*inputs)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def gradients(fn: Function, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the differentiable inputs for the given gradients of the outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = outputs(fn, *leaves)
    return list(
        torch.autograd.grad(
            results, leaves, [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)]
        )
    )


def check_against_reference(
    fn: Function,
    reference: Function,
    inputs: Sequence[Tensor],
    *,
    value_tolerance: float = VALUE_TOLERANCE,
    gradient_tolerance: float = GRADIENT_TOLERANCE,
    rounding: float = 0.0,
    among: Tensor | None = None,
    cancelled: Function | None = None,
    differentiable: bool = True,
) -> None:
    """Values and gradients of float32 inputs against the float64 reference, with random upstream
    gradients. ``rounding`` is an additional absolute error allowed for values that are differences
    of larger ones; ``among``, 0 or 1, masks the upstream gradients; ``cancelled(upstream, result)``
    returns the larger numbers of which the gradient is a difference, whose rounding is allowed
    too."""
    exact_inputs = [x.double() for x in inputs]
    expected = outputs(reference, *exact_inputs)
    for got, want in zip(outputs(fn, *inputs), expected, strict=True):
        error, size = (float((x.double()).norm()) for x in (got.detach() - want, want))
        assert error <= value_tolerance * size + rounding * want.numel() ** 0.5, (error, size)
    if differentiable:
        upstream = [draws.randn(e.shape, dtype=torch.float64) for e in expected]
        upstream = upstream if among is None else [u * among for u in upstream]
        got_gradients = gradients(fn, inputs, upstream)
        for got, want in zip(
            got_gradients, gradients(reference, exact_inputs, upstream), strict=True
        ):
            error, size = (float(x.double().norm()) for x in (got - want, want))
            lost = (
                0.0 if cancelled is None else 5e-7 * float(cancelled(*upstream, *expected).norm())
            )
            assert error <= gradient_tolerance * size + lost, (error, size, lost)
            assert got.dtype == inputs[0].dtype


def check_half_precision(
    fn: Function,
    reference: Function,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    differentiable: bool = True,
) -> None:
    """The errors of values and gradients in half precision are at most twice those of PyTorch in
    the same precision (or the rounding of the result itself), both against float64."""
    half = [x.to(dtype) for x in inputs]
    exact = [x.double() for x in half]
    upstream = [draws.randn(e.shape).to(dtype).double() for e in outputs(reference, *exact)]

    def results(fn: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
        values = [*outputs(fn, *inputs)]
        return values + gradients(fn, inputs, upstream) if differentiable else values

    for got, torch_own, want in zip(
        results(fn, half), results(reference, half), results(reference, exact), strict=True
    ):
        floor = max(relative_error(torch_own, want), relative_error(want.to(dtype), want))
        assert relative_error(got, want) <= 2 * floor + 1e-6


def image_layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The values of a 4-D ``x`` with other strides."""
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    padded = x.new_full((x.shape[0], x.shape[1] + 1, x.shape[2] + 3, 2 * x.shape[3]), torch.nan)
    padded[:, 1:, 2:-1, ::2] = x
    yield "sliced", padded[:, 1:, 2:-1, ::2]
    last = torch.nn.functional.pad(x, (1, 2, 0, 1), value=torch.nan)
    last = last.contiguous(memory_format=torch.channels_last)
    yield "cut from channels_last", last[..., :-1, 1:-2]


def expanded(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Views of parts of ``x``, expanded to the size of ``x`` by strides of zero."""
    for dim in (0, 1, x.dim() - 1):
        yield f"dimension {dim}", x.narrow(dim, 0, 1).expand_as(x)


def batch_layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The values of ``x``, of any number of dimensions, with other strides."""
    yield "transposed", x.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
    wide[..., 1::2] = x
    yield "sliced", wide[..., 1::2]


def check_layout(fn: Function, plain: Tensor, strided: Tensor) -> None:
    """Same values and gradients for other strides, up to rounding; arguments are not modified."""

    def rounding(x: Tensor) -> float:
        return 0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2

    before = strided.detach().clone()
    expected = outputs(fn, plain)
    upstream = [draws.randn_like(e) for e in expected]
    for got, want in zip(outputs(fn, strided), expected, strict=True):
        assert relative_error(got, want) <= 1e-6 + rounding(want)
    (got,), (want,) = gradients(fn, [strided], upstream), gradients(fn, [plain], upstream)
    assert relative_error(got, want) <= 1e-5 + rounding(want)
    assert torch.equal(strided.detach(), before)


def check_deterministic(
    backend: str, fn: Function, *inputs: Tensor, differentiable: bool = True
) -> None:
    """Bitwise the same values and gradients on every run; for compiled kernels also with 1 and 2
    threads (the reference's matrix products and convolutions are PyTorch's, which vary there)."""
    threads = torch.get_num_threads()
    upstream = [draws.randn_like(o) for o in outputs(fn, *inputs)]

    def run() -> list[Tensor]:
        values = [*outputs(fn, *inputs)]
        return values + gradients(fn, inputs, upstream) if differentiable else values

    def check_equal(first: list[Tensor], second: list[Tensor]) -> None:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    try:
        first = run()
        if interpreter.interprets(backend):
            with interpreter.another_order():
                check_equal(first, run())
            return
        check_equal(first, run())
        if backend != "cpu":
            return
        torch.set_num_threads(1)
        one_thread = run()
        torch.set_num_threads(2)
        check_equal(one_thread, run())
    finally:
        torch.set_num_threads(threads)


def check_compiled(fn: Function, *inputs: Tensor) -> None:
    """`torch.compile(fullgraph=True)` gives the eager values and gradients."""
    expected = outputs(fn, *inputs)
    upstream = [draws.randn_like(e) for e in expected]
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for got, want in zip(outputs(compiled, *inputs), expected, strict=True):
        assert relative_error(got, want) <= 1e-5
    for got, want in zip(
        gradients(compiled, inputs, upstream), gradients(fn, inputs, upstream), strict=True
    ):
        assert relative_error(got, want) <= 1e-5


def check_opcheck(op: Any, *args: Any) -> None:
    """`torch.library.opcheck`: schema, autograd registration, fake and AOT dispatch."""
    torch.library.opcheck(getattr(op, "overload", op), args)


def check_second_derivative(fn: Function, *inputs: Tensor) -> None:
    """The double backward, through the reference, in float64."""
    leaves = [x.double().detach().requires_grad_() for x in inputs]
    assert torch.autograd.gradgradcheck(fn, leaves)
