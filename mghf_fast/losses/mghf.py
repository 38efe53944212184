"""The multi-granular high-frequency perceptual loss."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import functional
from .._warnings import warn_caller
from ..backends import optional_backend
from ..nn import DetailFeatureExtractor
from ..precision import accumulation_dtype, autocasting, check_precision, without_autocast
from . import step
from .content_style import ContentStyleLoss
from .frozen import HoldsFrozen, digest, floating_type, freeze
from .local_information import LocalInformationLoss
from .settings import (
    DEFAULT_EXTRACTOR,
    DEFAULT_PRESET,
    PRESETS,
    RANDOM,
    RANGES,
    Preset,
    default_extractor,
    downscale_of,
    factors,
    named_extractor,
    random_extractor,
    read_extractor,
    read_preset,
    read_range,
)

__all__ = [
    "DEFAULT_EXTRACTOR",
    "DEFAULT_PRESET",
    "PRESETS",
    "RANDOM",
    "MGHFLoss",
    "Preset",
    "default_extractor",
    "downscale_of",
    "named_extractor",
    "random_extractor",
]

VARIANTS = ("c", "n")
TERMS = ("naive", "csc", "csc_mse", "csc_correlation", "csc_gram", "lip")


def _nothing(sr: Tensor, gt: Tensor) -> Tensor:
    """(B,): 0 with a gradient of 0, NaN for an image that holds a NaN or an infinity."""
    return (0 * sr + 0 * gt).flatten(1).sum(1, dtype=accumulation_dtype(sr.dtype))


class MGHFLoss(HoldsFrozen):
    """MGHF perceptual loss for image super-resolution, a drop-in for LPIPS or a VGG loss.

    ``variant="n"`` is L_n = mean (S - G)^2 between detail features; ``variant="c"`` is
    Gamma1 L_n + Gamma2 L_csc + Gamma3 L_lip (MGHF eqs. 2 to 8).

    Args:
        variant: ``"c"`` comprehensive or ``"n"`` naive.
        preset: ``"balanced"``, in which every term contributes; ``"2026"`` or ``"2025"``, the
            published weights, also given as integers; or a custom :class:`Preset`.
        extractor: a module, a name or a file. A module (B, 3, H, W) -> (B, C, h, w) is copied; the
            copy is frozen, in evaluation mode, with buffers in place of parameters. It must be
            differentiable in the image. If its features are at 1/r of the image's resolution, it
            needs the integer attribute ``downscale`` = r, as :class:`DetailFeatureExtractor` has;
            the default is 1. Names are
            ``"perceptual-v1"``, the default (``None``), trained to reproduce a perceptual metric's
            distances, with a squeeze by 4; ``"procedural-v1"``, trained on procedural textures
            only; and ``"random"``, untrained, with the curved start and a fixed seed.
            (PyTorch's own initialisation, with which MGHF-n is close to an MSE of pixels, is
            ``DetailFeatureExtractor(init="linear", clamp=None)``.) A file is the path of
            ``*.safetensors`` from :meth:`DetailFeatureExtractor.save_pretrained`.
        top_m: feature maps kept by the entropy score; default C // 2.
        reduction: ``"mean"`` for a scalar, ``"none"`` for one value per image, (B,).
        input_range: ``"0,1"`` maps images from [0, 1] to the [-1, 1] an extractor is trained on;
            ``"-1,1"`` and ``None`` pass them on unchanged. ``"0, 1"``, ``[0, 1]`` and ``(0, 1)``
            mean the same. Nothing is clamped. The first ``gt`` is checked (only the first, because
            the check waits for the GPU; not in a compiled call): values outside the range by more
            than half its width give one warning. ``None`` counts as [-1, 1] if the extractor is a
            :class:`DetailFeatureExtractor` of 3 channels; other modules, and latents, may have any
            range. Images in [0, 1] are within [-1, 1], so only ``"0,1"`` treats them right.
        backend: a backend's name, for every op of the loss; ``"auto"`` or ``None`` for the
            surrounding choice (:class:`use_backend`).
        patch_size: side of the local term's patches in image pixels, like the preset's stride: 32,
            or ``"auto"`` for images below 32 pixels. ``downscale`` must divide both.
        save_weights: keep the weights of extractor and projection in ``state_dict()``, and load
            them from there. By default a checkpoint holds none of them; weights in a checkpoint are
            ignored, with a warning if they differ from this loss's.
        precision: the least precision of the matrix products, for every op of the loss:
            ``"float32"``, ``"tf32"`` (factors of 11 significant bits), ``"bfloat16"`` (8), or
            ``"auto"``, what PyTorch itself uses for convolutions on the device of the images: on
            CUDA TF32 unless ``torch.backends.cudnn.conv.fp32_precision = "ieee"`` is set, elsewhere
            float32. A backend may be more precise: the CPU's kernels and plain PyTorch ignore the
            option. Entropies, the choice of maps and Sinkhorn's sums are in float32 always.

    ``loss.gammas = (0.28, 1, 8e-3)`` sets Gamma1 to Gamma3 between steps. A compiled loss uses the
    new values without being recompiled, unless they switch a term on or off.

    A term of MGHF-c with weight 0 is not computed; but MGHF-n and the content-style terms are the
    results of one op, which runs if any content-style term has a weight. The extractor pads images
    with a side that is no multiple of ``downscale``; patches cover the padding too.

    The loss computes in float32, or in the type of the extractor's own weights, until it is cast,
    also under autocast; ``sr`` and ``gt`` may have different floating types. No gradient reaches
    ``gt``, which must not require one if ``sr`` does not, or the extractor, whose weights no parent
    module and no optimizer can train. A NaN or an infinity in an image gives a NaN loss.

    MGHF-n of equal images is 0; MGHF-c is not, because its local term is a contrast, and neither is
    its gradient (``loss.gammas = (0.28, 1, 0)`` leaves the local term out).

    For a uniform image (such as all black) with a non-uniform ``gt`` the gradient is many thousand
    times the usual one: the correlation divides by the image's deviation, floored at 1e-4, and the
    local term by the length of an embedding. Clip gradients if a batch may hold such an image.

    `torch.export` of an example whose maps hold a single patch (32 to 55 pixels) makes "one patch"
    part of the program, which then refuses larger images: export from a larger example.

    Added to L1 on images in [0, 1], a weight of 0.1 gives a gradient about three times as long as
    L1's; for ``variant="n"`` a weight of 0.04 does (``docs/features.md``).

    >>> loss = mghf_fast.MGHFLoss(input_range="0,1")
    >>> (l1(sr, gt) + 0.1 * loss(sr, gt)).backward()
    """

    def __init__(
        self,
        variant: str = "c",
        preset: str | int | Preset = DEFAULT_PRESET,
        extractor: nn.Module | str | Path | None = None,
        top_m: int | None = None,
        reduction: str = "mean",
        input_range: str | Sequence[float] | None = None,
        backend: str | None = "auto",
        *,
        patch_size: int | str = 32,
        save_weights: bool = False,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        check.check_choice("variant", variant, VARIANTS)
        check.check_choice("reduction", reduction, ("mean", "none"))
        network, self._extractor_name = read_extractor(extractor)
        self.preset, self._preset_name = read_preset(preset)
        if top_m is not None:
            top_m = check.check_integer("top_m", top_m, 1, getattr(network, "channels", None))
        self.variant, self.reduction = variant, reduction
        self.input_range = read_range(input_range)
        # A list, so that DataParallel's replicas, which are shallow copies, share it.
        self._range_unchecked = [True] if self._expected_range(network) else []
        self.backend, self.precision = optional_backend(backend), check_precision(precision)
        self._downscale = downscale_of(network)
        # Has the type and device of the computation: a buffer follows .to() and casts, and replicas
        # have it, whatever the extractor consists of.
        likeness = torch.zeros((), dtype=floating_type(network))
        self.register_buffer("_likeness", likeness, persistent=False)
        self._likeness: Tensor
        for tensor in (*network.parameters(), *network.buffers()):
            self._likeness = self._likeness.to(tensor.device)
            break
        self.extractor = freeze(network, persistent=save_weights)
        self.frozen_parts = () if save_weights else ("extractor",)
        gamma1, gamma2, gamma3 = map(float, self.preset.gammas)
        self._gammas = (gamma1, gamma2, gamma3)
        self._active = self._weighted()
        self._steps = step.Steps()
        # The same as a tensor for compiled code, in which a Python number is a constant.
        gammas = torch.tensor(self._gammas, dtype=torch.float64, device=self._likeness.device)
        self.register_buffer("_gamma_tensor", gammas, persistent=False)
        self._gamma_tensor: Tensor
        self.content_style = ContentStyleLoss(
            self.preset.betas,
            top_m=top_m,
            alpha=self.preset.alpha,
            gamma=self.preset.gamma,
            reduction="none",
            backend=self.backend,
            precision=self.precision,
        )

        def make_local(downscale: int) -> LocalInformationLoss:
            return LocalInformationLoss(
                patch_size,
                self.preset.stride,
                reduction="none",
                backend=self.backend,
                downscale=downscale,
                save_weights=save_weights,
                precision=self.precision,
            )

        self._local_problem: str | None = None
        try:
            self.local_information = make_local(self._downscale)
        except ValueError as error:
            if "lip" in self._active:
                raise
            # Unsuitable patches are an error only once the local term has a weight.
            self._local_problem = str(error)
            self.local_information = make_local(1)

    @property
    def gammas(self) -> tuple[float, float, float]:
        """Gamma1 to Gamma3 of MGHF-c. They can be set to three numbers; a term with weight 0 is not
        computed.

        Raises:
            ValueError: not three finite numbers; or a weight for the local term although its
                patches do not fit the extractor's ``downscale``.
        """
        return self._gammas

    @gammas.setter
    def gammas(self, values: Sequence[float]) -> None:
        gamma1, gamma2, gamma3 = map(float, check.check_numbers("gammas", values, 3))
        if gamma3 and self.variant == "c" and self._local_problem is not None:
            raise ValueError(self._local_problem)
        self._gammas = (gamma1, gamma2, gamma3)
        self._active = self._weighted()
        self._gamma_tensor.copy_(torch.tensor(self._gammas, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MGHFLoss:
        super()._apply(fn, recurse)
        gammas = self._gamma_tensor
        if gammas.dtype != torch.float64:  # a cast of the loss must not round its weights
            values = torch.tensor(self._gammas, dtype=torch.float64)
            self._gamma_tensor = values.to(gammas.device)
        return self

    def _weighted(self) -> list[str]:
        """The terms whose weight is not 0."""
        if self.variant == "n":
            return ["naive"]
        weights = factors(self._gammas, self.preset.betas)
        return [name for name, factor in weights.items() if factor]

    def train(self, mode: bool = True) -> MGHFLoss:
        super().train(mode)
        self.extractor.eval()  # its batch norms, if any, keep their statistics
        return self

    def _features(self, image: Tensor) -> Tensor:
        if self.input_range == "0,1":
            image = image * 2 - 1
        if isinstance(self.extractor, DetailFeatureExtractor):
            chosen = {"backend": self.backend, "precision": self.precision}
            features: Tensor = self.extractor(image, **chosen)
        else:
            # A copy, because another module may begin with an in-place layer.
            features = self.extractor(image if self.input_range == "0,1" else image.clone())
            self._check_features(features, image)
        return features

    def _check_features(self, features: Any, image: Tensor) -> None:
        """Checks what a module that is not ours made of an image."""
        if not isinstance(features, Tensor):
            raise TypeError(
                f"extractor must return a tensor (B, C, h, w), got {type(features).__name__}: wrap "
                "it in a module that selects the feature maps to compare"
            )
        if features.dim() != 4 or features.shape[0] != image.shape[0]:
            raise ValueError(
                f"extractor must return features (B, C, h, w) of {tuple(image.shape)}, got "
                f"{tuple(features.shape)}"
            )
        check.check_differentiable("extractor", features, image)
        if "lip" in self._active:
            self.local_information.check_features(features, image)

    def _expected_range(self, extractor: nn.Module) -> str | None:
        """The range that images must roughly have, or None if they may have any."""
        ours = isinstance(extractor, DetailFeatureExtractor) and extractor.in_channels == 3
        return self.input_range or ("-1,1" if ours else None)

    def _check_range(self, gt: Tensor) -> None:
        """Warns if the first ``gt`` is far outside the expected range; ignores later ones."""
        if not self._range_unchecked or not check.is_readable(gt):
            return
        self._range_unchecked.clear()
        expected = self._expected_range(self.extractor)
        if expected is None:  # another extractor has taken the first one's place
            return
        low, high = RANGES[expected]
        margin = (high - low) / 2
        least, most = (float(bound) for bound in torch.aminmax(gt.detach()))
        if least < low - margin or most > high + margin:
            meaning = "" if self.input_range else ", which means images in [-1, 1]"
            warn_caller(
                f"input_range is {self.input_range!r}{meaning}, but gt reaches from {least:.3g} to "
                f"{most:.3g}: images in another range change the scale of the loss"
            )

    def _outputs(self, sr: Tensor, gt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The reduced total and the computed terms, (B,) each."""
        for name, image in (("sr", sr), ("gt", gt)):
            check.check_tensor(name, image, "(B, 3, H, W)", tangents=True)
        check.check_pair("sr", sr, "gt", gt)
        check.check_order("sr", sr, "gt", gt)
        check.refuse_tangent("sr", sr)
        check.check_device("sr", sr, "the loss (move it with .to(device))", self._likeness)
        if not torch.compiler.is_compiling():
            self._check_range(gt)
        if isinstance(self.extractor, DetailFeatureExtractor):
            self.extractor.check_channels("sr", sr)
        if "lip" in self._active and self._downscale > 1:
            self.local_information.check_size(sr.shape[2], sr.shape[3])  # before it is padded
        weighted = self._active
        # The local term alone takes the other path, which checks for NaN: patches need not cover
        # every pixel.
        eager = weighted and weighted != ["lip"] and step.applies(sr, gt)
        autocast = autocasting(sr.device.type)
        with without_autocast(sr.device.type) if autocast else contextlib.nullcontext():
            gt = gt.detach()
            if eager:
                return step.compare(self, *step.extract(self, sr, gt))
            dtype = self._likeness.dtype
            sr, gt = sr.to(dtype), gt.to(dtype)
            if not weighted:
                return self._reduced(_nothing(sr, gt)), {}
            with torch.no_grad():
                gt_features = self._features(gt)
            total, terms = self._compare(self._features(sr), gt_features)
            if weighted == ["lip"]:
                total = total + self._reduced(_nothing(sr, gt))
            return total, terms

    def _compare(self, sr: Tensor, gt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The reduced total and the terms with a weight, (B,) each, of two stacks of features,
        composed of the library's operators."""
        terms: dict[str, Tensor] = {}
        parts: list[Tensor] = []
        gammas: Sequence[Tensor | float] = self._gammas
        if torch.compiler.is_compiling():
            gammas = self._gamma_tensor.unbind()
        if self.variant == "n":
            naive = functional.naive_term(gt=gt, sr=sr, backend=self.backend)
            return self._reduced(naive), {"naive": naive}
        if any(name.startswith("csc") for name in self._active):
            style = self.content_style.terms(sr, gt)
            terms["naive"], terms["csc_mse"] = style.naive, style.mse
            terms["csc_correlation"], terms["csc_gram"] = style.correlation, style.gram
            parts.append(gammas[1] * self.content_style.combine(style))
        elif self._active != ["lip"]:
            terms["naive"] = functional.naive_term(gt=gt, sr=sr, backend=self.backend)
        if "naive" in terms:  # without a weight too: NaN if the images hold one
            parts.insert(0, gammas[0] * terms["naive"])
        if "lip" in self._active:
            terms["lip"] = self.local_information(sr, gt)
            parts.append(gammas[2] * terms["lip"])
        return self._reduced(functools.reduce(operator.add, parts)), terms

    def _reduced(self, x: Tensor) -> Tensor:
        return x.mean() if self.reduction == "mean" else x

    def terms(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """Every term by name, reduced like the loss but not weighted by the preset.

        ``total`` is the loss itself. For ``variant="c"``: ``naive``, ``csc`` (the weighted sum of
        ``csc_mse``, ``csc_correlation`` and ``csc_gram``) and ``lip``, each if the preset's weight
        for it is not 0 (``csc`` if that of any of its three is not); for ``"n"``: ``naive``.
        """
        total, found = self._outputs(sr, gt)
        weighted = {*self._active, "csc"}
        of_style = zip(self.content_style.betas, TERMS[2:5], strict=True)
        if parts := [beta * found[name] for beta, name in of_style if beta and name in found]:
            found["csc"] = functools.reduce(operator.add, parts)
        named = [name for name in TERMS if name in found and name in weighted]
        return {"total": total, **{name: self._reduced(found[name]) for name in named}}

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Super-resolved image and ground truth, (B, 3, H, W) each -> scalar or (B,).

        Raises:
            TypeError: not tensors, or not floating-point; or an extractor that returns no tensor.
            ValueError: shapes or devices differ, channels do not fit the extractor, the image or
                its features are smaller than a patch, only ``gt`` requires a gradient, as when the
                two are swapped, or the extractor returns no feature maps or cuts their gradient.
        """
        return self._outputs(sr, gt)[0]

    def __repr__(self) -> str:
        """One line, with a digest of the extractor's weights that distinguishes losses."""
        parts: dict[str, Any] = {"variant": repr(self.variant)}
        if self.variant == "c":
            parts |= {
                "preset": self._preset_name,
                "gammas": self._gammas,
                "betas": self.preset.betas,
                "alpha": self.preset.alpha,
                "gamma": self.preset.gamma,
                "stride": self.preset.stride,
                "patch_size": repr(self.local_information.patch_size),
                "top_m": self.content_style.top_m,
            }
        parts["extractor"] = f"{self._extractor_name} (weights {digest(self.extractor)})"
        parts["input_range"] = repr(self.input_range)
        parts["reduction"] = repr(self.reduction)
        parts["backend"] = repr(self.backend)
        parts["precision"] = repr(self.precision)
        listed = ", ".join(f"{name}={value}" for name, value in parts.items())
        return f"{type(self).__name__}({listed})"
