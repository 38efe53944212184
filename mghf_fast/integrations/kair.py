"""KAIR (cszn/KAIR): ``PerceptualLoss`` for its ``models/model_gan.py``. Change one import there,

    from models.loss import GANLoss
    from mghf_fast.integrations.kair import PerceptualLoss

and in the options (JSON) name the loss in place of the VGG's norm:

    "F_lossfn_type": "mghf-c", "F_lossfn_weight": 0.1, "F_weights": {"extractor": "perceptual-v1"}

KAIR multiplies by ``F_lossfn_weight`` itself. ``"l1"`` and ``"l2"`` still mean KAIR's own VGG loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ._criterion import OPTIONS, Criterion, check_options, pair

__all__ = ["MGHF", "PerceptualLoss"]

KINDS = ("mghf-c", "mghf-n")
KAIRS = ("l1", "l2")


class MGHF(nn.Module):
    """MGHF with the interface of KAIR's perceptual loss.

    Attributes:
        vgg: the module that KAIR wraps into ``DataParallel``: the whole loss, from both images.
        lossfn: the module that KAIR moves to the device: an empty one.
    """

    def __init__(self, variant: str, input_range: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        known = [o for o in OPTIONS if o not in ("variant", "input_range", "reduction")]
        check_options("F_weights", options, known)
        # One value per image, because each of several GPUs returns the values of its own images.
        self.vgg: nn.Module = Criterion(
            variant, input_range=input_range, reduction="none", **options
        )
        self.lossfn: nn.Module = nn.Identity()

    def forward(self, x: Tensor, gt: Tensor) -> Tensor:
        """Images (B, 3, H, W) twice -> the loss, a scalar."""
        x, gt, _ = pair(x, gt, ("x", "gt"))
        loss: Tensor = self.vgg(x, gt).mean()
        return loss


def PerceptualLoss(
    feature_layer: Any = (2, 7, 16, 25, 34),
    weights: Sequence[float] | Mapping[str, Any] = (0.1, 0.1, 1.0, 1.0, 1.0),
    lossfn_type: str = "l1",
    use_input_norm: bool = True,
    use_range_norm: bool = False,
) -> nn.Module:
    """The loss that KAIR's options name.

    Args:
        feature_layer, use_input_norm: for KAIR's own VGG loss.
        weights: weights of the VGG's layers; for MGHF a mapping with ``preset``, ``extractor``,
            ``top_m``, ``patch_size``, ``backend``, ``precision``, or a list, which is ignored.
        lossfn_type: ``"mghf-c"``, ``"mghf-n"``, or ``"l1"``, ``"l2"`` for KAIR's own.
        use_range_norm: the images are in [-1, 1], not in [0, 1].

    Raises:
        ValueError: another ``lossfn_type``.
        TypeError: an option unknown to MGHF.
    """
    if lossfn_type in KINDS:
        options = weights if isinstance(weights, Mapping) else {}
        input_range = "-1,1" if use_range_norm else "0,1"
        return MGHF(lossfn_type.removeprefix("mghf-"), input_range, options)
    if lossfn_type not in KAIRS:
        allowed = ", ".join(map(repr, (*KINDS, *KAIRS)))
        raise ValueError(f"F_lossfn_type must be one of {allowed}, got {lossfn_type!r}")
    from models.loss import PerceptualLoss as own  # KAIR's folder is the current one

    loss: nn.Module = own(
        feature_layer=feature_layer if isinstance(feature_layer, int) else list(feature_layer),
        weights=weights,
        lossfn_type=lossfn_type,
        use_input_norm=use_input_norm,
        use_range_norm=use_range_norm,
    )
    return loss
