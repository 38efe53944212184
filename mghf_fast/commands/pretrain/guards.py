"""What an extractor must not lose while it learns distances: penalties, and figures that tell.

* Detail of every octave of frequency is answered: by noise of one strength, the finest octave's
  response over another's stays within a factor of ``OCTAVE_FREE``.
* White noise is no cheaper than blur of the same MSE, up to ``NOISE_FREE``; or a loss would fill in
  noise.
* The blocks can be undone in float32: what the inverse makes of a small error in the features stays
  below ``INVERSE_FREE``.

Each penalty is the square of a logarithm beyond what is free, and 0 within.
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
"""Relative error of the features with which the inverse is tried."""
_SMALL = 1e-12


def responses(probes: Tensor, reference: Tensor) -> Tensor:
    """mean (F(probe) - F(picture))^2 of each probe, (P,), from its features (P, C, h, w) and the
    picture's (C, h, w)."""
    return (probes - reference).square().mean((1, 2, 3))


def _beyond(logarithm: Tensor, free: float) -> Tensor:
    return (logarithm - math.log(free)).clamp(min=0).square()


def octave_penalty(response: Tensor) -> Tensor:
    """The penalty on octaves that the :func:`responses` of a pair batch's probes tell."""
    octaves = (response[: len(OCTAVES)] + _SMALL).log()
    return _beyond((octaves[:-1] - octaves[-1]).abs(), OCTAVE_FREE).mean()


def noise_penalty(response: Tensor) -> Tensor:
    """The penalty on cheap noise that the :func:`responses` of a pair batch's probes tell."""
    blur, white = (response[len(OCTAVES) :] + _SMALL).log()
    return _beyond(blur - white, NOISE_FREE)


def inverse_growth(
    extractor: DetailFeatureExtractor, features: Tensor, direction: Tensor
) -> Tensor:
    """How many times larger, relative to what it is added to, an error of the features becomes when
    the blocks are undone.

    Args:
        features: of one picture, (C, h, w).
        direction: of the error, the same shape.
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
    """What mean :func:`responses` say: each octave's over the finest's, the largest ratio of two
    octaves, and white noise's over blur's."""
    octaves = (response[: len(OCTAVES)] / response[len(OCTAVES) - 1]).tolist()
    blur, white = response[len(OCTAVES) :].tolist()
    return {
        **{f"octave_{place}": value for place, value in enumerate(octaves[:-1], start=1)},
        "octave_spread": max(octaves) / min(octaves) if min(octaves) > 0 else math.inf,
        "noise_over_blur": white / blur if blur > 0 else math.inf,
    }
