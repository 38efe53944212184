"""`mghf-fast visualize`: shares that add up to the terms, the drawing, and the errors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

Image = pytest.importorskip("PIL.Image")

from mghf_fast import DetailFeatureExtractor, MGHFLoss  # noqa: E402
from mghf_fast.commands import cli  # noqa: E402
from mghf_fast.commands.visualize import analysis, canvas, colours, figure, pictures, shares  # noqa: E402
from mghf_fast.losses import Preset  # noqa: E402


def scene(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth structure and fine texture, (3, H, W) in [0, 1]."""
    random = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = torch.stack([(x / 9 + y / (5 + c)).sin() for c in range(3)])
    noise = torch.randn(3, height, width, generator=random)
    return (0.5 + 0.25 * waves + 0.06 * noise).clamp(0, 1)


def saved(path: Path, picture: Tensor, **options: object) -> Path:
    pixels = (picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture(scope="module")
def extractor() -> DetailFeatureExtractor:
    torch.manual_seed(0)
    return DetailFeatureExtractor(3, 12)


@pytest.fixture(scope="module")
def extractor_file(
    extractor: DetailFeatureExtractor, tmp_path_factory: pytest.TempPathFactory
) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    extractor.save_pretrained(path)
    return str(path)


def compare(extractor: DetailFeatureExtractor, gt: Tensor, sr: Tensor) -> analysis.Comparison:
    found = analysis.analyse(analysis.make_loss(extractor, "2026"), [gt, sr])
    assert found.comparison is not None
    return found.comparison


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["2025", "2026"])
def test_the_mean_of_a_heat_map_is_its_term(extractor: DetailFeatureExtractor, preset: str) -> None:
    gt = scene(61, 90)
    sr = (gt + 0.1 * scene(61, 90, seed=1)).clamp(0, 1)
    loss = analysis.make_loss(extractor, preset)
    comparison = analysis.analyse(loss, [gt, sr]).comparison
    assert comparison is not None
    for name in figure.TERM_NAMES:
        share, term = comparison.shares[name], comparison.terms[name]
        assert share.shape == (61, 90)
        assert float(share.mean()) == pytest.approx(term, rel=2e-4, abs=1e-12), name
        if name != "csc_gram":
            assert share.min() >= 0
    assert float(comparison.shares["total"].mean()) == pytest.approx(
        comparison.terms["total"], rel=1e-4
    )
    assert sum(comparison.weighted.values()) == pytest.approx(comparison.terms["total"], rel=1e-5)
    assert comparison.terms["total"] == pytest.approx(float(loss(sr[None], gt[None])), rel=1e-6)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (61, 90)])
def test_shares_of_squeezed_features_are_brought_to_the_pictures_size(
    height: int, width: int
) -> None:
    torch.manual_seed(0)
    extractor = DetailFeatureExtractor(3, 48, 2, stem="squeeze")
    gt = scene(height, width)
    comparison = compare(extractor, gt, (gt + 0.1 * scene(height, width, seed=1)).clamp(0, 1))
    for name in figure.TERM_NAMES:
        share, term = comparison.shares[name], comparison.terms[name]
        assert share.shape == (height, width)
        assert float(share.mean()) == pytest.approx(term, rel=2e-4, abs=1e-12), name
    assert comparison.shares["total"].mean() == pytest.approx(comparison.terms["total"], rel=1e-4)
    assert comparison.gradient.shape == (height, width)
    rows, columns = (range(0, -(-side // 4) * 4 - 31, 24) for side in (height, width))
    assert comparison.corners == [(y, x) for y in rows for x in columns]
    assert comparison.links


def test_a_share_stands_over_the_pixels_that_its_features_are_made_of() -> None:
    share = torch.arange(6.0).view(2, 3)
    even = shares.enlarged(share, 4, 8, 12)
    assert torch.equal(even, share.repeat_interleave(4, 0).repeat_interleave(4, 1))
    cut = shares.enlarged(share, 4, 5, 11)
    assert cut.shape == (5, 11) and float(cut.mean()) == pytest.approx(2.5)
    # The second has only one row of four; its share is as large as if it had all.
    assert float(cut[4:, 4:8].sum() / cut[:4, 4:8].sum()) == pytest.approx(4)


def test_terms_without_a_weight_are_left_out(extractor: DetailFeatureExtractor) -> None:
    gt = scene(64, 64)
    sr = (gt + 0.1 * scene(64, 64, seed=1)).clamp(0, 1)
    for gammas, names in (((1, 0, 0), {"naive"}), ((0, 0, 1), {"lip"})):
        preset = Preset(gammas, (1, 1, 1), 1.1, 1.4, 24)
        loss = MGHFLoss("c", preset, extractor, reduction="none", input_range="0,1")
        found = analysis.analyse(loss, [gt, sr])
        assert found.comparison is not None
        assert set(found.comparison.weighted) == names
        assert set(found.comparison.shares) == {*names, "total"}
        shown = [pictures.Picture(name, x) for name, x in (("a", gt), ("b", sr))]
        titles = [section.title for section in figure.sections(shown, found, 4, 800)]
        assert ("The transport plan's strongest links" in titles) == ("lip" in names)


def test_a_constant_map_keeps_the_sum_right() -> None:
    """Its correlation counts as 0, so its share is 1, spread evenly."""
    gt, sr = torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(0)).double()
    sr[1] = 0.7
    terms = analysis.functional.content_style_terms(gt=gt[None], sr=sr[None], top_m=3)
    assert float(shares.correlation(gt, sr).mean()) == pytest.approx(float(terms.correlation))
    alone = shares.correlation(gt[1:2], sr[1:2])
    assert float(alone.mean()) == pytest.approx(1)


def test_shares_are_where_the_pictures_differ(extractor: DetailFeatureExtractor) -> None:
    gt = scene(64, 64)
    sr = gt.clone()
    sr[:, 40:48, 8:16] = 1 - sr[:, 40:48, 8:16]
    comparison = compare(extractor, gt, sr)
    near = torch.zeros(64, 64, dtype=torch.bool)
    near[36:52, 4:20] = True  # the receptive field reaches 3 pixels further
    for name in ("naive", "csc_mse"):
        assert comparison.shares[name][~near].abs().max() < 1e-10
    for name in ("csc_correlation", "csc_gram"):  # every pixel contributes to the moments
        share = comparison.shares[name].abs()
        assert share[near].sum() > 0.75 * share.sum()
    assert comparison.shares["lip"].argmax() // 64 >= 24  # a patch that holds the difference
    assert comparison.gradient[~near].mean() < comparison.gradient[near].mean()


def test_no_difference_has_no_share(extractor: DetailFeatureExtractor) -> None:
    gt = scene(40, 40)
    comparison = compare(extractor, gt, gt)
    for name in ("naive", "csc_mse", "csc_correlation", "csc_gram"):
        assert comparison.shares[name].abs().max() < 1e-6
    assert comparison.links == []  # a single patch has no negatives


def test_patches_that_reach_no_further_leave_the_rest_empty() -> None:
    share = shares.lip(torch.tensor([1.0, 3.0]), 40, 60, 32, 24)
    assert shares.patch_corners(40, 60, 32, 24) == [(0, 0), (0, 24)]
    assert float(share.mean()) == pytest.approx(2)
    assert share[32:].abs().max() == 0 and share[:, 56:].abs().max() == 0
    assert float(share[0, 0] / share[0, 30]) == pytest.approx(1 / 2)  # overlaps are averaged
    assert float(share[0, 40] / share[0, 0]) == pytest.approx(3)


def test_links_are_the_strongest_of_each_patch() -> None:
    plan = torch.tensor([[0, 0.9, 0.1], [0.4, 0, 0.6], [0.2, 0.8, 0]])
    links = analysis.strongest_links(plan, 2)
    assert [(link.query, link.key) for link in links] == [(0, 1), (2, 1)]
    assert links[0].strength == pytest.approx(1.8)  # a uniform plan gives 1/2 each
    assert analysis.strongest_links(torch.zeros(1, 1), 5) == []


def test_one_picture_is_compared_with_itself(extractor: DetailFeatureExtractor) -> None:
    found = analysis.analyse(analysis.make_loss(extractor, "2026"), [scene(20, 24)])
    assert found.comparison is None and found.kept == 6
    importance = 1 - found.entropy[0][found.order]
    assert (importance.diff() <= 1e-6).all()
    torch.testing.assert_close(found.weights, (1 + 1.1 * importance) ** 2**0.5, rtol=1e-5, atol=0)


def test_which_maps_are_shown() -> None:
    order = list(range(12))
    assert figure.shown_maps(order, 6, 8) == [0, 1, 2, 3, 4, 5, 10, 11]
    assert figure.shown_maps(order, 6, 2) == [0, 11]
    assert figure.shown_maps(order, 6, 64) == order
    assert figure.shown_maps([0, 1], 1, 8) == [0, 1]


# ---- drawing -------------------------------------------------------------------------------------


def test_scales_run_from_end_to_end() -> None:
    for anchors in (colours.HEAT, colours.SIGNED):
        ends = colours.scale(np.array([[-1.0, 0, 1, 2]], np.float32), anchors)[0]
        np.testing.assert_array_equal(ends[0], ends[1])
        np.testing.assert_array_equal(ends[2], ends[3])
    heat = colours.scale(np.linspace(0, 1, 50, dtype=np.float32)[None], colours.HEAT)[0]
    assert (np.diff(heat @ [0.3, 0.59, 0.11]) > 0).all()  # also works in grey


def test_heat_is_over_the_picture() -> None:
    values = torch.zeros(10, 10)
    values[5, 5] = 1
    picture = scene(10, 10)
    over = colours.heat_over(picture, values)
    grey = picture.mean(0).numpy() * 0.38
    np.testing.assert_allclose(over[0, 0], np.repeat(grey[0, 0], 3), rtol=1e-5)
    assert over[5, 5].sum() > 2 and np.isfinite(colours.heat_over(picture, 0 * values)).all()


def test_text_wraps_and_cuts() -> None:
    width = 120
    for text in ("short", "many words in a row that do not fit", "w" * 300, "a " + "w" * 60 + " b"):
        lines = canvas.wrapped(text, 14, width)
        assert all(canvas.font(14).getlength(line) <= width for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_enlarged_pixels_stay_pixels() -> None:
    small = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    np.testing.assert_array_equal(
        np.asarray(canvas.fitted(small, 12)), np.asarray(small).repeat(3, 0).repeat(3, 1)
    )
    assert canvas.fitted(small, 3).size == (3, 3)


# ---- the command ---------------------------------------------------------------------------------


def test_pair_as_png_and_html(
    tmp_path: Path, extractor_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gt = scene(66, 90)
    words = [
        "visualize",
        str(saved(tmp_path / "kit <b>.png", gt)),
        str(saved(tmp_path / "b.jpg", gt, quality=30)),
        "--extractor",
        extractor_file,
        "--width",
        "600",
    ]
    png, html = tmp_path / "out.png", tmp_path / "out.html"
    assert cli.main([*words, "--out", str(png)]) == 0
    assert "Written" in capsys.readouterr().out
    with Image.open(png) as image:
        assert image.width == 656 and image.height > 1200
        assert np.asarray(image.convert("L")).std() > 20
    first = png.read_bytes()
    assert cli.main([*words, "--out", str(png)]) == 2
    assert "exists already; --force replaces it" in capsys.readouterr().err
    assert cli.main([*words, "--out", str(png), "--force", "--small"]) == 0
    assert len(png.read_bytes()) < 0.6 * len(first)

    assert cli.main([*words, "--out", str(html)]) == 0
    text = html.read_text()
    assert "kit &lt;b&gt;.png and b.jpg, as MGHF sees them" in text and "<b>" not in text
    assert "http" not in text and "<script" not in text
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', text)
    assert sources and all(source == "data:image/png;base64," for source in sources)
    for heading in ("Where the terms come from", "strongest links", "Entropy and weight"):
        assert heading in text
    assert not list(tmp_path.glob(".*"))  # no half-written file is left


def test_one_picture(tmp_path: Path, extractor_file: str) -> None:
    source = saved(tmp_path / "a.png", scene(24, 30))
    out = tmp_path / "one.html"
    words = ["visualize", str(source), "--extractor", extractor_file, "--out", str(out)]
    assert cli.main([*words, "--maps", "12"]) == 0
    text = out.read_text()
    assert "Feature maps and their weights" in text and "Where the terms" not in text
    assert text.count(">pruned<") == 6 and text.count(">map ") == 12


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_flat_pictures(value: float, tmp_path: Path, extractor_file: str) -> None:
    """Constant maps, no entropy, nothing to scale by."""
    flat = torch.full((3, 60, 60), value)
    a, b = saved(tmp_path / "a.png", flat), saved(tmp_path / "b.png", flat)
    words = ["visualize", str(a), str(b), "--extractor", extractor_file]
    assert cli.main([*words, "--out", str(tmp_path / "o.png")]) == 0


def test_a_large_picture_is_cut_not_resized(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.png", scene(40, 700))
    shown, crop = pictures.load([source], None)
    assert crop == (94, 0, 512, 40) and shown[0].image.shape == (3, 40, 512)
    whole, _ = pictures.load([source], (0, 0, 700, 40))
    assert torch.equal(whole[0].image[:, :, 94:606], shown[0].image)


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The single line of the command's error."""
    try:
        code = cli.main(["visualize", *words])
    except SystemExit as end:  # argparse
        code = end.code
    told = capsys.readouterr().err
    assert code == 2 and told.count("\n") == 1
    return told


def test_bad_pictures(
    tmp_path: Path, extractor_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    good = str(saved(tmp_path / "good.png", scene(40, 50)))
    other = str(saved(tmp_path / "other.png", scene(41, 50)))
    tiny = str(saved(tmp_path / "tiny.png", scene(20, 50)))
    smaller = str(saved(tmp_path / "smaller.png", scene(7, 50)))
    text = tmp_path / "text.png"
    text.write_text("no picture")
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(Path(good).read_bytes()[:700])
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((40, 50), np.uint16)).save(deep)
    rest = ["--extractor", extractor_file, "--out", str(out)]
    for words, told in (
        ([str(tmp_path / "absent.png")], "absent.png"),
        ([str(tmp_path)], "directory"),
        ([str(text)], "text.png: not readable as a picture"),
        ([str(truncated)], "truncated.png: not readable as a picture"),
        ([str(deep)], "not 8 bits a channel"),
        ([good, other], "of one size, got good.png 50 x 40 and other.png 50 x 41"),
        ([tiny, tiny], "at least 32 pixels a side are needed, got 50 x 20"),
        ([smaller], "50 x 7 pixels is too small: at least 8"),
        ([good, good, good], "one or two pictures are shown, got 3"),
        ([good, "--crop", "30", "0", "30", "40"], "is not inside a picture of 50 x 40"),
        ([good, "--crop", "0", "0", "-3", "40"], "too small"),
        ([good, "--maps", "1"], "--maps is 1; allowed are 2 to 64"),
        ([good, "--links", "0"], "--links is 0"),
        ([good, "--width", "10"], "--width is 10"),
        ([good, "--preset", "2024"], "'2024'"),
        ([], "IMAGE"),
    ):
        assert told in fails([*words, *rest], capsys), words
        assert not out.exists()


def test_bad_targets(
    tmp_path: Path, extractor_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = saved(tmp_path / "good.png", scene(40, 50))
    before = good.read_bytes()
    for out, told in (
        (tmp_path / "out.jpg", "--out must end in .png or .html"),
        (tmp_path / "no" / "out.png", "there is no folder"),
        (good, "is one of the pictures"),
    ):
        words = [str(good), "--extractor", extractor_file, "--out", str(out), "--force"]
        assert told in fails(words, capsys)
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in fails([str(good), "--out", str(tmp_path / "folder.png")], capsys)
    assert good.read_bytes() == before


def test_bad_extractors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(saved(tmp_path / "good.png", scene(40, 50)))
    broken = DetailFeatureExtractor(3, 4).requires_grad_(False)
    broken.blocks[0].mix.bias[1] = torch.nan
    latent = DetailFeatureExtractor(4, 4)
    for name, extractor in (("broken", broken), ("latent", latent)):
        extractor.save_pretrained(tmp_path / f"{name}.safetensors")
    (tmp_path / "text.safetensors").write_text("nothing")
    for name, told in (
        ("broken", "features are not finite numbers in"),
        ("latent", "takes 4 channels; pictures have 3"),
        ("text", "text.safetensors"),
        ("absent", "absent.safetensors"),
    ):
        path = str(tmp_path / f"{name}.safetensors")
        out = tmp_path / "out.png"
        assert told in fails([good, "--extractor", path, "--out", str(out)], capsys)
        assert not out.exists()
