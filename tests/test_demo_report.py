"""The demo's report: its content, and the rule for its headline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("PIL.Image")

from mghf_fast.commands.demo import charts, photographs, summary, train
from mghf_fast.commands.demo.metrics import Quality
from mghf_fast.commands.pixels import Pixels

# --- the headline --------------------------------------------------------------------------------


def quality(**changes: float | None) -> Quality:
    values: dict[str, float | None] = dict(
        psnr=27.0,
        ssim=0.7,
        stlpips=0.3,
        hf_error=10.0,
        hf_energy=0.2,
        hf_correlation=0.3,
        sharpness=1,
    )
    return Quality(**{**values, **changes})  # type: ignore[arg-type]


class Found:
    """The part of a result that the headline and the remarks use."""

    def __init__(self, l1: list[Quality], mghf: list[Quality]) -> None:
        self.quality = {"L1": l1, "MGHF-c": mghf}
        self.held_out = l1
        self.judged = l1[0].stlpips is not None

    def mean(self, method: str) -> Quality:
        return Quality.mean(self.quality[method])


@pytest.mark.parametrize(
    ("l1", "mghf", "verdict", "words"),
    [
        (0.30, 0.25, "better", "better than L1 alone: ST-LPIPS 0.2500 against 0.3000"),
        (0.30, 0.31, "worse", "worse than L1 alone: ST-LPIPS 0.3100 against 0.3000"),
        (0.30, 0.298, "no difference", "no difference to L1 alone: ST-LPIPS 0.2980"),
        (0.30, 0.302, "no difference", "no difference to L1 alone: ST-LPIPS 0.3020"),
    ],
)
def test_the_headline_follows_the_judge_and_names_the_price(
    l1: float, mghf: float, verdict: str, words: str
) -> None:
    # The spectrum says the opposite of each, and must be ignored.
    against = 30.0 if mghf < l1 else 1.0
    found: Any = Found(
        [quality(stlpips=l1)] * 2, [quality(stlpips=mghf, psnr=26.75, hf_error=against)] * 2
    )
    assert summary.verdict(found) == verdict
    headline = summary.headline(found)
    assert words in headline and "for 0.25 dB less PSNR" in headline
    assert f"lower on {2 * (mghf < l1)} of 2" in headline


@pytest.mark.parametrize(
    ("error", "psnr", "verdict", "price"),
    [
        (8.0, 27.0, "better", "at the same PSNR"),
        (12.0, 27.5, "worse", "with 0.50 dB more PSNR"),
        (10.05, 27.0, "no difference", "at the same PSNR"),
    ],
)
def test_without_a_judge_the_spectrum_decides(
    error: float, psnr: float, verdict: str, price: str
) -> None:
    found: Any = Found([quality(stlpips=None)], [quality(stlpips=None, hf_error=error, psnr=psnr)])
    assert summary.verdict(found) == verdict
    headline = summary.headline(found)
    assert f"high-frequency error {error:.2f} dB against 10.00 dB" in headline
    assert price in headline and "over the held-out photograph (" in headline


# --- crops and charts ----------------------------------------------------------------------------


def picture(height: int, width: int) -> Pixels:
    """Waves of several lengths."""
    y, x = np.mgrid[:height, :width]
    base = np.sin(x / 2) * np.cos(y / 3) + np.sin(x / 7 + y / 5)
    return np.repeat((128 + 50 * base).astype(np.uint8)[..., None], 3, 2)


def test_the_shown_window_is_the_busiest() -> None:
    gt = np.full((200, 300, 3), 90, np.uint8)
    gt[90:170, 180:260] = picture(80, 80)
    for side in (96, train.CROP):
        top, left = train.busiest_window(gt, side)
        assert top <= 90 and left <= 180 and top + side >= 170 and left + side >= 260


def test_the_shown_crops_are_of_one_size() -> None:
    shown = [
        photographs.Photograph(str(i), picture(*s)) for i, s in enumerate(((128, 240), (300, 144)))
    ]
    held_out = train.hold_out(shown, 0)
    assert [h.window(h.gt).shape for h in held_out] == [(128, 128, 3)] * 2
    large = train.hold_out([photographs.Photograph("a", picture(400, 320))], 0)[0]
    assert large.window(large.gt).shape == (train.CROP, train.CROP, 3)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-5, 2e-5), (27.1, 27.2), (1, 120)])
def test_axis_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = charts.ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)


def test_a_chart_of_one_point_can_be_drawn() -> None:
    svg = charts.line_chart([charts.Line("a<b", "l1", [1], [2.0])], "x", "y", description="d")
    assert svg.startswith("<svg") and "a&lt;b" in svg and "nan" not in svg
