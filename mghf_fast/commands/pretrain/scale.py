"""The scale of an extractor's features, which is arbitrary for a classifier but not for a loss.

Some terms that the presets weight grow with the square of the features, others do not depend on
their scale. Training increases the features' response to fine detail manyfold; to keep the presets
meaningful, the trained features are scaled back to their response before the first step, by a
factor that is folded into the weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn import DetailFeatureExtractor
from ...nn.detail_feature_extractor import InvertibleBlock


@torch.no_grad()
def response(extractor: DetailFeatureExtractor, images: Tensor) -> float:
    """mean (F(blurred) - F(image))^2, the loss MGHF-n of images under a 5 x 5 mean filter.

    Args:
        extractor: F.
        images: (B, 3, H, W) in [-1, 1].
    """
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    difference = extractor(F.avg_pool2d(padded, 5, stride=1)) - extractor(images)
    return float(difference.double().square().mean())


def power_of_two(wanted: float, found: float) -> float:
    """The power of two that, as a factor of the features, brings the response ``found`` nearest to
    ``wanted``; 1 if one of them is not positive and finite."""
    ratio = wanted / found if found > 0 else 0.0
    return 2.0 ** round(0.5 * math.log2(ratio)) if 0 < ratio < math.inf else 1.0


@torch.no_grad()
def scale_features(extractor: DetailFeatureExtractor, factor: float) -> None:
    """Multiplies the features by ``factor``, a power of two, in the weights of the last block.

    To replace z by s z in z2 <- z2 + phi(z1), z1 <- z1 exp(rho(z2)) + eta(z2), multiply the mix and
    the outputs of phi and eta by s, and divide the inputs of phi, rho and eta by s. Because s is a
    power of two nothing is rounded: the features are s times the former ones, to the bit.

    Raises:
        ValueError: ``factor`` is not a power of two.
    """
    if not factor > 0 or math.frexp(factor)[0] != 0.5:
        raise ValueError(f"factor must be a power of two, got {factor}")
    block = extractor.blocks[-1]
    assert isinstance(block, InvertibleBlock)
    for parameter in block.mix.parameters():
        parameter.mul_(factor)
    for network in (block.phi, block.rho, block.eta):
        network.expand.weight.div_(factor)
    for network in (block.phi, block.eta):
        network.project.weight.mul_(factor)
