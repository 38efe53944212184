"""The counts of Table 5 come out exactly, to the digits the paper prints."""

from __future__ import annotations

import pytest

from mghf_fast import cost
from mghf_fast.cost import Setting

PAPER = Setting()
ROWS = {row.key: row for row in cost.table5()}


def test_lip_parts() -> None:
    gmacs = {name: round(macs / 1e9, 3) for name, macs in cost.lip_parts(PAPER).items()}
    assert gmacs == {
        "projection": 15.722, "similarity": 3.186, "positives": 0.004, "sinkhorn": 2.489,
    }  # fmt: skip
    assert PAPER.patches == 441


@pytest.mark.parametrize(
    ("key", "gmacs", "digits"),
    [
        ("lip", 21.40169, 5),
        ("gram", 8.590, 3),
        ("correlation", 0.369, 3),
        ("awdfe_mse", 0.067, 3),
        ("dfe_mse", 0.067, 3),
        ("dfe", 36.172, 3),
        ("vgg16", 160.357, 3),
    ],
)
def test_multiply_adds(key: str, gmacs: float, digits: int) -> None:
    assert round(ROWS[key].published.gmacs, digits) == gmacs


def test_extractor_with_multiply_and_add_apart_is_close_to_the_printed_figure() -> None:
    apart = 2 * ROWS["dfe"].published.gmacs
    assert round(apart, 3) == 72.343
    assert abs(apart / ROWS["dfe"].paper[0] - 1) < 0.00075


@pytest.mark.parametrize(
    ("key", "mib", "digits"),
    [
        ("lip", 819.955, 3),
        ("gram", 512.125, 3),
        ("correlation", 512.0, 2),
        ("awdfe_mse", 256.0, 2),
        ("dfe_mse", 384.0, 2),
        ("vgg16", 56.13, 2),
    ],
)
def test_memory(key: str, mib: float, digits: int) -> None:
    assert round(ROWS[key].published.mib, digits) == mib


def test_parameters() -> None:
    assert ROWS["lip"].published.parameters == 139_456
    assert ROWS["dfe"].published.parameters == 69_120
    assert ROWS["dfe"].ours.parameters == 72_704
    assert ROWS["vgg16"].published.parameters == 14_714_688
    per_pixel = cost.invertible_block(PAPER).macs / (2 * PAPER.pixels)
    assert (per_pixel, cost.stem(PAPER).macs / (2 * PAPER.pixels)) == (68_992, 3_456)
    # the stem in the place of the first mix
    assert ROWS["dfe"].ours.macs / (2 * PAPER.pixels) == 68_992 - 128**2 + 3_456


def test_total_is_the_sum_of_the_rows_above_it() -> None:
    parts = [row for key, row in ROWS.items() if key not in ("total", "vgg16")]
    for side in ("published", "ours"):
        total = getattr(ROWS["total"], side)
        for field in ("macs", "bytes", "parameters"):
            assert getattr(total, field) == sum(getattr(getattr(r, side), field) for r in parts)
    assert round(sum(row.paper[1] for row in parts), 2) == 2485.40


def test_our_defaults_halve_the_kept_maps() -> None:
    assert ROWS["gram"].ours.macs * 4 == ROWS["gram"].published.macs
    assert ROWS["correlation"].ours.macs * 2 == ROWS["correlation"].published.macs
    assert ROWS["lip"].ours.macs < ROWS["lip"].published.macs


def test_counts_are_linear_in_the_batch() -> None:
    two = {row.key: row for row in cost.table5(batch=2)}
    for key, row in ROWS.items():
        assert two[key].published.macs == 2 * row.published.macs
        assert two[key].published.parameters == row.published.parameters


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"channels": 127, "kept": 64}, "channels is 127"),
        ({"kept": 129}, "kept is 129"),
        ({"width": 31}, "512x31 image"),
    ],
)
def test_bad_sizes_are_named(arguments: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Setting(**arguments)
