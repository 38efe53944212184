"""The CUDA kernels of `coupling` on the host, against the float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import draws
import numpy as np
import pytest
import torch
from cuda_host import load
from emulated import KINDS, Call, module, needs_modules, results, strided
from torch import Tensor

from mghf_fast import native
from mghf_fast.nn import InvertibleBlock
from mghf_fast.ops import OPS
from mghf_fast.ops.native.coupling import state_shape
from mghf_fast.ops.vocabulary import ACTIVATIONS, BlockWeights, PackedWeights, weight_shapes
from mghf_fast.precision import PRECISIONS
from mghf_fast.reference import coupling as reference

pytestmark = needs_modules

SMALL_GPU = (99 << 10, False)


class Problem(NamedTuple):
    x: Tensor
    grad: Tensor
    weights: BlockWeights

    def flat(self) -> np.ndarray[Any, Any]:
        return torch.cat([t.float().flatten() for t in self.weights.tensors()]).numpy()

    def options(self) -> tuple[Any, ...]:
        channels, _, kernel, _ = self.weights.mix_weight.shape
        return channels, kernel, self.weights.activation, self.weights.clamp or 0.0

    def calls(self) -> list[Call]:
        options = (self.flat(), *self.options())
        return [
            ("coupling", (strided(self.x), *options)),
            ("coupling_backward", (strided(self.grad), strided(self.x), *options, False)),
        ]

    def pack(self) -> Call:
        return "coupling_pack", (strided(self.x), self.flat(), *self.options()[:2])

    def keeping(self, packed: np.ndarray[Any, Any]) -> Call:
        return "coupling_packed", (strided(self.x), self.flat(), packed, *self.options(), True)

    def from_state(self, packed: np.ndarray[Any, Any], state: np.ndarray[Any, Any]) -> Call:
        given = (strided(self.grad), strided(self.x), self.flat(), packed, state)
        return "coupling_packed_backward", (*given, *self.options())

    def as_dtype(self, dtype: torch.dtype) -> Problem:
        tensors = [t.to(dtype) for t in self.weights.tensors()]
        weights = BlockWeights.from_tensors(tensors, *self.weights[5:])
        return Problem(self.x.to(dtype), self.grad.to(dtype), weights)

    def expected(self) -> list[Tensor]:
        """Value and gradient, with every step rounded to the type of x."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "accumulation_dtype", lambda dtype: dtype)
            y = reference.invertible_block(self.x, self.weights)
            grad, _ = reference.invertible_block_backward(self.grad, self.x, self.weights, False)
            return [y, grad]


def problem(
    channels: int,
    size: tuple[int, int, int],
    inputs: int | None = None,
    kernel: int = 1,
    scale: float = 1.0,
    **options: Any,
) -> Problem:
    """A block with random weights, times ``scale``, and a batch of images for it."""
    block = InvertibleBlock(channels, **options).requires_grad_(False).weights()
    batch, height, width = size
    count = inputs or channels
    if inputs is not None or kernel == 3:
        mix = draws.randn(channels, count, kernel, kernel) / (kernel * count**0.5)
        block = block._replace(mix_weight=mix)
    block = BlockWeights.from_tensors([scale * t for t in block.tensors()], *block[5:])
    x, grad = draws.randn(batch, count, height, width), draws.randn(batch, channels, height, width)
    return Problem(x, grad, block)


HALVES = (torch.float16, torch.bfloat16)


def types() -> list[Problem]:
    small = problem(10, (2, 9, 11))
    wide = problem(128, (1, 9, 18), inputs=3, kernel=3)
    return [small, *(p.as_dtype(dtype) for p in (small, wide) for dtype in HALVES)]


def layouts() -> list[Problem]:
    p = problem(8, (2, 7, 9))
    last = torch.channels_last
    both = Problem(p.x.to(memory_format=last), p.grad.to(memory_format=last), p.weights)
    odd = problem(6, (1, 5, 6)).as_dtype(torch.bfloat16)
    large = draws.randn(2, 2, 16, 12, 21)
    sliced, transposed = large[:, :, ::2, 1::2, ::3], large[:, :, ::2, :7, :9].transpose(3, 4)
    padded = draws.randn(2, 1, 6, 7, 12)[:, :, :, :, :8].permute(0, 1, 4, 2, 3)
    return [
        both,
        Problem(both.x, p.grad, p.weights),
        Problem(p.x, both.grad, p.weights),
        both.as_dtype(torch.float16),
        Problem(odd.x.to(memory_format=last), odd.grad.to(memory_format=last), odd.weights),
        *(Problem(*images, p.weights) for images in (sliced, transposed, padded)),
        Problem(
            p.x[:1].expand(3, -1, -1, -1),
            p.grad[:, :, :1, :1].expand(-1, -1, 7, 9)[:1].expand(3, -1, -1, -1),
            p.weights,
        ),
    ]


def sizes() -> list[Problem]:
    """Tiles are 8 by 16 pixels, or 4 by 16 in the gradient of wide blocks; a side of one pixel has
    no reflection, with a side of two both reflections meet."""
    every = [(1, 1), (1, 3), (4, 1), (2, 2), (3, 17), (18, 2), (9, 33), (17, 16)]
    return [
        *(problem(4, (1, *size)) for size in every),
        *(problem(6, (2, *size), inputs=3, kernel=3) for size in ((1, 1), (1, 2), (9, 19))),
        problem(2, (1, 4, 5), inputs=1, kernel=3),
        problem(8, (1, 4, 5), inputs=20, kernel=3),
        problem(12, (1, 4, 5), inputs=5),
        problem(66, (1, 9, 4)),
        problem(130, (1, 5, 3), inputs=3),
    ]


def options() -> list[Problem]:
    """With larger weights, so that the clamp and both sides of the activations matter."""
    made = [
        problem(8, (1, 9, 11), scale=scale, activation=activation, clamp=clamp)
        for activation in ACTIVATIONS
        for scale, clamp in ((1.5, None), (3.0, 1.5))
    ]
    clamped, wide = (
        problem(8, size, inputs=3, kernel=3, scale=2.0, clamp=1.5)
        for size in ((1, 9, 11), (1, 24, 33))
    )
    # In a small image a single activation that a half's rounding moves across its kink decides.
    return [*made, clamped, *(wide.as_dtype(dtype) for dtype in HALVES)]


def broken() -> list[Problem]:
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        for value in (torch.nan, torch.inf):
            p = problem(6, (1, 14, 24)).as_dtype(dtype)
            p.x[0, 1, 2, 3] = value
            q = problem(6, (1, 14, 24)).as_dtype(dtype)
            q.grad[0, 4, 11, 20] = value
            made += [p, q]
    return made


def inverse_call(p: Problem) -> Call:
    """The call of the inverse, with ``x`` as the block's output."""
    w = p.weights
    inverse = torch.linalg.inv(w.mix_weight.double().flatten(1))
    tensors = [inverse, -inverse @ w.mix_bias.double(), *w.tensors()[2:]]
    flat = torch.cat([t.float().flatten() for t in tensors]).numpy()
    return "coupling_inverse", (strided(p.x), flat, p.x.shape[1], w.activation, w.clamp or 0.0)


def tensor_of(array: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor


def run(kind: str, problems: list[Problem], folder: Path, *before: Call) -> list[list[Tensor]]:
    """Values and gradients; those of the first problems are bitwise the same in a second run."""
    calls = [call for p in problems for call in p.calls()]
    repeated = calls[:4] if kind == "plain" else []
    found = results(kind, [*before, *calls, *repeated], folder)[len(before) :]
    arrays = [f[0] if isinstance(f, tuple) else f for f in found]
    for one, other in zip(arrays, arrays[len(calls) :], strict=False):
        assert np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()
    both = zip(arrays[: len(calls) : 2], arrays[1 : len(calls) : 2], problems, strict=True)
    return [[tensor_of(a, p.x.dtype) for a in pair] for *pair, p in both]


def run_keeping(
    kind: str, problems: list[Problem], folder: Path, *before: Call
) -> list[list[Tensor]]:
    """Values, and gradients from what the forward has kept, with weights packed before."""

    def found(calls: Any) -> Any:
        return results(kind, [*before, *calls], folder)[len(before) :]

    packed = found(p.pack() for p in problems)
    kept: Any = found(p.keeping(each) for p, each in zip(problems, packed, strict=True))
    states = [state for _, state in kept]
    for p, state in zip(problems, states, strict=True):
        expected = state_shape(p.x, p.weights.tensors(), p.weights.activation, True)
        assert state.shape == expected and state.dtype == np.uint8
    given = zip(problems, packed, states, strict=True)
    grads = found(p.from_state(*of) for p, *of in given)
    pairs = zip([y for y, _ in kept], grads, problems, strict=True)
    return [[tensor_of(a, p.x.dtype) for a in pair] for *pair, p in pairs]


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check(
    kind: str, problems: list[Problem], folder: Path, *before: Call, by: Any = (run, run_keeping)
) -> None:
    for way in by:
        check_results(problems, way(kind, problems, folder, *before))


def check_results(problems: list[Problem], results_of_all: list[list[Tensor]]) -> None:
    for p, found in zip(problems, results_of_all, strict=True):
        exact, roundoff = p.as_dtype(torch.float64).expected(), torch.finfo(p.x.dtype).eps
        allowed = [1e-5, 1e-4]
        if p.x.dtype != torch.float32:
            own = [relative_error(a, b) for a, b in zip(p.expected(), exact, strict=True)]
            allowed = [2 * max(error, roundoff / 4) for error in own]
        for got, want, tolerance in zip(found, exact, allowed, strict=True):
            assert got.dtype == p.x.dtype and got.shape == want.shape
            assert relative_error(got, want) <= tolerance, (p.x.shape, p.weights.activation)


OLDER: Call = ("use_older", ("coupling", True))  # without coupling_rows.h


@pytest.mark.parametrize("before", [(), (OLDER,)], ids=["newer", "older"])
@pytest.mark.parametrize("problems", [types, layouts, sizes, options])
def test_coupling(problems: Any, before: tuple[Call, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    check("plain", problems(), tmp_path, *before)


def strips() -> list[Problem]:
    """Strips of 64 columns, of which 62 count, or 63 at a border."""
    return [
        *(problem(4, (1, 3, width)) for width in (63, 64, 65, 126, 127)),
        problem(66, (2, 10, 64)),
        problem(66, (1, 2, 67)).as_dtype(torch.bfloat16),
        problem(66, (1, 10, 67), activation="leaky_relu"),
        problem(34, (1, 4, 67), activation="leaky_relu").as_dtype(torch.float16),
    ]


def test_rows_in_strips(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check("plain", strips(), tmp_path)


def test_coupling_on_a_small_gpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = [problem(66, (1, 5, 4), inputs=3), problem(130, (1, 2, 3), inputs=3)]
    check("plain", problems, tmp_path, ("set_gpu", SMALL_GPU))


BANDS: Call = ("set_coupling_feature_bytes", (1,))  # of 8 rows, the fewest


def banded() -> list[Problem]:
    torch.manual_seed(0)
    return [
        problem(10, (2, 27, 5)),
        problem(6, (1, 18, 19), inputs=3, kernel=3),
        problem(4, (1, 9, 3)),  # the last band has one row
        problem(10, (1, 27, 5), activation="leaky_relu"),
        problem(6, (1, 17, 4), inputs=3, kernel=3).as_dtype(torch.bfloat16),
    ]


def test_rows_in_bands(tmp_path: Path) -> None:
    problems = banded()
    check("plain", problems, tmp_path, BANDS)
    whole, some = (
        [
            *run("plain", problems, tmp_path, *before),
            *run_keeping("plain", problems, tmp_path, *before),
        ]
        for before in ((), (BANDS,))
    )
    for p, one, other in zip(2 * problems, whole, some, strict=True):
        for a, b in zip(one, other, strict=True):
            tolerance = 1e-5 if p.x.dtype == torch.float32 else torch.finfo(p.x.dtype).eps
            assert relative_error(a, b.double()) <= tolerance
    calls = [inverse_call(p) for p in problems if p.x.shape[1] == len(p.weights.mix_bias)]
    found = [
        results("plain", [*before, *calls], tmp_path)[-len(calls) :] for before in ([], [BANDS])
    ]
    for of_whole, of_some in zip(*found, strict=True):
        assert (np.asarray(of_whole) == np.asarray(of_some)).all()


@pytest.mark.parametrize("kind", ["thread", "address"])
def test_rows_in_bands_under_a_sanitizer(kind: str, tmp_path: Path) -> None:
    check(kind, banded()[:2], tmp_path, BANDS)


def test_no_wrong_number_comes_of_nan_or_infinity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = broken()
    found_by_both = [*run("plain", problems, tmp_path), *run_keeping("plain", problems, tmp_path)]
    for p, found in zip(2 * problems, found_by_both, strict=True):
        for got, want in zip(found, p.as_dtype(torch.float64).expected(), strict=True):
            assert got[want.isnan()].isnan().all()
            finite = got.isfinite()
            assert finite.any() and want[finite].isfinite().all()
            tolerance = 1e-4 if got.dtype == torch.float32 else 0.1
            torch.testing.assert_close(
                got[finite].double(), want[finite], rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("kind", KINDS)
def test_inverse(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = problem(10, (1, 4, 5), activation="softplus", clamp=1.5)
    problems = [small, *(small.as_dtype(dtype) for dtype in (torch.float16, torch.bfloat16))]
    if kind == "plain":
        image = draws.randn(1, 5, 7, 66).permute(0, 3, 1, 2)
        problems += [problem(8, (2, 9, 18)), problem(66, (1, 1, 1))._replace(x=image)]
    calls = [inverse_call(p) for p in problems]
    for p, array in zip(problems, results(kind, calls, tmp_path), strict=True):
        got = tensor_of(array, p.x.dtype)
        exact = p.as_dtype(torch.float64)
        want = reference.invertible_block_inverse(exact.x, exact.weights)
        # Only the weights and the result are rounded, whatever the image is.
        tolerance = 1e-5 if p.x.dtype == torch.float32 else torch.finfo(p.x.dtype).eps
        assert relative_error(got, want) <= tolerance


@pytest.mark.parametrize("kind", KINDS[1:])
def test_coupling_under_a_sanitizer(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    p = problem(6, (1, 9, 17), inputs=3, kernel=3)
    last = problem(34, (1, 3, 4)).as_dtype(torch.bfloat16)
    last = Problem(last.x.to(memory_format=torch.channels_last), last.grad, last.weights)
    leaky = problem(10, (1, 9, 17), activation="leaky_relu")
    check(kind, [p, last, problem(34, (1, 2, 3), inputs=5), leaky], tmp_path)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_wide_coupling_under_a_sanitizer(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    problems = [problem(130, (1, 2, 3), inputs=3), problem(66, (1, 3, 2), inputs=3)]
    check(kind, [p.as_dtype(torch.float16) for p in problems], tmp_path)
    check(kind, problems[1:], tmp_path, ("set_gpu", SMALL_GPU))


# ---- what the forward keeps ----


def at_kinks(dtype: torch.dtype, activation: str, clamp: float | None = None) -> Problem:
    """All values are small whole numbers, halves of them or a NaN, so that each hidden layer meets
    0 and 6 exactly, and whole tiles have a halo."""
    p = problem(8, (1, 19, 21), activation=activation, clamp=clamp)
    tensors = []
    for i, w in enumerate(p.weights.tensors()):
        values = torch.arange(w.numel()).view(w.shape)
        tensors.append(((7 * values + 3 * i) % 5 - 2).to(w.dtype) / (2 if w.dim() == 4 else 1))
    weights = BlockWeights.from_tensors(tensors, *p.weights[5:])
    # rho is small: otherwise exp(r) overflows.
    *layers, project = weights.rho
    weights = weights._replace(rho=(*layers, project / 64))
    x = draws.randint(-2, 3, tuple(p.x.shape)).float()
    x[0, 1, 9, 15] = torch.nan
    return Problem(x, draws.randint(-2, 3, tuple(p.grad.shape)).float(), weights).as_dtype(dtype)


def bits_of(state: Tensor, p: Problem) -> Tensor:
    """(6, 2 c, H, W): a bit for each channel of the hidden layers, without the padding."""
    channels = p.weights.mix_bias.shape[0]
    words = state[0, :, :, -3 * 16 :].reshape(*state.shape[1:3], 6, -1)
    bits = words[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(3)[..., :channels].permute(2, 3, 0, 1)


@pytest.mark.parametrize("activation", ["relu6", "leaky_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slopes_at_kinks(dtype: torch.dtype, activation: str) -> None:
    """Bit by bit the reference's slopes, where its activations are exact."""
    p = at_kinks(dtype, activation)
    w = p.weights
    forward = OPS["coupling"].implementation("cuda").forward
    _, state = forward(p.x, w.tensors(), activation, "bottleneck", None, True)
    exact = p.as_dtype(torch.float64)
    seen: list[Tensor] = []
    activate = reference._activate

    def watch(x: Tensor, name: str) -> Tensor:
        seen.append(x)
        return activate(x, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_activate", watch)
        reference.invertible_block(exact.x, exact.weights)
    # A half rounds what follows phi's first layer, and 0.01 x is exact in no type.
    all_exact = dtype == torch.float32 and activation == "relu6"
    found = bits_of(state, p)
    for layer, before in enumerate(seen[: 6 if all_exact else 1]):
        before = before[0, :, 1:-1, 1:-1] if before.shape[2:] != p.x.shape[2:] else before[0]
        expected = reference._activation_slope(before, activation) == 1
        assert torch.equal(found[layer].bool(), expected), layer
        if layer < 2:
            assert (before == 0).any() and (activation != "relu6" or (before == 6).any())
    assert any(x.isnan().any() for x in seen)


@pytest.mark.parametrize("activation", ["relu6", "leaky_relu"])
@pytest.mark.parametrize("clamp", [None, 1.5])
def test_gradient_at_kinks(activation: str, clamp: float | None) -> None:
    """A float32 gradient whose slopes are all decided by exact numbers, NaN included."""
    p = at_kinks(torch.float32, activation, clamp)
    cuda, options = OPS["coupling"].implementation("cuda"), (activation, "bottleneck", clamp)
    tensors = p.weights.tensors()
    _, state = cuda.forward(p.x, tensors, *options, True)
    nothing = state.new_empty(0)
    (want,) = p.as_dtype(torch.float64).expected()[1:]
    for kept in (state, nothing):
        (got,) = cuda.backward(p.grad, p.x, tensors, kept, *options, False)
        assert got[want.isnan()].isnan().all()
        finite = got.isfinite()
        assert finite.any() and want[finite].isfinite().all()
        assert relative_error(got[finite], want[finite]) <= 1e-4


def test_large_and_small_scales() -> None:
    """exp(r) of a clamped r that a half rounds to zero or to infinity."""
    p = problem(4, (1, 5, 6), clamp=30.0)
    *layers, project = p.weights.rho
    p = p._replace(weights=p.weights._replace(rho=(*layers, 1e3 * project))).as_dtype(torch.float16)
    cuda, options = OPS["coupling"].implementation("cuda"), ("relu6", "bottleneck", 30.0)
    _, state = cuda.forward(p.x, p.weights.tensors(), *options, True)
    scales = state[..., :8].contiguous().view(torch.float16)
    assert (scales == 0).any()
    grads = []
    for kept in (state, state.new_empty(0)):
        grads.append(cuda.backward(p.grad, p.x, p.weights.tensors(), kept, *options, False)[0])
    assert torch.equal(grads[0].isfinite(), grads[1].isfinite())


@pytest.mark.parametrize("activation", ["relu6", "leaky_relu"])
@pytest.mark.parametrize(
    ("channels", "size", "inputs", "kernel"),
    [(66, (1, 3, 67), 66, 1), (66, (1, 5, 6), 3, 3), (34, (1, 5, 6), 34, 1), (12, (1, 4, 5), 3, 3)],
)
def test_products_of_less_precision(
    channels: int, size: tuple[int, int, int], inputs: int, kernel: int, activation: str
) -> None:
    """By rows they are one of halves, for TF32 and bfloat16 alike; the result errs by a few times
    what the factors are rounded by, and the gradient from what the forward kept likewise."""
    p = problem(channels, size, inputs, kernel, activation=activation)
    cuda, options = OPS["coupling"].implementation("cuda"), (activation, "bottleneck", None)
    tensors, exact = p.weights.tensors(), p.as_dtype(torch.float64).expected()
    found, errors = {}, {}
    for precision in PRECISIONS:
        y, state = cuda.forward(p.x, tensors, *options, True, precision)
        again, _ = cuda.forward(p.x, tensors, *options, False, precision)
        assert torch.equal(y, again)
        (grad,) = cuda.backward(p.grad, p.x, tensors, state, *options, False, precision)
        found[precision] = y
        errors[precision] = [relative_error(a, b) for a, b in zip((y, grad), exact, strict=True)]
    assert torch.equal(found["tf32"], found["bfloat16"])
    assert errors["float32"][0] <= 1e-6 and 3e-5 <= errors["tf32"][0] <= 1e-3, errors
    assert errors["float32"][1] <= 1e-4 and errors["tf32"][1] <= 2e-2, errors


@pytest.mark.parametrize("activation", ["relu6", "leaky_relu"])
@pytest.mark.parametrize(
    ("channels", "size", "inputs"), [(66, (1, 3, 67), 66), (34, (1, 5, 6), 34), (12, (1, 4, 5), 3)]
)
def test_gradient_by_rows_of_less_precision(
    channels: int, size: tuple[int, int, int], inputs: int, activation: str
) -> None:
    """From one state no slope differs, and a 1x1 mix recomputes nothing: what is left is that each
    product is one of rounded factors, which three of them would be far more exact than."""
    p = problem(channels, size, inputs, activation=activation)
    cuda, options = OPS["coupling"].implementation("cuda"), (activation, "bottleneck", None)
    tensors = p.weights.tensors()
    _, state = cuda.forward(p.x, tensors, *options, True, "float32")
    exact, tf32, bfloat16 = (
        cuda.backward(p.grad, p.x, tensors, state, *options, False, precision)[0]
        for precision in PRECISIONS
    )
    assert torch.equal(tf32, bfloat16)
    assert 3e-5 <= relative_error(tf32, exact.double()) <= 2e-3


@pytest.mark.parametrize("activation", ["relu6", "leaky_relu"])
@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-5), ("tf32", 2e-3)])
@pytest.mark.parametrize("factor", [1e-20, 1e5])
def test_large_and_small_inputs(
    factor: float, precision: str, most: float, activation: str
) -> None:
    """Beyond the range of halves, also beside pixels that are not: what is lost is relative to a
    pixel's own largest number."""
    p = problem(66, (1, 7, 9), activation=activation, clamp=1.0)
    p.x[:, :, :, :4] *= factor
    exact = p.as_dtype(torch.float64)
    (y, _) = (
        OPS["coupling"]
        .implementation("cuda")
        .forward(p.x, p.weights.tensors(), activation, "bottleneck", 1.0, False, precision)
    )
    want = reference.invertible_block(exact.x, exact.weights)
    error = (y - want).norm(dim=1) / want.norm(dim=1)
    assert float(error.max()) <= most


@pytest.mark.parametrize("activation", ["relu6", "leaky_relu"])
@pytest.mark.parametrize("factor", [1e-30, 1e-8, 1.0, 1e30])
def test_gradients_of_any_magnitude(factor: float, activation: str) -> None:
    """By rows as exact as the products, whatever the gradient's magnitude, and also where pixels of
    others or zeros are beside; a row of results takes rows of three magnitudes."""
    p = problem(128, (1, 6, 70), activation=activation, clamp=2.0)
    grad = factor * p.grad
    grad[:, :, :, 30:40] *= 1e-3
    grad[:, :, 2:4, 50:] = 0
    p = p._replace(grad=grad)
    cuda, options = OPS["coupling"].implementation("cuda"), (activation, "bottleneck", 2.0)
    _, state = cuda.forward(p.x, p.weights.tensors(), *options, True)
    (got,) = cuda.backward(grad, p.x, p.weights.tensors(), state, *options, False)
    want = p.as_dtype(torch.float64).expected()[1]
    error, size = (got - want).norm(dim=1), want.norm(dim=1)
    # A pixel's own largest number, or its neighbours': what comes of nine of them, twice.
    around = torch.nn.functional.max_pool2d(size, 5, 1, 2)
    assert float((error / around).max()) <= 1e-6 and relative_error(got, want) <= 6e-7
    (nothing,) = cuda.backward(0 * grad, p.x, p.weights.tensors(), state, *options, False)
    assert (nothing == 0).all()


def test_frozen_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(8, (1, 5, 6))
    cuda, options = OPS["coupling"].implementation("cuda"), ("relu6", "bottleneck", None)
    frozen = PackedWeights(p.weights.tensors())
    ops, packings = torch.ops.mghf_cuda_host, []

    class Ops:
        def __getattr__(self, name: str) -> Any:
            if name == "coupling_pack":
                packings.append(name)
            return getattr(ops, name)

    monkeypatch.setattr(native, "cuda_ops", Ops)
    found = []
    for _ in range(2):
        y, state = cuda.forward(p.x, frozen, *options, True)
        found.append([y, *cuda.backward(p.grad, p.x, frozen, state, *options, False)])
    assert packings == ["coupling_pack"] and [*frozen.packed] == [("cuda", torch.float32)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    half = p.as_dtype(torch.float16)
    cuda.forward(half.x, frozen, *options, False)
    assert len(packings) == 2
    cuda.forward(p.x, p.weights.tensors(), *options, True)  # may change until the next call
    cuda.forward(p.x, p.weights.tensors(), *options, True)
    assert len(packings) == 4


@pytest.mark.parametrize(("inputs", "kernel", "back"), [(3, 3, 4), (128, 1, 2), (12, 1, 2)])
@pytest.mark.parametrize("size", [(1, 512, 512), (1, 1024, 1024), (16, 256, 256), (32, 64, 64)])
def test_launches(size: tuple[int, int, int], inputs: int, kernel: int, back: int) -> None:
    """The gradient in one part, whatever the size, with a workspace of at most a stack of features;
    the forward, where it takes more than 96 MiB, in two, with three quarters of a stack."""
    batch, height, width = size
    x, grad = (torch.empty(batch, c, height, width, device="meta") for c in (inputs, 128))
    shapes = weight_shapes(128, "bottleneck", inputs, kernel)
    frozen = PackedWeights(torch.empty(shape, device="meta") for shape in shapes)
    cuda, options = OPS["coupling"].implementation("cuda"), ("relu6", "bottleneck", None)
    host, stack = load(str(module("plain"))), 128 * 4 * batch * height * width

    def counted(run: Any) -> tuple[Any, int, int]:
        host.count(True)
        try:
            return run(), *host.counted()
        finally:
            host.count(False)

    counted(lambda: cuda.forward(x, frozen, *options, False))  # packs
    (_, state), launches, workspace = counted(lambda: cuda.forward(x, frozen, *options, True))
    some = 96 << 20
    assert launches == (3 if stack <= some else 6) and state.numel() < 1.2 * stack
    assert workspace <= max(some, 3 * stack // 4)
    of_state = (grad, x, frozen, state, *options, False)
    _, launches, workspace = counted(lambda: cuda.backward(*of_state))
    assert (launches, workspace) == (back, stack)
    # Weights that are not frozen are packed, and without a state all layers are recomputed.
    few = (grad[:1, :, :64], x[:1, :, :64], [*frozen], state.new_empty(0), *options, False)
    assert counted(lambda: cuda.backward(*few))[1] == 7
