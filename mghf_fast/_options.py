"""Checks of the options that a function and the module around it share, so that a module refuses
when it is made what its function would refuse at the first call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _checks as check
from .ops import vocabulary

GRAMS = ("channel", "map")
MOST_BINS = 1 << 24
"""A histogram of more bins than float32 has integers would lose values."""


def bins_of(bins: Any) -> int:
    """The number of a histogram's bins."""
    return check.check_integer("bins", bins, 2, MOST_BINS)


def style(
    top_m: Any, alpha: Any, gamma: Any, bins: Any, gram: Any, most: int | None = None
) -> tuple[int | None, float, float, int]:
    """The options of the content-style terms, but ``gram``; ``most`` is the number of maps."""
    if top_m is not None:
        top_m = check.check_integer("top_m", top_m, 1, most)
    alpha, gamma = check.check_number("alpha", alpha), check.check_number("gamma", gamma)
    if alpha <= -1:
        raise ValueError(
            f"alpha must be above -1, or a weight is a power of a negative number, got {alpha}"
        )
    check.check_choice("gram", gram, GRAMS)
    return top_m, float(alpha), float(gamma), bins_of(bins)


def dec(
    patch_size: Any = 8,
    threshold_db: Any = 34.0,
    temperatures: Sequence[Any] = (0.5, 1.5),
    temperature: Any = "inside",
    similarity: Any = "rmse",
    max_value: Any = 1.0,
    norm_floor: Any = None,
) -> tuple[int, float, tuple[float, float], float, float | None]:
    """The options of DECLoss, but the names: ``patch_size``, ``threshold_db``, ``temperatures``,
    ``max_value``, ``norm_floor``."""
    patch_size = check.check_integer("patch_size", patch_size, 1)
    threshold_db = float(check.check_number("threshold_db", threshold_db))
    of_positives, of_negatives = check.check_numbers("temperatures", temperatures, 2, positive=True)
    check.check_choice("temperature", temperature, vocabulary.TEMPERATURES)
    check.check_choice("similarity", similarity, vocabulary.SIMILARITIES)
    max_value = float(check.check_number("max_value", max_value, positive=True))
    if norm_floor is not None:
        norm_floor = float(check.check_number("norm_floor", norm_floor, positive=True))
    pair = (float(of_positives), float(of_negatives))
    return patch_size, threshold_db, pair, max_value, norm_floor
