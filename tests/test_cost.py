"""The counts of Table 5 come out exactly, to the digits the paper prints."""

from __future__ import annotations

import pytest

from mghf_fast.commands.table5 import cost
from mghf_fast.commands.table5.cost import Setting

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
    # the stem in place of the first mix
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


# ---- the squeeze stem ----------------------------------------------------------------------------


def test_a_squeezed_extractor_costs_a_part() -> None:
    """Counted by hand: 128 x 128 pixels of the features, each with 48 x 128 multiply-adds of the
    lift, and three blocks with all their mixes."""
    squeezed = Setting(squeeze=4, blocks=3)
    assert squeezed.sides == (128, 128) and squeezed.pixels == PAPER.pixels // 16
    assert cost.stem(squeezed).macs == 2 * 48 * 128 * 128**2
    assert cost.stem(squeezed).parameters == 48 * 128
    whole = cost.extractor(squeezed, with_stem=True)
    assert whole.macs == 2 * 128**2 * (48 * 128 + 3 * 68_992)
    assert whole.parameters == 48 * 128 + 3 * 69_120
    assert cost.extractor(squeezed).macs == 2 * 128**2 * 3 * 68_992


@pytest.mark.parametrize("squeeze", [2, 4, 8])
def test_a_squeeze_keeps_the_patches_and_shrinks_them(squeeze: int) -> None:
    squeezed = Setting(squeeze=squeeze, channels=192)
    assert squeezed.patches == 441 and squeezed.patch_pixels == (32 // squeeze) ** 2
    assert cost.projection_parameters(squeezed) == (
        (32 // squeeze) ** 2 * 128 + 128 + 128 * 64 + 64
    )
    parts, full = cost.lip_parts(squeezed), cost.lip_parts(Setting(channels=192))
    assert {name for name in parts if parts[name] != full[name]} == {"projection"}
    assert cost.gram(squeezed).macs * squeeze**2 == cost.gram(Setting(channels=192)).macs


def test_sides_that_the_squeeze_does_not_divide_are_rounded_up() -> None:
    squeezed = Setting(height=61, width=90, squeeze=4)
    assert squeezed.sides == (16, 23)
    assert squeezed.patches == ((16 - 8) // 6 + 1) * ((23 - 8) // 6 + 1)


def test_table_of_a_squeezed_extractor() -> None:
    rows = {row.key: row for row in cost.table5(blocks=3, squeeze=4)}
    assert rows["dfe"].ours == cost.extractor(Setting(kept=64, blocks=3, squeeze=4), with_stem=True)
    for key, row in rows.items():
        assert row.published == ROWS[key].published
    assert rows["total"].ours.macs < 0.3 * ROWS["total"].ours.macs


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"squeeze": 0}, "squeeze is 0"),
        ({"squeeze": 5}, "squeeze is 5; it must divide patch_size 32 and stride 24"),
        ({"squeeze": 8}, r"squeeze is 8; channels 128 must be at least .* = 192"),
    ],
)
def test_squeezes_that_do_not_fit_are_named(arguments: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Setting(**arguments)
