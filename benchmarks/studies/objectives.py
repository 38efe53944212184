"""The objectives of the study by name, each a term to stand beside L1.

l1             nothing more
mse            the mean squared error of pixels
vgg            of VGG-16's relu3_3, trained weights (shift-tolerant LPIPS's)
mghf-n:F       MGHF-n of the features F, a name or file of :mod:`.extractors`
mghf-c:F       MGHF-c, with the weights of PRESET; mghf-c:F@2025 with another preset's
csc:F, lip:F   content-style consistency, or local information, of the features F alone;
               lip:pixels has no features at all
dec            DECLoss
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mghf_fast import ContentStyleLoss, DECLoss, LocalInformationLoss, MGHFLoss

from . import extractors
from .tuning import Term

L1, PRESET = "l1", "2026"
TRAINED = "F"
"""Stands in STUDY for the trained features."""


class Row(NamedTuple):
    """An objective of the study: name with ``F`` for the trained features, and what a page says."""

    name: str
    title: str


STUDY = (
    Row(L1, "L1"),
    Row("mse", "+ MSE"),
    Row("vgg", "+ VGG-16 loss, trained"),
    Row("mghf-n:linear", "+ MGHF-n, old random"),
    Row("mghf-c:linear", "+ MGHF-c, old random"),
    Row("mghf-n:curved", "+ MGHF-n, curved start"),
    Row("mghf-c:curved", "+ MGHF-c, curved start"),
    Row("mghf-n:curved-squeeze", "+ MGHF-n, curved start, squeezed"),
    Row("mghf-n:F", "+ MGHF-n, trained features"),
    Row("mghf-c:F", "+ MGHF-c, trained features"),
    Row("csc:F", "+ CSC alone, trained features"),
    Row("lip:F", "+ LIP alone, trained features"),
    Row("lip:pixels", "+ LIP of raw pixels"),
    Row("dec", "+ DECLoss"),
)
VGG, DEFAULT = "vgg", "mghf-c:F"
"""The loss to compare with, and the one whose worth is asked for."""


def _features(name: str) -> tuple[str, str, str]:
    """``"mghf-c:curved@2025"`` -> kind, features, preset."""
    kind, _, features = name.partition(":")
    features, _, preset = features.partition("@")
    return kind, features, preset or PRESET


def build(name: str) -> Term:
    """The term (sr, gt of 0 to 1) -> scalar of an objective's name, but not of L1's.

    Raises:
        ValueError: no such objective or features.
    """
    kind, features, preset = _features(name)
    if name == "mse":
        return F.mse_loss
    if name == VGG:
        kind, features = "mghf-n", "vgg3"
    if name == "dec":
        return DECLoss()
    if kind in ("mghf-n", "mghf-c") and features:
        return MGHFLoss(kind[-1], preset, extractors.load(features), input_range="0,1")
    if kind in ("csc", "lip") and features:
        extractor = extractors.load(features)
        down = getattr(extractor, "downscale", 1)
        part = ContentStyleLoss() if kind == "csc" else LocalInformationLoss(downscale=down)

        def term(sr: Tensor, gt: Tensor) -> Tensor:
            with torch.no_grad():
                target = extractor(2 * gt - 1)
            found: Tensor = part(extractor(2 * sr - 1), target)
            return found

        return term
    raise ValueError(
        "an objective must be mse, vgg, dec, or mghf-n:F, mghf-c:F, csc:F, lip:F of features F, "
        f"got {name!r}"
    )


def label(name: str) -> str:
    """The name without a file's folder."""
    kind, features, preset = _features(name)
    if not features:
        return name
    suffix = "" if preset == PRESET else f"@{preset}"
    return f"{kind}:{extractors.label(features)}{suffix}"


def identity(name: str) -> str:
    """The name, with the digest of the features' weights."""
    kind, features, preset = _features(name)
    return name if not features else f"{kind}:{extractors.identity(features)}@{preset}"
