"""MGHF with LPIPS's interface (richzhang/PerceptualSimilarity 0.1.4), for code with ``import
lpips``, such as ResShift, OSEDiff and diffusers' training scripts.

    from mghf_fast.integrations import lpips          # was: import lpips
    net_lpips = lpips.LPIPS(net="mghf-c").cuda()      # was: net="vgg"

The package ``lpips`` computes another distance, so weights of the loss do not carry over.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._checks import check_choice
from ._criterion import OPTIONS, Criterion, check_options, check_order

__all__ = ["LPIPS"]

NETS = ("mghf-c", "mghf-n")


class LPIPS(nn.Module):
    """MGHF with the constructor, the call and the result of ``lpips.LPIPS``.

    Args:
        net: ``"mghf-c"`` or ``"mghf-n"``.
        spatial, pnet_tune: must be ``False``: there is no map of distances, and the extractor
            stays frozen.
        pretrained, version, lpips, pnet_rand, use_dropout, model_path, eval_mode, verbose: accepted
            and ignored.
        options: ``preset``, ``extractor``, ``top_m``, ``patch_size``, ``backend``,
            ``precision`` of :class:`mghf_fast.MGHFLoss`; ``patch_size`` is ``"auto"`` unless given.

    Raises:
        ValueError: ``net`` is another network's name; or ``spatial`` or ``pnet_tune`` is not False.
        TypeError: an unknown option.
    """

    def __init__(
        self,
        pretrained: bool = True,
        net: str = "mghf-c",
        version: str = "0.1",
        lpips: bool = True,
        spatial: bool = False,
        pnet_rand: bool = False,
        pnet_tune: bool = False,
        use_dropout: bool = True,
        model_path: str | None = None,
        eval_mode: bool = True,
        verbose: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        check_choice("net", net, NETS)
        for name, value, why in (
            ("spatial", spatial, "MGHF is one number per image, no map"),
            ("pnet_tune", pnet_tune, "the extractor is frozen"),
        ):
            if value:
                raise ValueError(f"{name} must be False, got {value!r}: {why}")
        known = [o for o in OPTIONS if o not in ("variant", "input_range", "reduction")]
        check_options("LPIPS", options, known)
        self.net_type = net
        self.criterion = Criterion(
            net.removeprefix("mghf-"), input_range="-1,1", reduction="none", **options
        )
        self.eval()

    def forward(
        self, in0: Tensor, in1: Tensor, retPerLayer: bool = False, normalize: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Distance of each image from its ground truth, (B, 1, 1, 1).

        Unlike LPIPS it is not symmetric: the gradient goes to ``in0`` only. For equal images it is
        0 with ``net="mghf-n"`` only, because a term of MGHF-c is a contrast.

        Args:
            in0: the super-resolved image, (B, 3, H, W), in [-1, 1]; in [0, 1] with ``normalize``.
            in1: the ground truth, same shape and range.
            retPerLayer: return the pair of the distance and its weighted terms, a list of
                (B, 1, 1, 1) that adds up to it.
            normalize: the images are in [0, 1].

        Raises:
            ValueError: only ``in1`` requires a gradient, as when the two are swapped.
        """
        check_order(in0, in1, ("in0", "in1"))
        if normalize:
            in0, in1 = 2 * in0 - 1, 2 * in1 - 1
        if not retPerLayer:
            return self.criterion(in0, in1).view(-1, 1, 1, 1)
        terms = [term.view(-1, 1, 1, 1) for term in self.criterion.terms(in0, in1).values()]
        return sum(terms[1:], terms[0]), terms
