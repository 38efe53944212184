"""Every kernel as the ops launch it at the paper's shapes, found without a GPU and without data.

The ops' Triton backends run here on tensors of the device "meta", which have shapes and strides but
no memory, for a GPU of a given architecture. Triton requests the compilation of every kernel with
the specialisation of its launch, and a hook records the request instead of compiling. So the
kernels compiled ahead of time are those that are launched, and host code that waited for a result
would fail.

The process can launch nothing afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from mghf_fast.commands.table5.workloads import CHANNELS, PATCH_SIZE, STRIDE
from mghf_fast.kernels.products import ONE_PRODUCT
from mghf_fast.ops import OPS, coupling
from mghf_fast.ops.vocabulary import KEPT, weight_shapes

SIZE, TOP_M, BINS, HIDDEN, DIMENSION = 512, 64, 256, 128, 64
PATCHES = ((SIZE - PATCH_SIZE) // STRIDE + 1) ** 2
MANY_PATCHES = 1764  # of 1024 x 1024 pixels
DEC_PATCHES, DEC_DEPTH = 8192, 192
HALVES = (torch.float16, torch.bfloat16)
TYPES = (torch.float32, *HALVES)


@dataclass(frozen=True)
class Launch:
    """A kernel with all that its compilation depends on."""

    case: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]


OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


class NoDevice:
    """A driver without a device: just enough for Triton to determine what it would compile."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return self.target.arch  # Triton caches kernels per device, so each architecture is one

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def launches(op: str, architecture: int) -> list[Launch]:
    """The different kernels of an op, in the order of their first launches."""
    found: dict[str, Launch] = {}
    case = ""

    def note(*, key: str, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        found.setdefault(
            f"{fn.name} {key}",
            Launch(
                case,
                fn.jit_function,
                compile["signature"],
                compile["constants"],
                compile["configs"][0],
                {name: options[name] for name in OPTIONS},
            ),
        )
        return True  # no need to compile

    knobs.runtime.jit_cache_hook = note
    triton.runtime.driver.set_active(NoDevice(architecture))
    for case, run, arguments in CASES[op]():  # noqa: B007
        run(*arguments)
    return list(found.values())


# ---- cases ----

Cases = Iterator[tuple[str, Callable[..., object], tuple[Any, ...]]]
"""A name, what runs, and its arguments."""


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _images(channels: int = CHANNELS) -> Iterator[tuple[str, Tensor]]:
    for dtype in TYPES:
        x = _empty(1, channels, SIZE, SIZE, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        yield name, x
        yield f"{name} channels_last", x.to(memory_format=torch.channels_last)


def _block(inputs: int, kernel: int) -> tuple[list[Tensor], str, str, None]:
    shapes = weight_shapes(CHANNELS, "bottleneck", inputs, kernel)
    return [_empty(*shape) for shape in shapes], "relu6", "bottleneck", None


def _coupling() -> Cases:
    op, inverse = (
        OPS["coupling"].implementation("triton"),
        coupling.INVERSE.implementation("triton"),
    )
    state = _empty(0, dtype=torch.uint8)
    block, stem = _block(CHANNELS, 1), _block(3, 3)

    def backward(need_weights: bool, grad: Tensor, x: Tensor, weights: Any, *options: Any) -> Any:
        return op.backward(grad, x, weights, state, *options, need_weights)

    for (label, x), (_, image) in zip(_images(), _images(3), strict=True):
        yield f"forward, {label}", op.forward, (x, *block, False)
        yield f"forward of the stem, {label}", op.forward, (image, *stem, False)
        yield f"backward, {label}", backward, (False, x, x, *block)
        yield f"backward of the stem, {label}", backward, (False, x, image, *stem)
        yield f"inverse, {label}", inverse.forward, (x, *block)
        yield f"weights, {label}", backward, (True, x, x, *block)
        yield f"weights of the stem, {label}", backward, (True, x, image, *stem)
    x = _empty(1, CHANNELS, SIZE, SIZE)
    for grade in ONE_PRODUCT:
        yield f"forward, products in {grade}", op.forward, (x, *block, False, grade)
        for need_weights in (False, True):
            label = f"{'weights' if need_weights else 'backward'}, products in {grade}"
            yield label, op.backward, (x, x, block[0], state, *block[1:], need_weights, grade)


def _entropy() -> Cases:
    op = OPS["entropy"].implementation("triton")
    for label, x in _images():
        yield label, op.forward, (x, BINS)
        yield f"many bins, {label}", op.forward, (x, 16 * BINS)


def _gram() -> Cases:
    op, grad = OPS["gram"].implementation("triton"), _empty(1, CHANNELS, CHANNELS)
    for label, x in _images():
        yield f"forward, {label}", op.forward, (x, 1.0)
        yield f"backward, {label}", op.backward, (grad, x, 1.0)
    x = _empty(1, CHANNELS, SIZE, SIZE)
    for grade in ONE_PRODUCT:
        yield f"forward, products in {grade}", op.forward, (x, 1.0, grade)
        yield f"backward, products in {grade}", op.backward, (grad, x, 1.0, grade)


def _content_style() -> Cases:
    op, terms = OPS["content_style"].implementation("triton"), [_empty(1) for _ in range(4)]
    for label, x in _images():
        for name, top_m in (("", TOP_M), ("naive ", 0)):
            options = (top_m, 1.0, 0.8, BINS, "channel")
            shapes = ((top_m,), (6, top_m), (top_m, top_m))
            kept, saved = _empty(1, top_m, dtype=torch.int64), [_empty(1, *s) for s in shapes]
            yield f"{name}forward, {label}", op.forward, (x, x, *options)
            yield (
                f"{name}backward, {label}",
                op.backward,
                (*terms, x, x, kept, *saved, "channel"),
            )
    x, options = _empty(1, CHANNELS, SIZE, SIZE), (TOP_M, 1.0, 0.8, BINS, "channel")
    kept = _empty(1, TOP_M, dtype=torch.int64)
    saved = [_empty(1, TOP_M), _empty(1, 6, TOP_M), _empty(1, TOP_M, TOP_M)]
    for grade in ONE_PRODUCT:
        yield f"forward, products in {grade}", op.forward, (x, x, *options, grade)
        yield (
            f"backward, products in {grade}",
            op.backward,
            (*terms, x, x, kept, *saved, "channel", grade),
        )


def _patches() -> Cases:
    op, sizes = OPS["patches"].implementation("triton"), (PATCH_SIZE, STRIDE)
    weights = (_empty(HIDDEN, PATCH_SIZE**2), _empty(HIDDEN), _empty(DIMENSION, HIDDEN))
    parameters = (*weights, _empty(DIMENSION))
    y = _empty(CHANNELS, PATCHES, DIMENSION)
    state = _empty(PATCHES, 1 + HIDDEN // 32, CHANNELS, dtype=torch.int32)
    for label, x in _images():
        rest = (y, y, state, x, *parameters, *sizes)
        yield f"forward, {label}", op.forward, (x, *parameters, *sizes)
        yield f"backward, {label}", op.backward, (*rest, False)
        yield f"added to a gradient, {label}", op.add_backward, (x, *rest)
        yield f"weights, {label}", op.backward, (*rest, True)
    for x in (_empty(1, CHANNELS, SIZE, SIZE), _empty(1, CHANNELS, SIZE, SIZE, dtype=TYPES[-1])):
        for grade in ONE_PRODUCT:
            rest = (y, y, state, x, *parameters, *sizes)
            label = f"products in {grade} of {str(x.dtype).removeprefix('torch.')}"
            yield f"forward, {label}", op.forward, (x, *parameters, *sizes, grade)
            yield f"weights, {label}", op.backward, (*rest, True, grade)


def _sinkhorn() -> Cases:
    op = OPS["sinkhorn"].implementation("triton")
    for dtype in TYPES:
        s = _empty(CHANNELS, PATCHES, PATCHES, dtype=dtype)
        for cost, tolerance in (("hard", None), ("exp", None), ("hard", 1e-6)):
            label = f"{str(dtype).removeprefix('torch.')} {cost}{' tolerance' if tolerance else ''}"
            options = (cost, 0.05, 50, tolerance)
            yield f"forward, {label}", op.forward, (s, *options)
            yield f"backward, {label}", op.backward, (s, s, *options)


def _monce() -> Cases:
    op, grad = OPS["monce"].implementation("triton"), _empty(TOP_M, PATCHES)
    state = _empty(TOP_M, 1 + 4 * KEPT, PATCHES, dtype=torch.int32)
    for dtype in TYPES:
        q = _empty(TOP_M, PATCHES, DIMENSION, dtype=dtype)
        for cost, epsilon, gradient in (
            ("hard", 1.0, "exact"),
            ("hard", 1.0, "detach"),
            ("exp", 1.0, "exact"),
            ("exp", 1.0, "detach"),
            ("hard", 0.005, "exact"),
        ):
            options = (0.07, epsilon, 50, 1.0, cost, gradient)
            label = f"{str(dtype).removeprefix('torch.')} {cost} {gradient} epsilon {epsilon:g}"
            yield f"forward, {label}", op.forward, (q, q, *options)
            yield f"backward, {label}", op.backward, (grad, q, q, state, *options)
    q, options = _empty(TOP_M, MANY_PATCHES, DIMENSION), (0.07, 1.0, 50, 1.0, "hard", "exact")
    yield f"forward, {MANY_PATCHES} patches", op.forward, (q, q, *options)
    of_many = _empty(TOP_M, MANY_PATCHES)
    state_of_many = _empty(*state.shape[:2], MANY_PATCHES, dtype=state.dtype)
    yield (
        f"backward, {MANY_PATCHES} patches",
        op.backward,
        (of_many, q, q, state_of_many, *options),
    )
    q = _empty(TOP_M, PATCHES, DIMENSION)
    for grade in ONE_PRODUCT:
        yield f"forward, products in {grade}", op.forward, (q, q, *options, grade)
        yield f"backward, products in {grade}", op.backward, (grad, q, q, state, *options, grade)


def _dec() -> Cases:
    op, grad = OPS["dec"].implementation("triton"), _empty()
    statistics = _empty(2, DEC_PATCHES)
    for dtype in TYPES:
        x = _empty(DEC_PATCHES, DEC_DEPTH, dtype=dtype)
        label = str(dtype).removeprefix("torch.")
        options = (20.0, 0.1, 0.1, "inside", "rmse", 1.0, 0.3)
        yield f"forward, {label}", op.forward, (x, x, *options)
        yield f"backward, {label}", op.backward, (grad, x, x, statistics, *options)


CASES: Mapping[str, Callable[[], Cases]] = {
    "content_style": _content_style,
    "coupling": _coupling,
    "dec": _dec,
    "entropy": _entropy,
    "gram": _gram,
    "monce": _monce,
    "patches": _patches,
    "sinkhorn": _sinkhorn,
}
