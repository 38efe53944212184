"""The multi-granular high-frequency perceptual loss."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import functional, weights
from ..backends import check_backend
from ..nn import DetailFeatureExtractor
from ..precision import accumulation_dtype
from .content_style import ContentStyleLoss
from .local_information import LocalInformationLoss

VARIANTS = ("c", "n")
TERMS = ("naive", "csc", "csc_mse", "csc_correlation", "csc_gram", "lip")
INPUT_RANGES = (None, "0,1", "-1,1")


@dataclass(frozen=True)
class Preset:
    """The weights of MGHF-c: ``gammas`` of the naive, content-style and local terms (Gamma 1 to 3),
    ``betas`` within content-style, ``alpha`` and ``gamma`` of the entropy weights, patch ``stride``
    in pixels."""

    gammas: tuple[float, float, float]
    betas: tuple[float, float, float]
    alpha: float
    gamma: float
    stride: int

    def factors(self) -> dict[str, float]:
        """What the total takes each term times, by the names of :meth:`MGHFLoss.terms`."""
        (gamma1, gamma2, gamma3), (beta1, beta2, beta3) = self.gammas, self.betas
        return {
            "naive": gamma1,
            "csc_mse": gamma2 * beta1,
            "csc_correlation": gamma2 * beta2,
            "csc_gram": gamma2 * beta3,
            "lip": gamma3,
        }


PRESETS = {
    "balanced": Preset((0.28, 1, 8e-3), (2.6e-2, 4e-2, 0.2), 1.1, 2**0.5, 24),
    "2026": Preset((2, 2, 8e-2), (6e-3, 1e-1, 5e-4), 1.1, 2**0.5, 24),
    "2025": Preset((2, 1.5, 1e-3), (0.1333, 1, 0.1333), 1.1, 2**0.5, 16),
}
"""The published weights, by the year of the paper; and ``"balanced"``, for the features of
``perceptual-v1``: of the gradients' lengths the naive term has three fifths and the others 3 to 24
per cent each, for crops from 64 to 256 pixels (``docs/features.md``)."""


RANDOM = "random"
DEFAULT_EXTRACTOR = "perceptual-v1"
"""The extractor of a loss that is given none: ``RANDOM``, or a name of :mod:`mghf_fast.weights`."""
DEFAULT_PRESET = "balanced"


def random_extractor() -> DetailFeatureExtractor:
    """An untrained extractor with the curved start (:mod:`mghf_fast.nn.start`), the same in every
    process."""
    # Drawn on the CPU, as a GPU draws other numbers.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        extractor = DetailFeatureExtractor()
    return extractor.to(torch.get_default_device())


def default_extractor() -> DetailFeatureExtractor:
    """The extractor of a loss that is given none."""
    return named_extractor(DEFAULT_EXTRACTOR)


def named_extractor(name: str) -> DetailFeatureExtractor:
    """``"random"`` or weights that ship, by their name."""
    check.check_choice("extractor", name, (RANDOM, *weights.SHA256))
    return random_extractor() if name == RANDOM else DetailFeatureExtractor.from_pretrained(name)


def downscale_of(extractor: nn.Module) -> int:
    """Image pixels to a pixel of the extractor's features: its attribute ``downscale``, 1 without
    (a layer of that name says nothing).

    Raises:
        TypeError, ValueError: the attribute is a number, but no integer of 1 or more.
    """
    downscale = getattr(extractor, "downscale", 1)
    if not isinstance(downscale, (int, float)):
        return 1
    check.check_integer("extractor.downscale", downscale, 1)
    return int(downscale)


def _nothing(sr: Tensor, gt: Tensor) -> Tensor:
    """(B,): 0 with a gradient of 0, NaN for an image that holds a NaN or an infinity."""
    return (0 * sr + 0 * gt).flatten(1).sum(1, dtype=accumulation_dtype(sr.dtype))


class MGHFLoss(nn.Module):
    """MGHF perceptual loss for image super-resolution, a drop-in for LPIPS or a VGG loss.

    ``variant="n"`` is L_n = mean (S - G)^2 between detail features; ``variant="c"`` is
    Gamma1 L_n + Gamma2 L_csc + Gamma3 L_lip (MGHF eqs. 2 to 8).

    Args:
        variant: ``"c"`` comprehensive or ``"n"`` naive.
        preset: ``"balanced"``, in which every term has a say; ``"2026"`` or ``"2025"``, the
            published weights; or a :class:`Preset` of one's own.
        extractor: any module (B, 3, H, W) -> (B, C, h, w); a frozen copy of it is kept, the module
            itself stays as it is. One whose features are at 1/r of the image's resolution says so
            by an integer attribute ``downscale``, as :class:`DetailFeatureExtractor` does; without
            it a pixel of the features counts as one of the image. Or a name: ``"perceptual-v1"``,
            which ``None`` means too, trained to have a perceptual metric's distances, behind a
            squeeze by 4; ``"procedural-v1"``, trained on procedural textures alone; or
            ``"random"``, an untrained one with the curved start and a fixed seed. (PyTorch's own
            initialisation, with which MGHF-n is close to an MSE of pixels, is
            ``DetailFeatureExtractor(init="linear", clamp=None)``.)
        top_m: feature maps kept by the entropy score; default C // 2.
        reduction: ``"mean"`` for a scalar, ``"none"`` for one value per image, (B,).
        input_range: ``"0,1"`` maps images from [0, 1] to the [-1, 1] an extractor is trained on;
            ``"-1,1"`` and ``None`` pass them on unchanged. Nothing is clamped.
        backend: ``"auto"`` or a backend's name, for every op of the loss.
        patch_size: of the local term, 32 or ``"auto"`` for images below 32 pixels: in image pixels,
            like the preset's stride. The extractor's ``downscale`` must divide both.

    A term of MGHF-c whose weight is 0 is not computed; but the content-style terms come out of one
    op, MGHF-n included, which runs if one of the three has a weight. Images of which a side is no
    multiple of ``downscale`` are continued by the extractor, patches included.

    It computes in the extractor's dtype, float32 unless the loss was cast, also under autocast. No
    gradient reaches ``gt`` or the extractor. A NaN or an infinity in an image gives a NaN loss.

    Beside L1 on images of 0 to 1 a weight of 0.1 sends a gradient about three times as long as
    L1's; of ``variant="n"`` one of 0.04 does (``docs/features.md``).

    >>> loss = mghf_fast.MGHFLoss(input_range="0,1")
    >>> (l1(sr, gt) + 0.1 * loss(sr, gt)).backward()
    """

    def __init__(
        self,
        variant: str = "c",
        preset: str | Preset = DEFAULT_PRESET,
        extractor: nn.Module | str | None = None,
        top_m: int | None = None,
        reduction: str = "mean",
        input_range: str | None = None,
        backend: str = "auto",
        *,
        patch_size: int | str = 32,
    ) -> None:
        super().__init__()
        check.check_choice("variant", variant, VARIANTS)
        check.check_choice("reduction", reduction, ("mean", "none"))
        check.check_choice("input_range", input_range, INPUT_RANGES)
        if not isinstance(preset, Preset):
            check.check_choice("preset", preset, tuple(PRESETS))
            preset = PRESETS[preset]
        if extractor is None:
            extractor = default_extractor()
        elif isinstance(extractor, str):
            extractor = named_extractor(extractor)
        elif isinstance(extractor, nn.Module):
            extractor = copy.deepcopy(extractor)
        else:
            raise TypeError(
                f"extractor must be a torch.nn.Module, a name or None, got "
                f"{type(extractor).__name__}"
            )
        if top_m is not None:
            check.check_integer("top_m", top_m, 1, getattr(extractor, "channels", None))
        self.variant, self.preset, self.reduction = variant, preset, reduction
        self.input_range = input_range
        # "auto" stays open to use_backend; a name is forced.
        self.backend = None if check_backend(backend) == "auto" else backend
        self.extractor = extractor
        self.extractor.requires_grad_(False).eval()
        self.content_style = ContentStyleLoss(
            preset.betas,
            top_m=top_m,
            alpha=preset.alpha,
            gamma=preset.gamma,
            reduction="none",
            backend=self.backend,
        )
        self.local_information = LocalInformationLoss(
            patch_size,
            preset.stride,
            reduction="none",
            backend=self.backend,
            downscale=downscale_of(extractor) if "lip" in self._weighted() else 1,
        )

    def _weighted(self) -> list[str]:
        """The terms whose weight is not 0."""
        if self.variant == "n":
            return ["naive"]
        return [name for name, factor in self.preset.factors().items() if factor]

    def train(self, mode: bool = True) -> MGHFLoss:
        super().train(mode)
        self.extractor.eval()  # its batch norms, if any, keep their statistics
        return self

    def _features(self, image: Tensor) -> Tensor:
        if self.input_range == "0,1":
            image = image * 2 - 1
        if isinstance(self.extractor, DetailFeatureExtractor):
            features: Tensor = self.extractor(image, backend=self.backend)
        else:
            features = self.extractor(image)
        return features

    def _terms(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """The total and every term that has a weight, (B,) each."""
        for name, image in (("sr", sr), ("gt", gt)):
            check.check_tensor(name, image, "(B, 3, H, W)")
        check.check_pair("sr", sr, "gt", gt)
        parameter = next(self.extractor.parameters(), sr)
        check.check_device("sr", sr, "the loss (move it with .to(device))", parameter)
        weighted = self._weighted()
        if self.local_information.downscale > 1:
            self.local_information.check_size(sr.shape[2], sr.shape[3])  # before it is padded
        with torch.autocast(sr.device.type, enabled=False):
            sr, gt = sr.to(parameter.dtype), gt.detach().to(parameter.dtype)
            if not weighted:
                return {"total": _nothing(sr, gt)}
            with torch.no_grad():
                gt_features = self._features(gt)
            sr_features = self._features(sr)
            if self.variant == "n":
                naive = functional.naive_term(gt_features, sr_features, backend=self.backend)
                return {"total": naive, "naive": naive}
            terms: dict[str, Tensor] = {}
            if "lip" in weighted and len(weighted) > 1:
                # Two uses of the features differentiate into one gradient. What comes later in the
                # forward is differentiated first, so gt's features are released before the rest.
                terms["lip"], sr_features = self.local_information.compare_and_pass(
                    sr_features, gt_features
                )
            elif "lip" in weighted:
                terms["lip"] = self.local_information(sr_features, gt_features)
            if any(name.startswith("csc") for name in weighted):
                style = self.content_style.terms(sr_features, gt_features)
                terms["naive"], terms["csc"] = style.naive, self.content_style.combine(style)
                terms["csc_mse"], terms["csc_correlation"] = style.mse, style.correlation
                terms["csc_gram"] = style.gram
            elif "naive" in weighted:
                terms["naive"] = functional.naive_term(
                    gt_features, sr_features, backend=self.backend
                )
            else:
                terms["naive"] = _nothing(sr, gt)  # LIP sees only pixels that a patch covers
        gamma1, gamma2, gamma3 = self.preset.gammas
        total = gamma1 * terms["naive"]  # NaN if the images hold one, without a weight too
        if "csc" in terms:
            total = total + gamma2 * terms["csc"]
            weighted.append("csc")
        if "lip" in terms:
            total = total + gamma3 * terms["lip"]
        return {"total": total, **{name: terms[name] for name in TERMS if name in weighted}}

    def terms(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """Every term by name, reduced like the loss and not yet weighted by the preset.

        ``total`` is the loss itself. For ``variant="c"``: ``naive``, ``csc`` (the weighted sum of
        ``csc_mse``, ``csc_correlation`` and ``csc_gram``) and ``lip``, as far as the preset gives
        them a weight that is not 0 (``csc`` if it does to one of the three); for ``"n"``:
        ``naive``.
        """
        terms = self._terms(sr, gt)
        if self.reduction == "none":
            return terms
        return {name: term.mean() for name, term in terms.items()}

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Super-resolved image and ground truth, (B, 3, H, W) each -> scalar or (B,).

        Raises:
            TypeError: not tensors, not floating-point, or of different dtypes.
            ValueError: shapes or devices differ, channels do not fit the extractor, or the image or
                its features are smaller than a patch.
        """
        return self.terms(sr, gt)["total"]
