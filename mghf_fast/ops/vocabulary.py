"""The ops' vocabulary: their options' allowed strings and limits, a block's weights, and the shapes
of what a forward saves for its backward.

The module imports nothing of the package, so that contracts and backends alike can import it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# ---- coupling ----

ACTIVATIONS = ("relu6", "softplus", "leaky_relu")
SUBNETS = ("bottleneck", "conv2")


class BlockWeights(NamedTuple):
    """The weights of an invertible block, kernels in PyTorch's (out, in, kh, kw) layout.

    ``mix_weight`` is (C, C, 1, 1). For a block with the preceding linear layer folded into the mix
    (such a block has no inverse) it is (C, any, 3, 3), a convolution with zero padding, or
    (C, any, 1, 1), which only the backends take, not :mod:`functional`.

    ``phi``, ``rho`` and ``eta`` hold (expand, depthwise, project) for ``subnet="bottleneck"``,
    (expand, project) for ``"conv2"``.
    """

    mix_weight: Tensor
    mix_bias: Tensor
    phi: tuple[Tensor, ...]
    rho: tuple[Tensor, ...]
    eta: tuple[Tensor, ...]
    activation: str = "relu6"
    subnet: str = "bottleneck"
    clamp: float | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors in one fixed order: mix, then phi, rho and eta."""
        return [self.mix_weight, self.mix_bias, *self.phi, *self.rho, *self.eta]

    @classmethod
    def from_tensors(
        cls, tensors: list[Tensor], activation: str, subnet: str, clamp: float | None
    ) -> BlockWeights:
        """The inverse of :meth:`tensors`."""
        mix_weight, mix_bias, *rest = tensors
        n = len(rest) // 3
        phi, rho, eta = (tuple(rest[i * n : (i + 1) * n]) for i in range(3))
        return cls(mix_weight, mix_bias, phi, rho, eta, activation, subnet, clamp)


class PackedWeights(list[Tensor]):
    """A block's frozen weights, and in ``flat`` all of their numbers in float32, the form that the
    compiled kernels take. ``packed`` is a backend's own form of them, made at its first use, by the
    backend's name and the images' type."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__(tensors)
        self.flat = flat(list(self))
        self.packed: dict[tuple[str, torch.dtype], Tensor] = {}


def flat(tensors: list[Tensor]) -> Tensor:
    """All tensors, flattened and concatenated, in float32."""
    if isinstance(tensors, PackedWeights):
        return tensors.flat
    return torch.cat([t.detach().float().flatten() for t in tensors])


def weight_shapes(
    channels: int, subnet: str, inputs: int | None = None, kernel: int = 1
) -> list[tuple[int, ...]]:
    """The shapes of ``BlockWeights.tensors()`` for C channels and a mix of ``inputs`` channels (C
    by default) with a kernel of 1 or 3."""
    c = channels // 2
    if subnet == "conv2":
        kernels: list[tuple[int, ...]] = [(c, c, 3, 3), (c, c, 3, 3)]
    else:
        kernels = [(2 * c, c, 1, 1), (2 * c, 1, 3, 3), (c, 2 * c, 1, 1)]
    return [(channels, inputs or channels, kernel, kernel), (channels,), *kernels * 3]


def inverted_mix(weights: list[Tensor], *, check: bool) -> list[Tensor]:
    """The weights of a block's inverse: the mix's inverse (C, C) in float32, minus its product with
    the bias, and the other weights unchanged. With ``check`` a singular mix raises
    ``torch.linalg.LinAlgError``; otherwise the inverse has NaN or infinities, and the host does not
    wait for the device."""
    mix, bias, *rest = weights
    matrix = mix.detach().flatten(1).double()
    inverse = torch.linalg.inv(matrix) if check else torch.linalg.inv_ex(matrix).inverse
    return [inverse.float(), (-inverse @ bias.detach().double()).float(), *rest]


def nothing_kept(x: Tensor) -> Tensor:
    """The state of a forward of `coupling` that keeps nothing for its backward, uint8 (0,)."""
    return x.new_empty(0, dtype=torch.uint8)


# ---- content_style ----

# naive, mse, correlation, gram: (B,) each; kept, weights: (B, M); moments: (B, 6, M);
# difference: (B, M, M), or (B, 0, 0) for gram="map". The last two are statistics that reduce the
# backward to one sweep.
ContentStyleOutputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

VARIANCE_FLOOR = 1e-8
"""Minimum variance of a map in its correlation."""


# ---- patches ----


def patches_shapes(
    x: Tensor, weight1: Tensor, weight2: Tensor, patch_size: int, stride: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The shapes of the embeddings, (B C, N, D), and of the state, (N, 1 + words, B C)."""
    b, c, h, w = x.shape
    n = ((h - patch_size) // stride + 1) * ((w - patch_size) // stride + 1)
    return (b * c, n, weight2.shape[0]), (n, 1 + (weight1.shape[0] + 31) // 32, b * c)


# ---- sinkhorn and monce ----

COSTS = ("hard", "easy", "exp")
PLAN_GRADIENTS = ("exact", "detach")

MOST_PATCHES = 1 << 20
"""Maximum number of patches per map in the compiled CUDA kernels."""

KEPT = 6
"""Maximum number of Sinkhorn iterations that the forward of `monce` saves for its backward: enough
for epsilon 1."""


def kept_iterations(iterations: int) -> int:
    return min(iterations, KEPT)


def monce_state_shape(query: Tensor, iterations: int) -> tuple[int, int, int]:
    """The shape of the forward's state in `monce`, int32: a row with the number of iterations made,
    0 if the backward must recompute them, and four rows for each kept iteration in a layout of the
    backend's."""
    return (query.shape[0], 1 + 4 * kept_iterations(iterations), query.shape[1])


# ---- dec ----

RMS_FLOOR = 0.02
"""The default floor of norms, as a patch's root mean square in units of ``max_value``. A patch's
gradient is inversely proportional to its norm; with this floor a black patch's is about as large as
a dark one's."""
SIMILARITIES = ("rmse", "l2")
TEMPERATURES = ("inside", "outside")

LEAST_TEMPERATURE = 0.013
"""Minimum temperature in the kernels, which sum exp(cos / t) unscaled: at this temperature float32
holds the sums of 44,000 identical patches. The reference scales every row by its largest term."""
