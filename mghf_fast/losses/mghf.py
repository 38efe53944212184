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
from .content_style import ContentStyleLoss
from .local_information import LocalInformationLoss

VARIANTS = ("c", "n")
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


PRESETS = {
    "2026": Preset((2, 2, 8e-2), (6e-3, 1e-1, 5e-4), 1.1, 2**0.5, 24),
    "2025": Preset((2, 1.5, 1e-3), (0.1333, 1, 0.1333), 1.1, 2**0.5, 16),
}
"""The published weights, by the year of the paper."""


RANDOM = "random"
DEFAULT_EXTRACTOR = "procedural-v1"
"""The extractor of a loss that is given none: ``RANDOM``, or a name of :mod:`mghf_fast.weights`."""


def random_extractor() -> DetailFeatureExtractor:
    """An untrained extractor, the same in every process."""
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


class MGHFLoss(nn.Module):
    """MGHF perceptual loss for image super-resolution, a drop-in for LPIPS or a VGG loss.

    ``variant="n"`` is L_n = mean (S - G)^2 between detail features; ``variant="c"`` is
    Gamma1 L_n + Gamma2 L_csc + Gamma3 L_lip (MGHF eqs. 2 to 8).

    Args:
        variant: ``"c"`` comprehensive or ``"n"`` naive.
        preset: ``"2026"``, ``"2025"`` or a :class:`Preset` of one's own.
        extractor: any module (B, 3, H, W) -> (B, C, h, w); a frozen copy of it is kept, the module
            itself stays as it is. Or a name: ``"procedural-v1"``, which ``None`` means too, a
            :class:`DetailFeatureExtractor` trained on procedural textures as a substitute for
            ImageNet weights; or ``"random"``, an untrained one with a fixed seed.
        top_m: feature maps kept by the entropy score; default C // 2.
        reduction: ``"mean"`` for a scalar, ``"none"`` for one value per image, (B,).
        input_range: ``"0,1"`` maps images from [0, 1] to the [-1, 1] an extractor is trained on;
            ``"-1,1"`` and ``None`` pass them on unchanged. Nothing is clamped.
        backend: ``"auto"`` or a backend's name, for every op of the loss.
        patch_size: of the local term, 32 or ``"auto"`` for images below 32 pixels.

    It computes in the extractor's dtype, float32 unless the loss was cast, also under autocast. No
    gradient reaches ``gt`` or the extractor. A NaN or an infinity in an image gives a NaN loss.

    >>> loss = mghf_fast.MGHFLoss(input_range="0,1")
    >>> (l1(sr, gt) + 0.1 * loss(sr, gt)).backward()
    """

    def __init__(
        self,
        variant: str = "c",
        preset: str | Preset = "2026",
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
            patch_size, preset.stride, reduction="none", backend=self.backend
        )

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
        """Every term, (B,) each."""
        for name, image in (("sr", sr), ("gt", gt)):
            check.check_tensor(name, image, "(B, 3, H, W)")
        check.check_pair("sr", sr, "gt", gt)
        parameter = next(self.extractor.parameters(), sr)
        check.check_device("sr", sr, "the loss (move it with .to(device))", parameter)
        with torch.autocast(sr.device.type, enabled=False):
            dtype = parameter.dtype
            with torch.no_grad():
                gt_features = self._features(gt.to(dtype))
            sr_features = self._features(sr.to(dtype))
            if self.variant == "n":
                naive = functional.naive_term(gt_features, sr_features, backend=self.backend)
                return {"total": naive, "naive": naive}
            # Both terms differentiate into one gradient of the features. What comes later in the
            # forward is differentiated first, so gt's features are released before the rest.
            lip, sr_features = self.local_information.compare_and_pass(sr_features, gt_features)
            style = self.content_style.terms(sr_features, gt_features)
            csc = self.content_style.combine(style)
            gamma1, gamma2, gamma3 = self.preset.gammas
            return {
                "total": gamma1 * style.naive + gamma2 * csc + gamma3 * lip,
                "naive": style.naive,
                "csc": csc,
                "csc_mse": style.mse,
                "csc_correlation": style.correlation,
                "csc_gram": style.gram,
                "lip": lip,
            }

    def terms(self, sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """Every term by name, reduced like the loss and not yet weighted by the preset.

        ``total`` is the loss itself. For ``variant="c"``: ``naive``, ``csc`` (the weighted sum of
        ``csc_mse``, ``csc_correlation`` and ``csc_gram``) and ``lip``; for ``"n"``: ``naive``.
        """
        terms = self._terms(sr, gt)
        if self.reduction == "none":
            return terms
        return {name: term.mean() for name, term in terms.items()}

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Super-resolved image and ground truth, (B, 3, H, W) each -> scalar or (B,).

        Raises:
            TypeError: not tensors, not floating-point, or of different dtypes.
            ValueError: shapes or devices differ, channels do not fit the extractor, or the features
                are smaller than a patch.
        """
        return self.terms(sr, gt)["total"]
