"""The detail feature extractor: a stem and a chain of invertible blocks (HF-Diff, MGHF)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import functional, weights
from ..backends import BackendError, current_backend
from ..ops import coupling
from ..ops.vocabulary import ACTIVATIONS, SUBNETS, BlockWeights
from ..precision import without_autocast
from .initial import orthogonal, reproducibly
from .start import BLOCK_OUTPUT_RMS, STARTS, curve_block, curve_stem
from .stems import STEMS as STEMS
from .stems import SqueezeStem, make_stem

MEMORY_MODES = ("recompute", "store")
SQUEEZES = (2, 4, 8)


class Bottleneck(nn.Module):
    """The weights of one sub-network: 1x1 c -> 2c, depthwise 3x3, 1x1 2c -> c, without biases."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, groups=2 * channels, bias=False)
        self.project = nn.Conv2d(2 * channels, channels, 1, bias=False)

    def kernels(self) -> tuple[Tensor, ...]:
        return self.expand.weight, self.depthwise.weight, self.project.weight


class Conv2(nn.Module):
    """The weights of one sub-network: two 3x3 convolutions without biases (HF-Diff)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, channels, 3, bias=False)
        self.project = nn.Conv2d(channels, channels, 3, bias=False)

    def kernels(self) -> tuple[Tensor, ...]:
        return self.expand.weight, self.project.weight


class InvertibleBlock(nn.Module):
    """A learned 1x1 mix of all channels, then an affine coupling of their halves (HF-Diff eq. 5).

    Args:
        channels: C, even.
        subnet: ``"bottleneck"`` (the MGHF and CDDFuse module) or ``"conv2"`` (HF-Diff).
        activation: ``"relu6"``, or ``"softplus"`` or ``"leaky_relu"`` for a smooth or strictly
            monotone map.
        clamp: bound k of the soft clamp k tanh(rho / k) of the log scale; ``None`` leaves it free.
        memory: for the backward, ``"recompute"`` keeps the block's input, with CUDA's kernels also
            the activations' slopes as bits and the scale, and is exact; ``"store"`` keeps every
            activation and runs in plain PyTorch.
    """

    def __init__(
        self,
        channels: int = 128,
        *,
        subnet: str = "bottleneck",
        activation: str = "relu6",
        clamp: float | None = None,
        memory: str = "recompute",
    ) -> None:
        super().__init__()
        channels = check.check_integer("channels", channels, 2)
        if channels % 2:
            raise ValueError(f"channels must be an even number, 2 or more, got {channels}")
        check.check_choice("subnet", subnet, SUBNETS)
        check.check_choice("activation", activation, ACTIVATIONS)
        check.check_choice("memory", memory, MEMORY_MODES)
        if clamp is not None:
            clamp = check.check_number("clamp", clamp, positive=True)
        self.subnet, self.activation, self.clamp, self.memory = subnet, activation, clamp, memory
        self.mix = nn.Conv2d(channels, channels, 1)
        orthogonal(self.mix.weight)
        network = Bottleneck if subnet == "bottleneck" else Conv2
        self.phi, self.rho, self.eta = (network(channels // 2) for _ in range(3))

    def weights(self) -> BlockWeights:
        """The block's parameters and options as :func:`functional.invertible_block` takes them."""
        bias = self.mix.bias
        assert bias is not None
        kernels = (self.phi.kernels(), self.rho.kernels(), self.eta.kernels())
        return BlockWeights(
            self.mix.weight, bias, *kernels, self.activation, self.subnet, self.clamp
        )

    def weights_after(
        self, stem: nn.Conv2d | SqueezeStem, *, from_unit_range: bool = False
    ) -> BlockWeights:
        """The weights with ``stem``, the linear layer before the block, folded into the mix: the
        two layers become one. After a 3x3 convolution it takes the image itself, after a squeeze
        :meth:`SqueezeStem.squeezed`. With ``from_unit_range``, after a squeeze only (whose padding
        is the image's own), the map from [0, 1] to [-1, 1] that comes before is folded in too."""
        weights = self.weights()
        if isinstance(stem, SqueezeStem):
            before, offset = stem.lift.weight[:, :, None, None], None
        else:
            before, offset = stem.weight, stem.bias
            assert offset is not None and not from_unit_range
        with without_autocast(weights.mix_bias.device.type):
            # In float64, so that the rounded product does not depend on the threads' summation
            # order.
            mix, dtype = weights.mix_weight.flatten(1).double(), weights.mix_weight.dtype
            kernel = (mix @ before.flatten(1).double()).view(-1, *before.shape[1:])
            bias = weights.mix_bias.double()
            if offset is not None:
                bias = mix @ offset.double() + bias
            if from_unit_range:  # K (2 u - 1) + b
                bias = bias - kernel.flatten(1).sum(1)
                kernel = 2 * kernel
        return weights._replace(mix_weight=kernel.to(dtype), mix_bias=bias.to(dtype))

    def forward(
        self,
        x: Tensor,
        *,
        stem: nn.Conv2d | None = None,
        backend: str | None = None,
        precision: str = "auto",
    ) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); with ``stem`` the block is applied to the stem's output.

        Raises:
            RuntimeError: ``memory="store"`` under a backend other than ``"reference"``.
        """
        weights = self.weights() if stem is None else self.weights_after(stem)
        if self.memory == "store":
            chosen = current_backend(backend)
            if chosen not in ("auto", "reference"):
                raise BackendError(
                    f"backend {chosen!r} cannot run coupling with memory='store': only 'reference' "
                    "stores its activations"
                )
            return coupling.plain_block(x, weights)
        return functional.invertible_block(x, weights, backend=backend, precision=precision)

    def inverse(self, y: Tensor, *, backend: str | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W): the input whose output is ``y``."""
        return functional.invertible_block_inverse(y, self.weights(), backend=backend)

    def log_det(self, x: Tensor) -> Tensor:
        """log |det| of the block's Jacobian at ``x``: what the block adds to the differential
        entropy, once averaged over images (MGHF eq. 29; `docs/theory.md`).

        The mix contributes H W log |det mix|, the couplings the sum of rho (of the clamped rho with
        ``clamp``) over half the channels and all pixels; phi and eta contribute nothing. This needs
        no derivative of an activation, so it is exact at the kinks of ReLU6 too.

        Args:
            x: features, (B, C, H, W), on the block's device.

        Returns:
            (B,) in nats, float32 (float64 for float64). Differentiable in ``x`` and the parameters;
            it runs in plain PyTorch whatever the backend.

        Raises:
            torch.linalg.LinAlgError: the mix is a singular matrix, so the block has no inverse and
                the logarithm is minus infinity.
        """
        weights = self.weights()
        channels = weights.mix_bias.shape[0]
        check.check_tensor("x", x, "(B, C, H, W)", tangents=True)
        if x.shape[1] != channels:
            raise ValueError(
                f"x must have the block's {channels} channels, got {x.shape[1]} "
                f"(shape {tuple(x.shape)})"
            )
        check.check_device("x", x, "the block", weights.mix_weight)
        _check_regular(weights.mix_weight.detach().flatten(1).cpu().double())
        with without_autocast(x.device.type):
            return coupling.log_det(x, weights)


def _check_regular(mix: Tensor) -> None:
    """Refuses a matrix that is singular in float64, in which its determinant is computed."""
    if not torch.isfinite(mix).all():
        return  # the result will be NaN
    singular = torch.linalg.svdvals(mix)
    largest, smallest = float(singular[0]), float(singular[-1])
    if smallest <= largest * len(mix) * torch.finfo(torch.float64).eps:
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"the block's mix is singular: its singular values reach from {largest:.3g} down to "
            f"{smallest:.3g}, so the block has no inverse and no log determinant"
        )


class DetailFeatureExtractor(nn.Module):
    """image -> stem -> invertible blocks -> features.

    Takes any value range and any number of input channels (3-channel latents too); nothing is
    clamped or normalised.

    Args:
        in_channels: channels of the image.
        channels: C, channels of the features, even.
        blocks: K, number of invertible blocks.
        stem: ``"conv"``, one 3x3 with bias and zero padding; ``"residual"``, a ResNet block; or
            ``"squeeze"``, space to depth and an orthogonal lift: features at 1 / ``squeeze`` of the
            resolution, the cost divided and the field of view multiplied by ``squeeze`` squared,
            and the whole extractor invertible.
        subnet, activation, memory, clamp: as in :class:`InvertibleBlock`.
        squeeze: r of the ``"squeeze"`` stem, 2, 4 or 8; C must be at least ``in_channels`` r^2.
        init: ``"curved"``: nonlinear on photographs in [-1, 1], the sub-networks' outputs being
            about twice the size of what they are added to (:mod:`mghf_fast.nn.start`).
            ``"linear"``: PyTorch's own initialisation, with which a block is linear to three digits
            and the distance between features is an MSE of pixels.

    With the defaults 72,704 parameters, 69,120 of them in the block. A new extractor is random;
    :meth:`from_pretrained` loads a trained one.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 128,
        blocks: int = 1,
        stem: str = "conv",
        subnet: str = "bottleneck",
        activation: str = "relu6",
        memory: str = "recompute",
        clamp: float | None = 2.0,
        *,
        squeeze: int = 4,
        init: str = "curved",
    ) -> None:
        super().__init__()
        in_channels = check.check_integer("in_channels", in_channels, 1)
        channels = check.check_integer("channels", channels, 2)
        blocks = check.check_integer("blocks", blocks, 1)
        check.check_choice("stem", stem, STEMS)
        squeeze = check.check_integer("squeeze", squeeze, 1)
        check.check_choice("squeeze", squeeze, SQUEEZES)
        check.check_choice("init", init, STARTS)
        if clamp is not None:
            clamp = check.check_number("clamp", clamp, positive=True)
        if stem == "squeeze" and channels < in_channels * squeeze**2:
            raise ValueError(
                f"channels must be at least in_channels * squeeze ** 2 = "
                f"{in_channels * squeeze**2} for stem 'squeeze', got {channels}"
            )
        self.in_channels, self.channels = in_channels, channels
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "channels": channels,
            "blocks": blocks,
            "stem": stem,
            "subnet": subnet,
            "activation": activation,
            "clamp": clamp,
        }
        if stem == "squeeze":
            self.config["squeeze"] = squeeze
        self.downscale = squeeze if stem == "squeeze" else 1
        """Image pixels per pixel of the features, along each side."""
        self.stem = make_stem(stem, in_channels, channels, squeeze)
        self.blocks = nn.ModuleList(
            InvertibleBlock(
                channels, subnet=subnet, activation=activation, clamp=clamp, memory=memory
            )
            for _ in range(blocks)
        )
        if init == "curved":
            rms = curve_stem(self.stem)
            for block in self.blocks:
                assert isinstance(block, InvertibleBlock)
                curve_block(block, rms)
                rms = BLOCK_OUTPUT_RMS

    def forward(
        self, image: Tensor, *, backend: str | None = None, precision: str = "auto"
    ) -> Tensor:
        """Features of an image.

        Args:
            image: (B, in_channels, H, W).

        Returns:
            (B, C, H, W), for a ``"squeeze"`` stem (B, C, ceil(H / r), ceil(W / r)); channels_last
            on the CPU, elsewhere in the layout of the stem's output.
        """
        check.check_tensor("image", image, "(B, in_channels, H, W)", tangents=True)
        self.check_channels("image", image)
        if image.device.type == "cpu":
            # The features take the image's layout, and on the CPU both the kernels and PyTorch are
            # faster on channels_last.
            image = image.contiguous(memory_format=torch.channels_last)
        chosen: dict[str, Any] = {"backend": backend, "precision": precision}
        first, *others = self.blocks
        # With the stem folded into the first mix, its features are neither computed nor saved.
        drawn_in = isinstance(self.stem, nn.Conv2d)
        x: Tensor = (
            first(image, stem=self.stem, **chosen)
            if drawn_in
            else (first(self.stem(image), **chosen))
        )
        for block in others:
            x = block(x, **chosen)
        return x

    def check_channels(self, name: str, image: Tensor) -> None:
        """Checks the channels of an image, (B, in_channels, H, W), which a message calls ``name``.

        Raises:
            ValueError: it has another number of channels.
        """
        wanted, got = self.in_channels, image.shape[1]
        if got == wanted:
            return
        if image.shape[3] == wanted:
            advice = f"channels come second: {name}.permute(0, 3, 1, 2) moves them there"
        else:
            advice = (
                f"an extractor for these is made with DetailFeatureExtractor(in_channels={got})"
            )
            if got == 1:
                advice = f"{name}.expand(-1, {wanted}, -1, -1) repeats a grey channel, and {advice}"
        raise ValueError(
            f"{name} must have {wanted} channels, got {got} (shape {tuple(image.shape)}); {advice}"
        )

    @torch.no_grad()
    def invertibility_error(self, x: Tensor) -> float:
        """Relative error of undoing the blocks: |inverse(blocks(z)) - z| / |z|, z = stem(x).

        Args:
            x: image, (B, in_channels, H, W).

        Returns:
            About 1e-6 in float32 for orthogonal mixes; it grows with depth and with the condition
            of the mixes. Above about 1e-2 the blocks are not usefully invertible.
        """
        check.check_tensor("x", x, "(B, in_channels, H, W)")
        features = self.stem(x)
        y = features
        for block in self.blocks:
            y = block(y)
        for block in reversed(self.blocks):
            assert isinstance(block, InvertibleBlock)
            y = block.inverse(y)
        error = torch.linalg.vector_norm((y - features).double())
        return float(error / torch.linalg.vector_norm(features.double()))

    def save_pretrained(self, path: str | Path) -> None:
        """Writes weights and configuration to one file, ``*.safetensors``.

        Raises:
            ValueError: ``path`` has another suffix.
            FileExistsError: ``path`` exists; nothing is overwritten.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
        if path.exists():
            raise FileExistsError(f"path {str(path)!r} exists already; choose another name")
        path.write_bytes(self.to_safetensors())

    def to_safetensors(self) -> bytes:
        """The bytes that :meth:`save_pretrained` writes; equal for equal weights."""
        from safetensors.torch import save

        # Not state_dict(), which lacks the weights of an extractor frozen by a loss.
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return save(state, metadata={"mghf_fast": json.dumps(self.config)})

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> DetailFeatureExtractor:
        """Loads an extractor by the name of shipped weights (:mod:`mghf_fast.weights`), or from a
        safetensors file that :meth:`save_pretrained` wrote. Other formats are refused, because
        unpickling runs code. The state of torch's random generator does not change.

        Raises:
            FileNotFoundError: no such file.
            TypeError: neither text nor a path.
            ValueError: an unknown name; or the file is not in safetensors format, truncated, not an
                extractor's, or, for shipped weights, altered.
        """
        if isinstance(name_or_path, str) and name_or_path in weights.SHA256:
            return cls._from_safetensors(weights.read(name_or_path), name_or_path)
        if not isinstance(name_or_path, (str, os.PathLike)):
            raise TypeError(
                f"name_or_path must be a name or a path, got {type(name_or_path).__name__}"
            )
        path = Path(name_or_path)
        if path.suffix != ".safetensors":
            named = ", ".join(repr(name) for name in weights.SHA256)
            raise ValueError(
                f"name_or_path must be a .safetensors file or one of the weights that ship "
                f"({named}), got {str(name_or_path)!r}"
            )
        if not path.is_file():
            raise FileNotFoundError(f"name_or_path {str(path)!r} is not a file")
        return cls._from_safetensors(path.read_bytes(), str(path))

    @classmethod
    def _from_safetensors(cls, content: bytes, name: str) -> DetailFeatureExtractor:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            state = load(content)
        except SafetensorError as error:
            raise ValueError(f"{name!r} is not a whole safetensors file: {error}") from error
        # The header's length in 8 bytes, then the header, which was checked above.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header.get("__metadata__", {})
        if "mghf_fast" not in metadata:
            raise ValueError(f"{name!r} holds no mghf_fast extractor: its metadata lacks one")
        try:
            # Files written before 2026-11-29 may not mention the clamp, which was off then.
            config = {"clamp": None, **json.loads(metadata["mghf_fast"])}
            with reproducibly():
                extractor = cls(**config, init="linear")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name!r} does not fit its own description: {error}") from error
        try:
            extractor.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{name!r} does not fit its own description: {error}") from error
        return extractor.to(torch.get_default_device(), torch.get_default_dtype())
