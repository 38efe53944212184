"""The quantities of centre-oriented optimisation."""

from __future__ import annotations

import math

import draws
import pytest
import torch

from mghf_fast.analysis import center_oriented_optimization


def test_theorems_on_random_candidates() -> None:
    """More candidates: more entropy, the midpoint nearer to the blurriest image (Theorem 1)."""
    y = draws.rand(200, 3, 8, 8)
    few, many = center_oriented_optimization(y[:4]), center_oriented_optimization(y[:150])
    assert few.entropy == pytest.approx(math.log(4)) and many.entropy == pytest.approx(
        math.log(150)
    )
    assert many.distance < few.distance
    wide = center_oriented_optimization(3 * y[:4])
    assert wide.spread == pytest.approx(3 * few.spread)  # Theorem 2: more variance, more spread
    torch.testing.assert_close(few.midpoint, y[:4].mean(0))


def test_gaussian_entropy() -> None:
    y = 0.5 * draws.randn(20_000, 1, 2, 1, dtype=torch.float64)
    expected = 0.5 * math.log((2 * math.pi * math.e) ** 2 * 0.25**2)
    assert center_oriented_optimization(y, 1).entropy == pytest.approx(expected, abs=0.02)
    assert center_oriented_optimization(y, 1).distance == pytest.approx(0)  # D is the identity


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="multiple of scale = 4 pixels"):
        center_oriented_optimization(draws.rand(2, 3, 6, 8))
    with pytest.raises(ValueError, match=r"candidates must have shape \(N, C, H, W\)"):
        center_oriented_optimization(draws.rand(3, 8, 8))
