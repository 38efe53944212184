"""Local information preservation between two feature stacks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import _checks as check
from .. import functional
from ..backends import optional_backend
from ..nn import PatchProjection
from ..ops.vocabulary import COSTS, PLAN_GRADIENTS
from ..precision import check_precision
from .frozen import HoldsFrozen, freeze

AUTO_PATCH_SIZES = (32, 16, 8)


def _auto_sizes(downscale: int) -> list[int]:
    return [s for s in AUTO_PATCH_SIZES if s % downscale == 0 and s >= 2 * downscale]


class LocalInformationLoss(HoldsFrozen):
    """LIP: projected patches of every map, contrasted with transported negatives (MGHF eq. 8).

    Args:
        patch_size: side of a patch in image pixels: 32; or, for small images and latents,
            ``"auto"``: the largest of 32, 16 and 8 that fits the image, the stride in proportion.
        stride: distance between patches in image pixels, at ``patch_size`` 32.
        temperature, epsilon, iterations, negative_weight, cost, plan_gradient: as in
            :func:`functional.monce_loss`.
        patch_reduction: over a map's patches, ``"mean"`` or ``"sum"`` (eq. 8 literally); maps are
            always averaged.
        trainable_projection: train the projection too; by default it is random and frozen, its
            weights being buffers that no optimizer sees.
        seed: seed of the projection.
        reduction: ``"mean"`` for a scalar, ``"none"`` for (B,).
        backend: ``"auto"`` or a backend's name.
        save_weights: keep the frozen projection's weights in ``state_dict()``, although the seed
            reproduces them. (A trainable projection's are always there.)
        precision: as in :class:`MGHFLoss`.
        downscale: image pixels per pixel of the features, along each side; it must divide
            ``patch_size`` and ``stride``. ``"auto"`` uses only patches of at least 2 pixels of the
            features and rounds their strides down to whole pixels.
    """

    def __init__(
        self,
        patch_size: int | str = 32,
        stride: int = 24,
        *,
        temperature: float = 0.07,
        epsilon: float = 1.0,
        iterations: int = 50,
        negative_weight: float = 1.0,
        cost: str = "hard",
        plan_gradient: str = "exact",
        patch_reduction: str = "mean",
        trainable_projection: bool = False,
        seed: int = 0,
        reduction: str = "mean",
        backend: str | None = None,
        downscale: int = 1,
        save_weights: bool = False,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(patch_size, str):
            if patch_size != "auto":
                raise ValueError(f"patch_size must be an integer or 'auto', got {patch_size!r}")
        else:
            patch_size = check.check_integer("patch_size", patch_size, 1)
        stride = check.check_integer("stride", stride, 1)
        downscale = check.check_integer("downscale", downscale, 1)
        automatic = _auto_sizes(downscale)
        if patch_size == "auto" and not automatic:
            raise ValueError(
                f"patch_size 'auto' needs features at 1/{AUTO_PATCH_SIZES[0] // 2} of the "
                f"resolution or more, got the extractor's downscale {downscale}"
            )
        largest = patch_size if isinstance(patch_size, int) else AUTO_PATCH_SIZES[0]
        if largest % downscale or stride % downscale:
            raise ValueError(
                f"patch_size and stride must be multiples of the extractor's downscale {downscale} "
                f"(image pixels to a pixel of its features), got {largest} and {stride}"
            )
        check.check_choice("cost", cost, COSTS)
        check.check_choice("plan_gradient", plan_gradient, PLAN_GRADIENTS)
        check.check_choice("patch_reduction", patch_reduction, ("mean", "sum"))
        check.check_choice("reduction", reduction, ("mean", "none"))
        temperature = check.check_number("temperature", temperature, positive=True)
        epsilon = check.check_number("epsilon", epsilon, positive=True)
        negative_weight = check.check_number("negative_weight", negative_weight, positive=True)
        iterations = check.check_integer("iterations", iterations, 1)
        self.patch_size, self.stride, self.downscale = patch_size, stride, downscale
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.negative_weight, self.cost, self.plan_gradient = negative_weight, cost, plan_gradient
        self.patch_reduction, self.reduction = patch_reduction, reduction
        self.backend = optional_backend(backend)
        self.precision = check_precision(precision)
        # Side of a patch -> stride, in pixels of the features.
        if isinstance(patch_size, int):
            strides = {patch_size // downscale: stride // downscale}
        else:
            strides = {
                size // downscale: max(stride * size // (AUTO_PATCH_SIZES[0] * downscale), 1)
                for size in automatic
            }
        # Beside the modules' names, which torch.compile of torch 2.10 cannot iterate over.
        self._sizes = [side * downscale for side in strides]
        self.projections = nn.ModuleDict(
            {
                str(side * downscale): PatchProjection(
                    side, step, trainable=trainable_projection, seed=seed
                )
                for side, step in strides.items()
            }
        )
        if not trainable_projection:
            freeze(self.projections, persistent=save_weights)
            self.frozen_parts = () if save_weights else ("projections",)

    def check_size(self, height: int, width: int) -> None:
        """Checks that an image of these sides in pixels holds a patch.

        Raises:
            ValueError: a side is smaller than the smallest patch.
        """
        least = min(self._sizes)
        if min(height, width) < least:
            smaller = [] if self.patch_size == "auto" else _auto_sizes(self.downscale)
            advice = f"; patch_size='auto' takes {smaller[-1]} pixels and up" if smaller else ""
            raise ValueError(
                f"sr must be at least {least} pixels high and wide for patch_size "
                f"{self.patch_size!r}, got {height} x {width}{advice}"
            )

    def check_features(self, features: Tensor, image: Tensor) -> None:
        """Checks that features are large enough for a patch if the image is, as they are unless
        their ``downscale`` is larger than this module's.

        Raises:
            ValueError: they are not.
        """
        (height, width), sides = features.shape[2:], image.shape[2:]
        least = min(self._sizes)
        if min(height, width) * self.downscale < least <= min(sides):
            raise ValueError(
                f"features of {height} x {width} pixels for an image of {sides[0]} x {sides[1]} "
                f"hold no patch of {least} image pixels: an extractor whose features are at 1/r of "
                f"the image's resolution needs the integer attribute downscale = r, which is "
                f"{self.downscale} here"
            )

    def _projection(self, x: Tensor) -> PatchProjection:
        height, width = (side * self.downscale for side in x.shape[2:])
        self.check_size(height, width)
        fitting = [size for size in self._sizes if size <= min(height, width)]
        projection = self.projections[str(max(fitting))]
        assert isinstance(projection, PatchProjection)
        return projection

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Features of the super-resolved image and of the ground truth, (B, C, H, W) each.

        Raises:
            ValueError: H or W times ``downscale`` is smaller than a patch.
        """
        check.check_tensor("sr", sr, "(B, C, H, W)")
        check.check_tensor("gt", gt, "(B, C, H, W)")
        check.check_pair("sr", sr, "gt", gt)
        check.check_order("sr", sr, "gt", gt)
        project = self._projection(sr)
        chosen: dict[str, Any] = {"backend": self.backend, "precision": self.precision}
        losses = functional.monce_loss(
            project(sr, **chosen),
            project(gt.detach(), **chosen),
            temperature=self.temperature,
            epsilon=self.epsilon,
            iterations=self.iterations,
            negative_weight=self.negative_weight,
            cost=self.cost,
            plan_gradient=self.plan_gradient,
            reduction="none",
            **chosen,
        ).view(sr.shape[0], sr.shape[1], -1)
        per_map = losses.mean(2) if self.patch_reduction == "mean" else losses.sum(2)
        per_image = per_map.mean(1)
        return per_image.mean() if self.reduction == "mean" else per_image

    def extra_repr(self) -> str:
        return (
            f"patch_size={self.patch_size!r}, stride={self.stride}, "
            f"temperature={self.temperature}, epsilon={self.epsilon}, cost={self.cost!r}, "
            f"reduction={self.reduction!r}, precision={self.precision!r}"
        )
