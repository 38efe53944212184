"""The two objectives that the demo compares, and the settings of the second."""

from __future__ import annotations

from mghf_fast.losses.mghf import DEFAULT_EXTRACTOR, DEFAULT_PRESET

from .objectives import Objective as Objective
from .objectives import l1 as l1
from .objectives import mghf, with_l1

EXTRACTOR = DEFAULT_EXTRACTOR
"""Name of the feature extractor, a loss's default."""
PRESET = DEFAULT_PRESET
"""Weights of the terms within MGHF-c."""
MGHF_WEIGHT = 0.1
"""w in ``L1 + w * MGHF-c``, both terms being means over the batch. Its effect depends on extractor
and preset: each report gives the length of the gradient of w * MGHF-c relative to L1's, and
``--ablation`` gives every other objective that length."""


def l1_with_mghf() -> Objective:
    """``L1 + MGHF_WEIGHT * MGHF-c``; its terms hold MGHF-c without the weight as ``"mghf"``."""
    return with_l1(mghf(EXTRACTOR, "c", PRESET), MGHF_WEIGHT, "mghf")
