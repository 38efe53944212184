"""The objectives of the study by name, each a term to be added to L1.

l1             no further term
mse            the mean squared error of pixels
vgg            the loss of VGG-16's relu3_3, with trained weights (shift-tolerant LPIPS's)
mghf-n:F       MGHF-n of the features F, a name or file of :mod:`.extractors`
mghf-c:F       MGHF-c with the weights of PRESET; mghf-c:F@2025 with another preset's;
               mghf-c:F@2025-no-lip without a term: naive, mse, correlation, gram or lip
csc:F, lip:F   content-style consistency, or local information, of the features F alone;
               lip:pixels uses raw pixels
dec            DECLoss
gan            an adversarial loss with a small discriminator
teacher        shift-tolerant LPIPS with VGG-16, from whose distances the trained features learned
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mghf_fast import ContentStyleLoss, DECLoss, LocalInformationLoss, MGHFLoss
from mghf_fast.commands.evaluate.stlpips import ShiftTolerantLPIPS
from mghf_fast.losses.mghf import PRESETS, Preset

from . import extractors
from .adversarial import AdversarialTerm
from .tuning import Term

L1, PRESET = "l1", "balanced"
TRAINED = "F"
"""The name of the trained features in STUDY."""


class Row(NamedTuple):
    """An objective of the study: its name, with ``F`` for the trained features, and its title."""

    name: str
    title: str


STUDY = (
    Row(L1, "L1"),
    Row("mse", "+ MSE"),
    Row("vgg", "+ VGG-16 loss, trained"),
    Row("mghf-n:linear", "+ MGHF-n, old random"),
    Row("mghf-c:linear@2026", "+ MGHF-c, old random, published weights"),
    Row("mghf-n:curved", "+ MGHF-n, curved start"),
    Row("mghf-c:curved", "+ MGHF-c, curved start"),
    Row("mghf-n:curved-squeeze", "+ MGHF-n, curved start, squeezed"),
    Row("mghf-n:F", "+ MGHF-n, trained features"),
    Row("mghf-c:F@2026", "+ MGHF-c, trained features, published weights"),
    Row("mghf-c:F", "+ MGHF-c, trained features"),
    Row("csc:F", "+ CSC alone, trained features"),
    Row("lip:F", "+ LIP alone, trained features"),
    Row("lip:pixels", "+ LIP of raw pixels"),
    Row("dec", "+ DECLoss"),
    Row("gan", "+ adversarial loss"),
    Row("teacher", "+ ST-LPIPS (VGG-16), the teacher"),
)
PARTS = ("naive", "mse", "correlation", "gram", "lip")
"""Terms of MGHF-c."""
ABLATION = (
    Row("mghf-c:F", "all terms"),
    *(Row(f"mghf-c:F@{PRESET}-no-{part}", f"without {part}") for part in PARTS),
    *(
        Row(
            f"mghf-c:F@{PRESET}" + "".join(f"-no-{other}" for other in PARTS if other != part),
            f"{part} alone",
        )
        for part in PARTS
    ),
)
"""Objectives that show the effect of each term, on the validation pictures."""
VGG, DEFAULT = "vgg", "mghf-c:F"
"""The loss to compare with, and the one that is judged."""


def _features(name: str) -> tuple[str, str, str]:
    """``"mghf-c:curved@2025"`` -> kind, features, preset."""
    kind, _, features = name.partition(":")
    features, _, weights = features.partition("@")
    return kind, features, weights or PRESET


def preset(name: str) -> Preset:
    """The weights of a preset's name; ``-no-TERM`` in it leaves out terms.

    Raises:
        ValueError: no such preset or term.
    """
    base, *without = name.split("-no-")
    if base not in PRESETS or not {*without} <= {*PARTS}:
        raise ValueError(
            f"a preset must be one of {', '.join(PRESETS)}, less terms such as -no-lip "
            f"({', '.join(PARTS)}), got {name!r}"
        )
    found = PRESETS[base]
    (g1, g2, g3), (b1, b2, b3) = found.gammas, found.betas
    kept = {part: float(part not in without) for part in PARTS}
    gammas = (g1 * kept["naive"], g2, g3 * kept["lip"])
    betas = (b1 * kept["mse"], b2 * kept["correlation"], b3 * kept["gram"])
    return dataclasses.replace(found, gammas=gammas, betas=betas)


def build(name: str) -> Term:
    """The term (sr, gt of 0 to 1) -> scalar of an objective's name other than L1's.

    Raises:
        ValueError: no such objective or features.
    """
    kind, features, weights = _features(name)
    if name == "mse":
        return F.mse_loss
    if name == VGG:
        kind, features = "mghf-n", "vgg3"
    if name == "dec":
        return DECLoss()
    if name == "gan":
        return AdversarialTerm()
    if name == "teacher":
        distance = ShiftTolerantLPIPS("vgg")
        return lambda sr, gt: distance(sr, gt).mean()
    if kind in ("mghf-n", "mghf-c") and features:
        return MGHFLoss(kind[-1], preset(weights), extractors.load(features), input_range="0,1")
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
        "an objective must be mse, vgg, dec, gan, teacher, or mghf-n:F, mghf-c:F, csc:F, lip:F of "
        f"features F, got {name!r}"
    )


def label(name: str) -> str:
    """The name without a file's folder."""
    kind, features, weights = _features(name)
    if not features:
        return name
    suffix = "" if weights == PRESET else f"@{weights}"
    return f"{kind}:{extractors.label(features)}{suffix}"


def terms(name: str) -> str:
    """The weights of an objective's terms as text; empty for an objective without any."""
    kind, _, weights = _features(name)
    return repr(preset(weights)) if kind == "mghf-c" else ""


def identity(name: str) -> str:
    """The name, with the digest of the features' weights and the weights of the terms."""
    kind, features, weights = _features(name)
    if not features:
        return name
    return f"{kind}:{extractors.identity(features)}@{weights} {terms(name)}".rstrip()
