"""A study's conclusions: differences at equal PSNR, sentences by rule, and the page."""

from __future__ import annotations

import json
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from benchmarks.report import ROOT
from benchmarks.results import RESULTS
from benchmarks.studies import (
    equal,
    objectives,
    page,
    plots,
    quality,
    runs,
    verdicts,
)
from benchmarks.studies.result import GROUPS

# ---- equal PSNR ----


def made_curves(slope: float, seeds: int = 3, pictures: int = 20, reach: float = 0.5) -> Any:
    """L1 at 25 dB and 0.4; a curve that gains ``slope`` of distance per dB lost, with a little
    noise."""
    random = np.random.default_rng(0)
    lost = np.array([0, 0.6 * reach, reach])[None, :, None]
    base = 25 + random.normal(0, 2, (seeds, 1, pictures))
    noise = random.normal(0, 0.002, (seeds, 3, pictures))
    noise[:, 0] = 0
    return equal.Curves(base - lost, 0.4 + 0.01 * (base - 25) - slope * lost + noise)


def test_a_curve_is_read_between_its_points() -> None:
    psnr = np.array([25.0, 24.8, 24.4])
    distance = np.array([0.4, 0.36, 0.34])
    for target, expected in ((0.1, 0.38), (0.2, 0.36), (0.4, 0.35), (0.6, 0.34), (0.7, 0.335)):
        found, reached = equal.at_loss(psnr, distance, target)
        assert found == pytest.approx(expected) and reached == 1
    found, reached = equal.at_loss(psnr, distance, 0.73)  # 1.2 times 0.6 is 0.72
    assert found == pytest.approx(0.34) and reached == 0
    found, reached = equal.at_loss(np.array([25.0, 25.1, 25.1]), distance, 0.3)
    assert found == pytest.approx(0.34) and reached == 0


def test_differences_and_their_intervals() -> None:
    good, poor = made_curves(0.1), made_curves(0.05)
    against_l1 = equal.difference(good, None, 0.3)
    assert against_l1.mean == pytest.approx(-0.03, abs=1e-3) and against_l1.reached == 1
    assert against_l1.low < against_l1.mean < against_l1.high < 0
    assert against_l1.psnr == pytest.approx(-0.3)
    assert against_l1.outcome() == equal.BETTER
    paired = equal.difference(good, poor, 0.5)
    assert paired.mean == pytest.approx(-0.025, abs=1e-3) and paired.psnr == pytest.approx(0)
    assert paired.outcome() == equal.BETTER
    assert equal.difference(poor, good, 0.5).outcome() == equal.WORSE
    assert equal.difference(good, good, 0.5).outcome() == equal.EVEN
    assert equal.difference(made_curves(0.0), None, 0.5).outcome() == equal.EVEN
    assert equal.difference(good, poor, 0.5) == paired  # repeats
    with pytest.raises(ValueError, match="not paired"):
        equal.difference(good, made_curves(0.1, 2), 0.3)


def test_what_is_not_reached_is_told() -> None:
    short = made_curves(0.1, reach=0.2)
    found = equal.difference(short, None, 0.5)
    assert found.reached == 0 and found.psnr == pytest.approx(-0.2)
    chosen = equal.difference(short, None, 0.5, chosen=1)
    assert chosen.reached == 1 and chosen.psnr == pytest.approx(-0.12)
    assert chosen.mean == pytest.approx(-0.012, abs=1e-3)


def test_the_interval_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval excludes a true difference of 0 between seeds and pictures in about one of
    twenty draws."""
    random = np.random.default_rng(0)
    psnr = np.broadcast_to(np.array([25.0, 24.7, 24.5])[None, :, None], (8, 3, 40))
    outside = 0
    for _ in range(100):
        distance = 0.4 + random.normal(0, 0.01, (8, 3, 40))
        distance[:, 0] = 0.4
        found = equal.difference(equal.Curves(psnr, distance), None, 0.5, resamples=200)
        outside += found.outcome() != equal.EVEN
    assert outside <= 15


# ---- verdicts and page ----


def made_up(l1: float, vgg: float, reached: float = 1.0, real: float = -0.02) -> dict[str, Any]:
    """A complete result in which the default differs by these means from L1 and the VGG loss."""
    titles = {row.name: row.title for row in objectives.STUDY}
    default = objectives.DEFAULT

    def row(against: str, group: str, metric: str, how: str, target: float, mean: float) -> Any:
        low, high = mean - 0.005, mean + 0.005
        return {
            "objective": default, "against": against, "group": group, "metric": metric,
            "how": how, "target": target, "mean": mean, "low": low, "high": high,
            "reached": 1.0 if how == "chosen" else reached, "psnr": -target,
            "outcome": equal.Difference(mean, low, high, 1, 0).outcome(),
        }  # fmt: skip

    means = {objectives.L1: l1, objectives.VGG: vgg}
    differences = [
        row(against, group, metric, how, target, mean if group == "synthetic" else real)
        for against, mean in means.items()
        for group in ("synthetic", "real")
        for metric in (quality.PRIMARY, quality.SECOND)
        for how in ("equal", "chosen")
        for target in runs.TARGETS
    ]
    point = {"psnr": 25.0, "ssim": 0.7, "stlpips": 0.35, "lite2": 5.0}
    networks = [("start", None), ("l1", None)]
    networks += [(name, t) for name in titles if name != "l1" for t in runs.TARGETS]
    return {
        "machine": {"name": "toy-2c", "cpu": "Toy", "torch": "2.x"},
        "protocol": {
            "features": "w.safetensors", "seeds": [0, 1], "steps": 300, "batch": 4, "patch": 96,
            "start": "ab" * 32,
        },
        "titles": titles,
        "validation": [
            {
                "objective": default, "ratio": 3.0, "full_loss": 0.6, "reached": [2, 1],
                "l1": point, "points": [point | {"psnr": 24.7, "stlpips": 0.31}, point],
            }
        ],
        "minimiser": [
            {"features": "pixels", "side": 64, "shift": 1.0, "hf_energy": 0.5, "psnr": 26.5,
             "curvature": 0.0}
        ],
        "cost": {
            "batch": 4, "side": 96, "threads": 1, "rounds": 15,
            "rows": [{"objective": default, "median_s": 0.05, "spread": 0.1, "of_vgg": 0.11}],
        },
        "ablation": [
            {
                "objective": default, "title": "all terms", "ratio": 3.0, "full_loss": 0.6,
                "reached": [1, 1], "l1": point, "points": [point, point],
            }
        ],
        "terms": {
            "batches": 4, "batch": 2,
            "rows": [{"preset": "2026", "side": 64, "naive": 0.5, "lip": 2.0, "total": 2.2}],
        },
        "grid": {
            "period": 4, "seed": 0,
            "rows": [
                {"objective": "gt", "target": None, "ratio": 1.01},
                {"objective": default, "target": 0.3, "ratio": 2.5},
            ],
        },
        "whole": {
            "opened": "a third day", "pictures": {"Set5": 5}, "means": [],
            "differences": [row for row in differences if row["group"] == "synthetic"],
        },
        "test": {
            "opened": "a day", "crop": 256, "second_judge": True,
            "added": [{"opened": "another day", "objectives": ["vgg"]}],
            "pictures": {"Set5": 5, "RealSR": 7}, "differences": differences,
            "means": [
                {"objective": name, "target": t, "set": each} | point
                for name, t in networks
                for each in ("Set5", "RealSR")
            ],
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("l1", "vgg", "headline"),
    [
        (
            -0.03,
            -0.02,
            "nearer to the truth by ST-LPIPS, and it beats the trained VGG",
        ),
        (
            -0.03,
            0.0,
            "by ST-LPIPS, and the trained VGG-16 loss is no better and no worse",
        ),
        (
            -0.03,
            0.02,
            "by ST-LPIPS, but the trained VGG-16 loss is better still",
        ),
        (0.0, 0.02, "is not worth its PSNR"),
        (0.03, -0.02, "is not worth its PSNR"),
    ],
)
def test_the_headline_follows_from_the_figures(l1: float, vgg: float, headline: str) -> None:
    result = made_up(l1, vgg)
    assert headline in verdicts.headline(result, objectives.DEFAULT)
    assert headline in verdicts.verdict(result)


def test_the_sentences_follow_from_the_figures() -> None:
    text = verdicts.verdict(made_up(-0.03, 0.02))
    assert "is nearer to the truth than L1 alone by ST-LPIPS: -0.0300 (-0.0350 to -0.0250)" in text
    assert "is farther from the truth than the trained VGG-16 loss by ST-LPIPS: +0.0200" in text
    assert text.count("On the real degradations") == 2
    assert "0.11 times as long as the VGG-16 loss's on this CPU: a third" in text
    even = verdicts.verdict(made_up(0.0, 0.0, real=0.0))
    assert even.count("cannot be told from") == 8  # two judges, two kinds of pictures
    mixed = made_up(-0.03, 0.0)
    first = verdicts.select(mixed, against="l1", group="synthetic", metric="stlpips", how="equal")
    first[0]["outcome"] = equal.WORSE
    assert verdicts.outcome(first) == equal.EVEN  # the two PSNRs do not agree
    assert "is not worth its PSNR" in verdicts.verdict(mixed)


def test_the_headline_tells_what_the_second_judge_says() -> None:
    result = made_up(-0.03, -0.02)
    rows = verdicts.select(result, against="l1", group="synthetic", metric=quality.SECOND)
    rows = [row for row in rows if row["objective"] == objectives.DEFAULT]
    for outcome, told in (
        (equal.BETTER, "the second judge agrees"),
        (equal.EVEN, "the second judge cannot tell it from L1"),
        (equal.WORSE, "the second judge sees it otherwise"),
    ):
        for row in rows:
            row["outcome"] = outcome
        assert told in verdicts.headline(result, objectives.DEFAULT)


def test_what_is_not_reached_is_not_concluded() -> None:
    text = verdicts.verdict(made_up(-0.03, -0.02, reached=0.8))
    assert "Nothing is concluded" in text
    assert "PSNR differing by -0.30 and -0.50 dB" in text
    closed = made_up(-0.03, -0.02) | {"test": None}
    assert verdicts.verdict(closed) == f"**{verdicts.NOT_OPENED}**\n"


PAGE = "".join(f"<!-- features: {k} -->\nold\n<!-- features: end -->\n" for k in page.BLOCKS)


def test_the_page_is_a_function_of_the_result() -> None:
    result = made_up(-0.03, -0.02)
    source = f"before\n<!-- features: from none -->\n{PAGE}after\n"
    text = page.generate(source, result)
    assert text.startswith("before\n") and text.endswith("after\n") and "old\n" not in text
    assert "<!-- features: from toy-2c-features.json -->" in text
    assert text == page.generate(text, result)
    assert "| pixels | 0.50, 26.50, 0 |" in text
    assert '| `"2026"` | 64 | 0.5 |  |  |  | 2 | 2.2 |' in text
    assert "| all terms | 3 | 0.60 |" in text
    assert "| + MGHF-c, trained features | 3 | 0.60 | 0.3100 | 0.3500 (0.00 dB lost) |" in text
    assert "-0.0300 (-0.0350 to -0.0250) |" in text and "middle 256 x 256 pixels" in text
    assert page.generate(source, None).count("Not measured yet.") == len(page.BLOCKS)
    closed = page.generate(source, result | {"test": None, "cost": None})
    assert "Added on another day, with all that was judged before" in text
    assert (
        "| truth | 1.01 |  |  |" in text and "| + MGHF-c, trained features |  | 2.50 |  |" in text
    )
    assert "5 pictures, opened on a third day" in text
    assert closed.count("Not measured yet.") == 3 and verdicts.NOT_OPENED in closed
    for found in (result, result | {"test": None}):
        svg = page.plot(found)
        assert svg is not None
        ElementTree.fromstring(svg)
    assert page.plot(result | {"test": None, "validation": []}) is None


def test_a_plot_of_one_point_has_axes() -> None:
    svg = plots.curves("t & t", "x", "y", [plots.Curve("a < b", [(1.0, 2.0), (1.0, 2.0)])])
    ElementTree.fromstring(svg)


def test_the_committed_page_says_what_its_result_says() -> None:
    text = (ROOT / "docs" / "features.md").read_text()
    found = page.FROM.search(text)
    assert found is not None and {m[1] for m in page.BLOCK.findall(text)} == set(page.BLOCKS)
    path = RESULTS / found[1]
    result = json.loads(path.read_text()) if path.exists() else None
    assert result is not None or found[1] == "none"
    assert page.generate(text, result) == text, "python -m benchmarks.studies.study --report"
    if result is not None and (svg := page.plot(result)) is not None:
        assert (ROOT / "docs" / "assets" / page.PLOT).read_text() == svg


def test_the_readme_says_what_the_study_found() -> None:
    """The page's figures are the result's."""
    text = (ROOT / "README.md").read_text()
    begin = text.index("[The study](docs/features.md)")
    paragraph = text[begin : text.index("\n## ", begin)]
    found = page.FROM.search((ROOT / "docs" / "features.md").read_text())
    assert found is not None
    result = json.loads((RESULTS / found[1]).read_text())
    told = set(re.findall(r"\d\.\d\d+", paragraph))

    def rows(**wanted: str) -> list[dict[str, Any]]:
        return verdicts.select(
            result, objective=objectives.DEFAULT, metric=quality.PRIMARY, **wanted
        )

    figures = set()
    for row in rows(group="synthetic", how="equal"):
        figures.add(f"{-row['mean']:.3f}")
        if row["against"] == objectives.VGG:
            figures |= {f"{-row['low']:.3f}", f"{-row['high']:.3f}"}
        else:
            assert max(row["high"] - row["mean"], row["mean"] - row["low"]) < 0.007
    (first,) = rows(group="real", how="equal", against=objectives.L1, target=0.3)
    figures.add(f"{-first['mean']:.3f}")
    (first,) = rows(group="real", how="chosen", against=objectives.VGG, target=0.3)
    figures |= {f"{-first['mean']:.3f}", f"{-first['psnr']:.2f}", "0.007"}
    assert told == figures
    for group, count in (("synthetic", "141"), ("real", "147")):
        sets = GROUPS[group]
        assert sum(result["test"]["pictures"][name] for name in sets) == int(count)
        assert count in paragraph
