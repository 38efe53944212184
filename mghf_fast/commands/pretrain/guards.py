"""Properties that an extractor must keep while it learns distances: penalties and figures.

* It responds to detail of every octave of frequency: for noise of equal strength, the finest
  octave's response divided by another's stays within a factor of ``OCTAVE_FREE``.
* White noise costs no less than blur of the same MSE, up to ``NOISE_FREE``; otherwise training on
  the loss would add noise.
* The blocks can be inverted in float32: the inverse amplifies a small error in the features by less
  than ``INVERSE_FREE``.

Each penalty is the squared excess of a logarithm over its limit, and 0 within the limit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...nn import DetailFeatureExtractor
from ...nn.detail_feature_extractor import InvertibleBlock
from ...ops.coupling import plain_inverse
from .pairs import OCTAVES

OCTAVE_FREE = 2.0
NOISE_FREE = 2.0
INVERSE_FREE = 300.0
INVERSE_ERROR = 1e-3
"""Relative error of the features with which the inverse is tested."""
_SMALL = 1e-12


def responses(probes: Tensor, reference: Tensor) -> Tensor:
    """mean (F(probe) - F(picture))^2 for each probe, (P,), from the probes' features (P, C, h, w)
    and the picture's (C, h, w)."""
    return (probes - reference).square().mean((1, 2, 3))


def _beyond(logarithm: Tensor, free: float) -> Tensor:
    return (logarithm - math.log(free)).clamp(min=0).square()


def octave_penalty(response: Tensor) -> Tensor:
    """The penalty on unequal octaves, from the :func:`responses` to a batch's probes."""
    octaves = (response[: len(OCTAVES)] + _SMALL).log()
    return _beyond((octaves[:-1] - octaves[-1]).abs(), OCTAVE_FREE).mean()


def noise_penalty(response: Tensor) -> Tensor:
    """The penalty on cheap noise, from the :func:`responses` to a batch's probes."""
    blur, white = (response[len(OCTAVES) :] + _SMALL).log()
    return _beyond(blur - white, NOISE_FREE)


def inverse_growth(
    extractor: DetailFeatureExtractor, features: Tensor, direction: Tensor
) -> Tensor:
    """The factor by which inverting the blocks amplifies a relative error in the features.

    Args:
        features: features of one picture, (C, h, w).
        direction: direction of the error, same shape.
    """
    error = direction * (
        INVERSE_ERROR * features.detach().norm() / torch.linalg.vector_norm(direction)
    )
    both = torch.stack([features, features + error]).contiguous(memory_format=torch.channels_last)
    for block in reversed(extractor.blocks):
        assert isinstance(block, InvertibleBlock)
        both = plain_inverse(both, block.weights())
    undone, moved = both
    relative = torch.linalg.vector_norm(moved - undone) / torch.linalg.vector_norm(undone)
    return relative / INVERSE_ERROR


def inverse_penalty(growth: Tensor) -> Tensor:
    """The penalty on :func:`inverse_growth`."""
    return _beyond((growth + _SMALL).log(), INVERSE_FREE)


def figures(response: Tensor) -> dict[str, float]:
    """Ratios of mean :func:`responses`: each octave's to the finest's, the largest between two
    octaves, and white noise's to blur's."""
    octaves = (response[: len(OCTAVES)] / response[len(OCTAVES) - 1]).tolist()
    blur, white = response[len(OCTAVES) :].tolist()
    return {
        **{f"octave_{place}": value for place, value in enumerate(octaves[:-1], start=1)},
        "octave_spread": max(octaves) / min(octaves) if min(octaves) > 0 else math.inf,
        "noise_over_blur": white / blur if blur > 0 else math.inf,
    }
