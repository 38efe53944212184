"""Triton kernels of the op `coupling`: the invertible block, its inverse and its gradients.

With A the activation, D* the depthwise 3x3 with reflection, and, at every pixel,

    (z1, z2) = M x + b                        M 1x1, or 3x3 with zero padding
    h  = A(Ep z1)             z2 <- z2 + Pp A(Dp h)
    hr = A(Er z2), he = A(Ee z2)
    r  = Pr A(Dr hr)          or k tanh(r / k)
    y1 = z1 exp(r) + Pe A(De he),   y2 = z2

the forward takes three steps: M and Ep; the rest of phi with Er and Ee; the rest of rho and eta
with the coupling. Between them only z, h and (hr, he) are in memory, [pixel][channel] whatever the
image's strides are, and only for a band of rows or a few images at a time (WORKSPACE_BYTES). A
hidden layer is read by tiles of pixels whose 3x3 halo comes from the caches. All steps of all bands
are one launch (turns.py).

The gradient takes the first two steps again and then goes back in three of its own, likewise in one
launch unless the weights' gradients are needed, T marking a transposed matrix, A' the slope of the
activation, and (g1, g2) the gradient of y:

    d_r = g1 z1 exp(r) (1 - (r / k)^2)
    gr = A' Pr^T d_r,  ge = A' Pe^T g1        before the depthwise layers of rho and eta
    d2 = g2 + Er^T A' Dr^T gr + Ee^T A' De^T ge
    gp = A' Pp^T d2
    d1 = g1 exp(r) + Ep^T A' Dp^T gp
    d_x = M^T (d1, d2)

The slope is taken from the activation's value. D^T gathers: a pixel sums over those whose reflected
window holds it. Gradients of the weights are products of these with the layers' inputs, summed over
the pixels in a fixed number of parts, and then over the parts.

Floors of kernels are computed, not measured, for B = 1, C = 128 (c = 64), 512 x 512, float32, a 1x1
mix: MB at 4.3 TB/s, and multiply-adds of the products, three times in TF32 (400 TFLOP/s), those of
the gradient three times in bfloat16 (790 TFLOP/s); the depthwise layers are float32 multiply-adds
(60 TFLOP/s). With bfloat16 images (half the bytes) the products take a sixth and the bytes half of
the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mghf_fast.backends import can_run_triton
from mghf_fast.kernels import launch, turns
from mghf_fast.kernels.coupling_backward import (
    depthwise_weights_kernel,
    gather_kernel,
    grad_hidden2_kernel,
    grad_mixed_kernel,
    grad_z2_kernel,
    weights_kernel,
)
from mghf_fast.kernels.coupling_forward import (
    expand_kernel,
    mix_expand_kernel,
    phi_expand_kernel,
    uncouple_kernel,
    unmix_kernel,
)
from mghf_fast.kernels.coupling_whole import (
    BACKWARD_STEPS,
    FORWARD_STEPS,
    backward_kernel,
    forward_kernel,
)
from mghf_fast.kernels.products import dot_precision
from mghf_fast.ops.layout import empty_like_laid_out
from mghf_fast.ops.limits import block_channels, only_bottleneck
from mghf_fast.ops.vocabulary import inverted_mix, nothing_kept

WORKSPACE_BYTES, MOST_WORKSPACE_BYTES = 192 << 20, 2 << 30
"""Bounds of the memory of the hidden layers at a time. It may be as large as the stack of images at
hand, which the training step holds as well; for small stacks it is the lower bound, a twelfth of
what the reference's gradient keeps for one image of 512 x 512. The upper bound keeps pixels times
channels of a band within 32-bit indices."""

MOST_CHANNELS = 512
TILE_COLUMNS = 16  # 16 neighbours of a row of NCHW are whole sectors of memory
MULTIPLE_OF_HIDDEN = 32  # hidden layers are padded to a multiple of this many channels
BLOCK_EXACT, BLOCK_HALF = 16, 32  # channels at a time, in float32 and in half precision
BLOCK_WEIGHTS = 64
NUM_WARPS = 8
NUM_STAGES = 1  # more would copy the weights, and all taps of a layer, into shared memory ahead
# Precision of the products of float32 layers. In the gradient bf16x3 errs by 4.5e-6, where 1e-4 is
# allowed, and takes half of the time and two thirds of the registers; in the forward, and where the
# gradient recomputes it, it would move activations across their kinks.
PRECISION, GRADIENT_PRECISION = "tf32x3", launch.GRADIENT_PRECISION.value
GRADIENT_KERNELS = (grad_hidden2_kernel, grad_z2_kernel, grad_mixed_kernel)
MOST_PARTS, PIXELS_OF_A_PART = 64, 256  # of a sum over pixels


@dataclass(frozen=True)
class Shape:
    """What the kernels are compiled for."""

    inputs: int
    channels: int
    kernel: int  # of the mix
    activation: str
    clamp: float  # 0 for none
    layers: torch.dtype  # of the layers in memory between the kernels, and of the products' factors
    precision: str = "float32"  # of the products of float32 layers

    @property
    def block_half(self) -> int:
        return max(16, triton.next_power_of_2(self.channels // 2))

    @property
    def padded_hidden(self) -> int:
        return launch.blocks(self.channels, MULTIPLE_OF_HIDDEN) * MULTIPLE_OF_HIDDEN

    @property
    def exact(self) -> bool:
        return self.layers == torch.float32

    @property
    def terms(self) -> int:
        """Products that are summed for a channel of the mix."""
        return self.inputs * self.kernel**2

    @property
    def tile_rows(self) -> int:
        # Both halves of a tile's channels must fit the registers of eight warps.
        return min(4, max(1, 256 // self.block_half))

    def product(self, of_gradient: bool) -> Any:
        """The precision of a kernel's products. For TF32 those of the gradient stay three of
        bfloat16, the time of one and a half: with one `grad_z2_kernel` spills on sm_90."""
        if of_gradient:
            once = self.exact and self.precision == "bfloat16"
            return dot_precision("bfloat16" if once else "float32", GRADIENT_PRECISION)
        return dot_precision(self.precision, PRECISION) if self.exact else PRECISION

    def constants(self, kernel: Any, **flags: int) -> dict[str, Any]:
        """The compile-time arguments of a kernel."""
        block = BLOCK_EXACT if self.exact else BLOCK_HALF
        known = {
            "INPUTS": self.inputs,
            "KERNEL": self.kernel,
            "HALF": self.channels // 2,
            "HIDDEN": self.channels,
            "BLOCK_HALF": self.block_half,
            "BLOCK_HIDDEN": block,
            "PADDED_HIDDEN": self.padded_hidden,
            "BLOCK_INPUTS": block,
            "BLOCK_CHANNELS": 4,
            "TILE_ROWS": self.tile_rows,
            "TILE_COLUMNS": TILE_COLUMNS,
            "ACTIVATION": self.activation,
            "CLAMP": self.clamp,
            "OPERAND": _operand(self.layers),
            "PRECISION": self.product(kernel in GRADIENT_KERNELS),
            "GRADIENT_PRECISION": self.product(True),
            **flags,
        }
        return {name: known[name] for name in kernel.arg_names if name in known}


def _operand(layers: torch.dtype) -> Any:
    return {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }[layers]


@dataclass(frozen=True)
class Band:
    """Whole images, or a band of rows of one: what is in memory at a time."""

    first_image: int
    images: int
    first_row: int
    rows: int
    # The rows whose results count, counted from the image's first; the others are their halo.
    own_begin: int
    own_end: int


def workspace_bytes(stack: Tensor, less: int = 0) -> int:
    """The most memory of the layers where ``stack`` (B, C, H, W) is what is computed or given, and
    ``less`` bytes are needed besides."""
    size = stack.numel() * stack.itemsize - less
    return min(max(WORKSPACE_BYTES, size), MOST_WORKSPACE_BYTES)


@dataclass(frozen=True)
class Cut:
    """How (B, any, H, W) images are cut into bands, whose layers fit into memory: groups of images,
    or an image's rows with a halo."""

    batch: int
    height: int
    halo: int
    images: int
    rows: int
    """The own rows of a band."""

    @classmethod
    def of(cls, shape: torch.Size, halo: int, bytes_per_pixel: int, room: int) -> Cut:
        """Bands of about equal size whose layers fit into ``room`` bytes."""
        batch, _, height, width = shape
        images = room // (bytes_per_pixel * height * width)
        if images > 0:
            images = launch.blocks(batch, launch.blocks(batch, images))
            return cls(batch, height, halo, images, height)
        most = max(1, room // (bytes_per_pixel * width) - 2 * halo)
        rows = launch.blocks(height, launch.blocks(height, most))
        return cls(batch, height, halo, 1, rows)

    @property
    def number(self) -> int:
        return launch.blocks(self.batch, self.images) * launch.blocks(self.height, self.rows)

    @property
    def most_rows(self) -> int:
        """The most rows that a band has, of one image and with its halo."""
        return min(self.height, self.rows + 2 * self.halo)

    def bands(self) -> Iterator[Band]:
        for image in range(0, self.batch, self.images):
            for begin in range(0, self.height, self.rows):
                end = min(begin + self.rows, self.height)
                first, last = max(begin - self.halo, 0), min(end + self.halo, self.height)
                count = min(self.images, self.batch - image)
                yield Band(image, count, first, last - first, begin, end)


class Run:
    """The kernels of one call. Arguments of a kernel are found by their names: layers and weights,
    strides, sizes of the band or of all bands, compile-time constants."""

    def __init__(
        self,
        shape: Shape,
        weights: dict[str, Tensor],
        image: Tensor,
        halo: int,
        layers: dict[str, int],
        room: int,
    ) -> None:
        self.shape = shape
        self.image = image
        self.architecture = launch.architecture_of(image)
        bytes_per_pixel = sum(layers.values()) * shape.layers.itemsize
        self.cut = Cut.of(image.shape, halo, bytes_per_pixel, room)
        pixels = self.cut.images * self.cut.most_rows * image.shape[3]
        self.tensors = {name: w.contiguous() for name, w in weights.items()}
        for name, channels in layers.items():
            self.tensors[name] = image.new_empty((pixels, channels), dtype=shape.layers)
        # Images that a variant of a kernel does not use have strides of zero.
        named = ("x", "y", "grad", "grad_x")
        self.strides = {f"{name}_{axis}": 0 for name in named for axis in _AXES}

    def add_image(self, name: str, image: Tensor, strides: str) -> None:
        self.tensors[name] = image
        for axis, stride in zip(_AXES, image.stride(), strict=True):
            self.strides[f"{strides}_{axis}"] = stride

    def most_registers(self, kernel: Any) -> int | None:
        """The limit of registers per thread. With 128 two programs share a multiprocessor. Without
        a limit ptxas spills a few words to reach a round number."""
        if kernel in (forward_kernel, backward_kernel):
            few = not self.shape.exact and self.shape.kernel == 1 and self.architecture >= 90
            return 128 if few else launch.MOST_REGISTERS
        if not self.shape.exact:
            return 128 if kernel in (phi_expand_kernel, grad_z2_kernel) else None
        if kernel in (grad_z2_kernel, grad_mixed_kernel) and self.architecture >= 90:
            return 128
        return launch.MOST_REGISTERS if kernel in (grad_hidden2_kernel, unmix_kernel) else None

    def _tiles(self, images: int, rows: int) -> int:
        across = launch.blocks(self.image.shape[3], TILE_COLUMNS)
        return images * launch.blocks(rows, self.shape.tile_rows) * across

    def _launch(
        self, kernel: Any, programs: int, sizes: dict[str, int | None], **flags: int
    ) -> None:
        known = {**self.tensors, **self.strides, **sizes, "width": self.image.shape[3]}
        # A layer that this variant of the kernel does not use has no memory; any pointer will do.
        anything = self.tensors["z"]
        constants = self.shape.constants(kernel, **flags)
        arguments = {
            name: known.get(name, anything) for name in kernel.arg_names if name not in constants
        }
        kernel[(programs,)](
            **arguments,
            **constants,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            maxnreg=self.most_registers(kernel),
        )

    def start(self, kernel: Any, band: Band, **flags: bool) -> None:
        """One step of one band."""
        sizes = dataclasses.asdict(band) | {"height": self.cut.height, "tile": None}
        self._launch(kernel, self._tiles(band.images, band.rows), sizes, **flags)

    def start_all(self, kernel: Any, steps: int) -> None:
        """All steps of all bands, as one launch."""
        cut = self.cut
        tiles = self._tiles(cut.images, cut.most_rows)
        if (programs := cut.number * steps * tiles) == 0:
            return
        self.tensors["counters"] = turns.counters_for(self.image)
        sizes: dict[str, int | None] = {
            "batch": cut.batch,
            "images": cut.images,
            "own_rows": cut.rows,
            "height": cut.height,
            "tiles": tiles,
        }
        self._launch(kernel, programs, sizes, HALO=cut.halo)


def _named_weights() -> list[str]:
    """Names of the block's weights, in the order of the op's arguments."""
    subnets = [f"{subnet}_{layer}" for subnet in ("phi", "rho", "eta") for layer in _LAYERS]
    return ["mix", "bias", *subnets]


def _named(tensors: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(_named_weights(), tensors, strict=True))


_LAYERS = ("expand", "depthwise", "project")
_AXES = ("batch", "channel", "row", "column")


def _shape(
    weights: list[Tensor],
    activation: str,
    clamp: float | None,
    layers: torch.dtype,
    precision: str = "float32",
) -> Shape:
    channels, inputs, kernel, _ = weights[0].shape
    return Shape(inputs, channels, kernel, activation, clamp or 0.0, layers, precision)


def forward(
    x: Tensor,
    weights: list[Tensor],
    activation: str,
    subnet: str,
    clamp: float | None,
    keep: bool,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """The block's value, (B, C, H, W), at x (B, inputs, H, W) of any strides, laid out as x, and an
    empty state. In addition it needs memory for 8 C values of the dtype of x per pixel of a band
    (if c is a power of 2, at least 16), up to `workspace_bytes` of the value."""
    y = empty_like_laid_out(x, channels=weights[0].shape[0])
    with launch.on_device_of(x):
        shape = _shape(weights, activation, clamp, x.dtype, precision)
        hidden = shape.padded_hidden
        layers = {"z": 2 * shape.block_half, "hidden1": hidden, "hidden2": 2 * hidden}
        run = Run(shape, _named(weights), x, 2, layers, workspace_bytes(y))
        run.add_image("x", x, "x")
        run.add_image("y", y, "y")
        run.start_all(forward_kernel, FORWARD_STEPS.value)
    return y, nothing_kept(x)


def inverse(
    y: Tensor, weights: list[Tensor], activation: str, subnet: str, clamp: float | None
) -> Tensor:
    """The x at which the block's value is y, both (B, C, H, W), laid out as y. Layers are kept in
    float32. A singular mix gives NaN or infinities."""
    x = empty_like_laid_out(y)
    with launch.on_device_of(y):
        matrix, bias, *rest = inverted_mix(weights, check=False)
        shape = _shape([matrix[:, :, None, None]], activation, clamp, torch.float32)
        hidden = shape.padded_hidden
        layers = {"z": shape.block_half, "hidden1": hidden, "hidden2": 2 * hidden}
        named = _named([matrix, bias, *rest])
        named["inverse"] = named.pop("mix")
        run = Run(shape, named, y, 2, layers, workspace_bytes(y))
        run.add_image("y", y, "y")
        run.add_image("x", x, "x")
        for band in run.cut.bands():
            run.start(expand_kernel, band)
            run.start(uncouple_kernel, band)
            run.start(unmix_kernel, band)
    return x


def backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    state: Tensor,
    activation: str,
    subnet: str,
    clamp: float | None,
    need_weights: bool,
    precision: str = "float32",
) -> list[Tensor]:
    """The gradient of x, laid out as x, followed by those of ``weights`` if they are needed; the
    layers are kept in float32 then."""
    grad_x = empty_like_laid_out(x)
    with launch.on_device_of(x):
        layer_type = torch.float32 if need_weights else x.dtype
        shape = _shape(weights, activation, clamp, layer_type, precision)
        hidden, half = shape.padded_hidden, shape.block_half
        layers = {
            "z": 2 * half,
            "hidden1": hidden,
            "hidden2": 2 * hidden,
            "grad2": 2 * hidden,
            "mixed": 2 * half,
            "grad1": hidden,
        }
        if shape.kernel == 3:
            layers["products"] = shape.terms
        if need_weights:
            layers |= {
                "grad_rho": half,
                "depthwise2": 2 * hidden,
                "through2": 2 * hidden,
                "depthwise1": hidden,
                "through1": hidden,
            }
        halo = 4 + shape.kernel // 2
        room = workspace_bytes(grad, less=grad_x.numel() * grad_x.itemsize)
        run = Run(shape, _named(weights), x, halo, layers, room)
        run.add_image("x", x, "x")
        run.add_image("grad", grad, "grad")
        run.add_image("grad_x", grad_x, "grad_x")
        if not need_weights:
            run.start_all(backward_kernel, BACKWARD_STEPS.value + (shape.kernel == 3))
            return [grad_x]
        sums = _Sums(run)
        for band in run.cut.bands():
            run.add_image("x", x, "x")
            run.start(mix_expand_kernel, band)
            run.start(phi_expand_kernel, band, FOR_GRADIENT=True)
            run.start(grad_hidden2_kernel, band, WITH_WEIGHTS=True)
            run.start(grad_z2_kernel, band, WITH_WEIGHTS=True)
            run.add_image("grad_x", grad_x, "x")
            run.start(grad_mixed_kernel, band, WITH_WEIGHTS=True)
            if shape.kernel == 3:
                run.start(gather_kernel, band)
            _add_weight_gradients(sums, run, band, grad, x)
        found = zip(sums.in_order(), weights, strict=True)
        return [grad_x, *(t.reshape(w.shape).to(w.dtype) for t, w in found)]


def can_run(
    *tensors: Tensor, subnet: str = "bottleneck", need_weights: bool = False, **options: Any
) -> str | None:
    if (reason := only_bottleneck(subnet)) is not None:
        return reason
    if (channels := block_channels(tensors)) > MOST_CHANNELS:
        return (
            f"its kernels keep half of a pixel's channels on chip, which goes up to "
            f"{MOST_CHANNELS} channels, and this block has {channels}"
        )
    return can_run_triton(*tensors)


def _pixel_major(image: Tensor, band: Band) -> Tensor:
    """The band's own pixels as [pixel][channel], contiguous float32."""
    own = image.narrow(0, band.first_image, band.images)[:, :, band.own_begin : band.own_end]
    return own.permute(0, 2, 3, 1).float().flatten(0, 2).contiguous()


def _terms(x: Tensor, band: Band, kernel: int) -> Tensor:
    """The factors of the mix as [pixel][term], in the order of its weights."""
    if kernel == 1:
        return _pixel_major(x, band)
    height, width = x.shape[2:]
    rows = band.own_end - band.own_begin
    images = x.narrow(0, band.first_image, band.images)
    first, last = max(band.own_begin - 1, 0), min(band.own_end + 1, height)
    above, below = first - (band.own_begin - 1), band.own_end + 1 - last
    padded = F.pad(images[:, :, first:last].float(), (1, 1, above, below))
    taps = [padded[:, :, i : i + rows, j : j + width] for i in range(3) for j in range(3)]
    terms = torch.stack(taps, 2).permute(0, 3, 4, 1, 2)
    return terms.reshape(-1, x.shape[1] * 9).contiguous()  # for one image reshape gives a view


def _parts(pixels: int) -> tuple[int, int]:
    """The number of parts of a sum over pixels, and the pixels of each; both depend on the size
    alone."""
    parts = min(MOST_PARTS, launch.blocks(pixels, PIXELS_OF_A_PART))
    return parts, launch.blocks(pixels, parts)


class _Sums:
    """The gradients of the weights, added up band by band, each in a fixed number of parts."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.found: dict[str, Tensor] = {}

    def _partial(self, name: str, parts: int, *shape: int) -> Tensor:
        """The first band is the largest, and has the most parts."""
        if name not in self.found:
            self.found[name] = self.run.image.new_zeros((parts, *shape), dtype=torch.float32)
        return self.found[name]

    def in_order(self) -> list[Tensor]:
        """The gradients in the order of the weights."""
        mix = [self.found.pop(name).sum(0) for name in ("mix1", "mix2")]
        totals = {name: partial.sum(0) for name, partial in self.found.items()}
        totals["mix"] = torch.cat(mix)
        return [totals[name] for name in _named_weights()]

    def add_rows(self, name: str, a: Tensor) -> None:
        """The sum of [pixel][channel] over the pixels."""
        self._partial(name, 1, a.shape[1])[0] += a.sum(0)

    def add_products(self, name: str, a: Tensor, b: Tensor) -> None:
        """a^T b for [pixel][channel] float32 with contiguous channels."""
        parts, pixels = _parts(a.shape[0])
        across = [launch.blocks(layer.shape[1], BLOCK_WEIGHTS) for layer in (a, b)]
        grid = (parts, *across)
        weights_kernel[grid](
            a,
            b,
            self._partial(name, parts, a.shape[1], b.shape[1]),
            0,
            a.shape[0],
            pixels,
            A_WIDTH=a.stride(0),
            A_COUNT=a.shape[1],
            B_WIDTH=b.stride(0),
            B_COUNT=b.shape[1],
            BLOCK_A=BLOCK_WEIGHTS,
            BLOCK_B=BLOCK_WEIGHTS,
            BLOCK_PIXELS=32,
            PRECISION=self.run.shape.product(True),
            num_warps=4,
            num_stages=NUM_STAGES,
            maxnreg=launch.MOST_REGISTERS,
        )

    def add_depthwise(
        self, name: str, band: Band, layer: Tensor, gradient: Tensor, own: slice
    ) -> None:
        """The gradient of a depthwise layer's weights over the band's own pixels."""
        parts, pixels = _parts(own.stop - own.start)
        hidden = self.run.shape.channels
        depthwise_weights_kernel[(parts, launch.blocks(hidden, MULTIPLE_OF_HIDDEN), 9)](
            layer,
            gradient,
            self._partial(name, parts, hidden, 9),
            own.start,
            own.stop,
            pixels,
            band.first_row,
            band.rows,
            *self.run.image.shape[2:],
            LAYER_WIDTH=layer.stride(0),
            HIDDEN=hidden,
            BLOCK_HIDDEN=MULTIPLE_OF_HIDDEN,
            BLOCK_PIXELS=64,
            num_warps=4,
            num_stages=NUM_STAGES,
        )


def _add_weight_gradients(sums: _Sums, run: Run, band: Band, grad: Tensor, x: Tensor) -> None:
    """Adds the band's share of the weights' gradients."""
    shape, width = run.shape, x.shape[3]
    half, hidden, layers = shape.channels // 2, shape.channels, run.tensors
    begin = (band.own_begin - band.first_row) * width
    own = slice(begin, begin + band.images * (band.own_end - band.own_begin) * width)
    # Offsets in layers that hold two: rho's, then eta's; z1, then z2.
    second, z2 = shape.padded_hidden, shape.block_half

    def layer(name: str, first: int, count: int) -> Tensor:
        return layers[name][own, first : first + count]

    d1, d2 = layer("mixed", 0, half), layer("mixed", z2, half)
    terms, g1 = _terms(x, band, shape.kernel), _pixel_major(grad[:, :half], band)
    sums.add_products("mix1", d1, terms)
    sums.add_products("mix2", d2, terms)
    sums.add_rows("bias", torch.cat([d1, d2], 1))
    sums.add_products("phi_expand", layer("through1", 0, hidden), layer("z", 0, half))
    sums.add_products("phi_project", d2, layer("depthwise1", 0, hidden))
    outer = {"rho": (0, layer("grad_rho", 0, half)), "eta": (second, g1)}
    for subnet, (first, projected) in outer.items():
        through, deep = layer("through2", first, hidden), layer("depthwise2", first, hidden)
        sums.add_products(f"{subnet}_expand", through, layer("z", z2, half))
        sums.add_products(f"{subnet}_project", projected, deep)
    sums.add_depthwise("phi_depthwise", band, layers["hidden1"], layers["grad1"], own)
    for subnet, (first, _) in outer.items():
        hidden2, grad2 = layers["hidden2"][:, first:], layers["grad2"][:, first:]
        sums.add_depthwise(f"{subnet}_depthwise", band, hidden2, grad2, own)
