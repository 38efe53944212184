"""``mghf-fast evaluate``: the measures against other implementations, hand-computed values and
published figures; the pairing of pictures; the errors for bad input."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")
Image = pytest.importorskip("PIL.Image")

import skimage  # noqa: E402
from skimage.metrics import peak_signal_noise_ratio  # noqa: E402

from mghf_fast.commands import cli  # noqa: E402
from mghf_fast.commands.evaluate import command, measures, metrics, niqe, pictures, stlpips  # noqa: E402
from mghf_fast.commands.evaluate.detail import detail  # noqa: E402

TEST_PICTURES = os.environ.get("MGHF_TEST_PICTURES")
"""A folder of test pictures: RealSR/HR and LR, and for more tests OSEDiff's outputs as
RealSR/results_osediff and Set14 as img_001.png (the baboon) and so on."""

needs_stlpips = pytest.mark.skipif(
    stlpips.unavailable_reason() is not None, reason=str(stlpips.unavailable_reason())
)
needs_niqe = pytest.mark.skipif(
    niqe.unavailable_reason() is not None, reason=str(niqe.unavailable_reason())
)


def load(path: Path) -> metrics.Pixels:
    return pictures.read(path)[0]


@pytest.fixture(scope="module")
def truth() -> metrics.Pixels:
    """A photograph from scikit-image, cropped to 128 x 160."""
    whole = load(Path(skimage.__file__).parent / "data" / "astronaut.png")
    return np.ascontiguousarray(whole[100:228, 150:310])


@pytest.fixture(scope="module")
def blurred(truth: metrics.Pixels) -> metrics.Pixels:
    shifted = (np.roll(truth, (y, x), (0, 1)).astype(int) for y, x in ((0, 0), (1, 0), (0, 1)))
    return ((sum(shifted) + np.roll(truth, 2, 1)) // 4).astype(np.uint8)


def external(path: str) -> Path:
    """A file or folder of the test pictures; skips the test if it is missing."""
    if TEST_PICTURES is None:
        pytest.skip("MGHF_TEST_PICTURES names no folder of test pictures")
    found = Path(TEST_PICTURES) / path
    if not found.exists():
        pytest.skip(f"MGHF_TEST_PICTURES has no {path}")
    return found


def grey(level: int) -> metrics.Pixels:
    return np.full((64, 64, 3), level, np.uint8)


# --- PSNR and SSIM -------------------------------------------------------------------------------


def test_luma_is_matlabs() -> None:
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0]]], np.uint8)
    expected = [[16, 235, 16 + 65.481, 16 + 128.553]]
    np.testing.assert_allclose(metrics.luma(colours), expected, rtol=1e-12)
    assert metrics.luminance(colours)[0, :2].tolist() == pytest.approx([0, 1])


def test_psnr_of_one_level_of_grey() -> None:
    full = 20 * math.log10(255)
    assert metrics.psnr_rgb(grey(100), grey(101)) == pytest.approx(full)
    assert metrics.psnr_y_full(grey(100), grey(101)) == pytest.approx(full)
    # One level of grey is 219/255 of one level of luma.
    assert metrics.psnr_y(grey(100), grey(101)) == pytest.approx(full + 20 * math.log10(255 / 219))
    assert metrics.psnr_y(grey(7), grey(7)) == metrics.EQUAL


def test_ssim_of_flat_pictures() -> None:
    a, b, c1 = 16 + 100 * 219 / 255, 16 + 140 * 219 / 255, (0.01 * 255) ** 2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert metrics.ssim_y(grey(100), grey(140)) == pytest.approx(expected)


def test_psnr_is_scikit_images(truth: metrics.Pixels, blurred: metrics.Pixels) -> None:
    of = peak_signal_noise_ratio
    assert metrics.psnr_rgb(blurred, truth) == pytest.approx(of(truth, blurred))
    luma_s, luma_g = metrics.luma(blurred), metrics.luma(truth)
    assert metrics.psnr_y(blurred, truth) == pytest.approx(of(luma_g, luma_s, data_range=255))


def test_ssim_is_that_of_its_definition(truth: metrics.Pixels, blurred: metrics.Pixels) -> None:
    """Wang et al. 2004, with the Gaussian window written out and no padding."""
    offsets = torch.arange(-5.0, 6.0, dtype=torch.float64)
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (line[:, None] * line)[None, None] / line.sum() ** 2

    def smooth(plane: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(plane, window)

    x, y = (torch.from_numpy(metrics.luma(p))[None, None] for p in (blurred, truth))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = smooth(x), smooth(y)
    vx, vy, cov = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    ssim = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert metrics.ssim_y(blurred, truth) == pytest.approx(float(ssim.mean()), abs=1e-9)


def test_bicubic_on_realsr_is_as_published() -> None:
    """PSNR 27.11 dB and SSIM 0.756 of bicubic interpolation, in the papers' convention."""
    folder = external("RealSR")
    found = []
    for path in sorted((folder / "HR").glob("*.png")):
        hr, lr = load(path), Image.fromarray(load(folder / "LR" / path.name))
        sr = np.asarray(lr.resize((hr.shape[1], hr.shape[0]), Image.Resampling.BICUBIC))
        found.append((metrics.psnr_y(sr, hr), metrics.ssim_y(sr, hr)))
    psnr, ssim = np.mean(found, axis=0)
    assert len(found) == 100
    assert psnr == pytest.approx(27.11, abs=0.005) and ssim == pytest.approx(0.756, abs=5e-4)


def test_osediff_on_realsr_is_as_published() -> None:
    """PSNR 25.151 dB and SSIM 0.7329 of the outputs that OSEDiff's repository publishes."""
    pairs = pictures.pair(external("RealSR/results_osediff"), external("RealSR/HR"))
    values = [
        (metrics.psnr_y(sr, hr), metrics.ssim_y(sr, hr))
        for sr, hr in ((load(p.sr), load(p.hr)) for p in pairs)
    ]
    psnr, ssim = np.mean(values, axis=0)
    assert len(pairs) == 100
    assert psnr == pytest.approx(25.151, abs=5e-4) and ssim == pytest.approx(0.7329, abs=5e-5)


@pytest.mark.parametrize(
    "measure",
    [metrics.psnr_y, metrics.ssim_y, metrics.psnr_y_full, metrics.psnr_rgb, metrics.ssim_rgb],
)
def test_measures_refuse_what_they_cannot_compare(measure: object) -> None:
    assert callable(measure)
    with pytest.raises(ValueError, match="one size"):
        measure(grey(1), grey(1)[:32])
    with pytest.raises(ValueError, match="uint8"):
        measure(grey(1), grey(1) / 255)


# --- ST-LPIPS, NIQE and detail -------------------------------------------------------------------


@needs_stlpips
@pytest.mark.parametrize(("net", "expected"), [("alex", 0.0839323), ("vgg", 0.1016966)])
def test_stlpips_is_the_packages(
    net: str, expected: float, truth: metrics.Pixels, blurred: metrics.Pixels
) -> None:
    """The expected distances are those of ``stlpips_pytorch``'s own code."""
    judge = metrics.judge(net)
    assert judge is not None
    assert judge(blurred, truth) == pytest.approx(expected, abs=2e-6)
    assert judge(truth, truth) == 0


def test_there_is_no_judge_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stlpips, "PACKAGE", "no_such_package")
    assert metrics.judge() is None
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        stlpips.ShiftTolerantLPIPS()


def test_the_fit_of_niqe_knows_an_asymmetric_gaussian() -> None:
    normal = np.abs(np.random.default_rng(0).normal(size=(1, 300, 300)))
    # The halves meet at zero, so the side that is twice as wide has twice as many values.
    normal[:, np.arange(300) % 3 > 0] *= -2
    shape, left, right = niqe._asymmetric_gaussians(normal)
    # Its scale is sqrt(2) standard deviations of a Gaussian.
    found = (shape[0], left[0] / math.sqrt(2), right[0] / math.sqrt(2))
    assert found == pytest.approx((2, 2, 1), rel=0.03)


def test_niqe_is_a_distance_from_its_model() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (200, 300, 3)).astype(np.uint8)
    plain = niqe.Model(np.zeros(36), np.eye(36))
    far = niqe.niqe(noise, plain)
    assert far is not None and far > 0
    plane = np.round(metrics.luma(noise))[:192, :288]
    features = np.concatenate(
        [niqe._features(plane, 96), niqe._features(niqe._halved(plane), 48)], axis=1
    )
    assert features.shape == (6, 36)
    near = niqe.niqe(noise, niqe.Model(features.mean(0), np.eye(36)))
    assert near == pytest.approx(0, abs=1e-9)
    assert niqe.niqe(noise[:96, :96], plain) is None
    assert niqe.niqe(np.zeros_like(noise), plain) is None


def test_halving_mirrors_at_the_border() -> None:
    """The antialiased cubic of Matlab's imresize(0.5), written out for one line."""

    def cubic(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    line = np.random.default_rng(2).uniform(0, 255, 32)
    mirrored = np.concatenate([line[::-1], line, line[::-1]])
    expected = []
    for i in range(16):
        weights = np.array([cubic((j - 32 - (2 * i + 0.5)) / 2) for j in range(96)])
        expected.append(float(mirrored @ weights / weights.sum()))
    found = niqe._halved(np.tile(line, (32, 1)))
    np.testing.assert_allclose(found, np.tile(expected, (16, 1)), rtol=1e-4, atol=1e-3)


@needs_niqe
def test_niqe_of_the_baboon_is_matlabs() -> None:
    assert niqe.niqe(load(external("Set14/img_001.png"))) == pytest.approx(5.7296, abs=5e-4)


@needs_niqe
def test_niqe_of_realsrs_photographs() -> None:
    """6.29 is the result of BasicSR's own code."""
    found = [niqe.niqe(load(p)) for p in sorted(external("RealSR/HR").glob("*.png"))]
    assert float(np.mean([v for v in found if v is not None])) == pytest.approx(6.29, abs=0.01)


def test_detail_of_a_picture_and_its_blur(truth: metrics.Pixels, blurred: metrics.Pixels) -> None:
    same, less = detail(truth, truth), detail(blurred, truth)
    assert (same.hf_error, same.hf_energy) == (0, 1)
    assert less.hf_energy < 0.7 and less.sharpness < 1 and less.hf_correlation < 1
    with pytest.raises(ValueError, match="scale"):
        detail(truth, truth, scale=1)


# --- pairs and files -----------------------------------------------------------------------------


def save(path: Path, array: object = None, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(grey(90) if array is None else np.asarray(array))
    (image if mode is None else image.convert(mode)).save(path)
    return path


def folder(root: Path, name: str, *names: str) -> Path:
    for file in names:
        save(root / name / file)
    return root / name


def test_names_are_matched_without_marks(tmp_path: Path) -> None:
    sr = folder(
        tmp_path, "sr", "a_x4.png", "b-SR.jpg", "c.png", "img_001_SRF_4_SR.png", "d_x4_out.bmp",
        "0801x4.png", "fox4.png",
    )  # fmt: skip
    hr = folder(
        tmp_path, "hr", "a.png", "b_HR.png", "c.bmp", "img_001_SRF_4_HR.png", "d.png", "0801.png",
        "fox4.png",
    )  # fmt: skip
    (hr / "readme.txt").write_text("no picture")
    found = [(p.name, p.sr.name, p.hr.name) for p in pictures.pair(sr, hr)]
    assert found == [
        ("0801", "0801x4.png", "0801.png"),
        ("a", "a_x4.png", "a.png"),
        ("b", "b-SR.jpg", "b_HR.png"),
        ("c", "c.png", "c.bmp"),
        ("d", "d_x4_out.bmp", "d.png"),
        ("fox4", "fox4.png", "fox4.png"),
        ("img_001", "img_001_SRF_4_SR.png", "img_001_SRF_4_HR.png"),
    ]


def test_equal_names_come_before_marks(tmp_path: Path) -> None:
    sr = folder(tmp_path, "sr", "a.png", "a_x4.png")
    hr = folder(tmp_path, "hr", "a.png", "a_x4.png")
    assert [p.hr.name for p in pictures.pair(sr, hr)] == ["a.png", "a_x4.png"]


@pytest.mark.parametrize(
    ("sr", "hr", "told"),
    [
        (["a.png", "b.png"], ["a.png", "c.png"], "1 have one; without: SR b.png; HR c.png"),
        (["a.png"], ["a.png", "z.png"], "without: HR z.png"),
        (["a_x4.png", "a_SR.png"], ["a.png"], "both stand for the name 'a'"),
        (["a.png", "a.jpg"], ["a.png"], "a.jpg, a.png"),
        (["fox4.png"], ["fo.png"], "without: SR fox4.png; HR fo.png"),
        ([f"{i:02}.png" for i in range(12)], ["a.png"], "07.png and 4 more"),
    ],
)
def test_names_without_a_partner_are_listed(
    sr: list[str], hr: list[str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:
        pictures.pair(folder(tmp_path, "sr", *sr), folder(tmp_path, "hr", *hr))
    assert told in str(error.value)


def test_grey_alpha_and_turned_pictures(tmp_path: Path) -> None:
    level = np.full((20, 30), 90, np.uint8)
    pixels, transparent = pictures.read(save(tmp_path / "grey.png", level))
    assert pixels.shape == (20, 30, 3) and (pixels == 90).all() and not transparent

    opaque = np.dstack([np.full((20, 30, 3), 90), np.full((20, 30), 255)]).astype(np.uint8)
    pixels, transparent = pictures.read(save(tmp_path / "opaque.png", opaque))
    assert (pixels == 90).all() and not transparent

    opaque[:10, :, 3] = 0
    pixels, transparent = pictures.read(save(tmp_path / "clear.png", opaque))
    assert (pixels[:10] == 255).all() and (pixels[10:] == 90).all() and transparent

    turned = Image.fromarray(np.full((20, 30, 3), 90, np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert pictures.read(tmp_path / "turned.jpg")[0].shape == (30, 20, 3)
    upright = save(tmp_path / "upright.png", np.full((30, 20, 3), 90, np.uint8))
    pictures.check_sizes(pictures.pair(tmp_path / "turned.jpg", upright))


# --- the command ---------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main(["evaluate", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_folder_gives_a_table_and_json(
    tmp_path: Path,
    truth: metrics.Pixels,
    blurred: metrics.Pixels,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(tmp_path / "sr" / "one_x4.png", blurred)
    save(tmp_path / "sr" / "two.png", truth)
    save(tmp_path / "hr" / "one.png", truth)
    save(tmp_path / "hr" / "two.png", truth)
    out = tmp_path / "out.json"
    wanted = ",".join(n for n in measures.select(None).names if n not in measures.WITHOUT_TRUTH)
    words = (tmp_path / "sr", tmp_path / "hr", "--json", out, "--metrics", wanted)
    code, shown, _ = run(capsys, *words)
    assert code == 0 and "mean of 2" in shown and "equal in 1 of 2" in shown
    written = json.loads(out.read_text())
    one, two = written["pictures"]
    assert one["psnr_y"] == metrics.psnr_y(blurred, truth)
    assert (one["width"], one["height"]) == (160, 128)
    assert written["mean"]["ssim_y"] == pytest.approx((one["ssim_y"] + two["ssim_y"]) / 2)
    assert f"{one['psnr_y']:.3f}" in shown

    # An existing file is replaced only with --force.
    before = out.read_bytes()
    code, _, errors = run(capsys, *words)
    assert code == 2 and "--force" in errors and out.read_bytes() == before
    code, _, _ = run(capsys, *words, "--force", "--border", 4)
    assert code == 0
    again = json.loads(out.read_text())
    inner = (metrics.without_border(p, 4) for p in (blurred, truth))
    assert again["border"] == 4 and again["pictures"][0]["psnr_y"] == metrics.psnr_y(*inner)


def test_json_on_the_standard_output_is_alone_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = save(tmp_path / "a.png"), save(tmp_path / "b.png", grey(91))
    code, shown, table = run(capsys, a, b, "--metrics", "ssim_y,psnr_y", "--json", "-")
    assert code == 0 and "PSNR" in table
    assert list(json.loads(shown)["mean"]) == ["psnr_y", "ssim_y"]


def test_small_pictures_have_no_value_where_there_can_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = save(tmp_path / "a.png", grey(90)[:8])
    code, shown, _ = run(capsys, small, small, "--metrics", "psnr_y,ssim_y,hf_error", "--json", "-")
    values = json.loads(shown)["pictures"][0]
    assert code == 0 and values["psnr_y"] == 100
    assert values["ssim_y"] is None and values["hf_error"] is None


def test_niqe_stands_beside_the_ground_truths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(measures.NEEDS, "niqe", lambda: None)
    monkeypatch.setitem(measures.NEEDS, "niqe_hr", lambda: None)
    monkeypatch.setattr(niqe, "load_model", lambda: niqe.Model(np.zeros(36), np.eye(36)))
    noise = np.random.default_rng(3).integers(0, 256, (100, 200, 3)).astype(np.uint8)
    path = save(tmp_path / "a.png", noise)
    code, shown, _ = run(capsys, path, path, "--metrics", "niqe,psnr_y")
    assert code == 0 and "can reward artefacts" in shown
    code, _, errors = run(capsys, path, path, "--metrics", "niqe")
    assert code == 2 and "not reported alone" in errors


def test_a_missing_package_leaves_its_measures_out_or_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stlpips, "PACKAGE", "no_such_package")
    monkeypatch.setattr(niqe, "PACKAGE", "no_such_package_either")
    path = save(tmp_path / "a.png")
    code, shown, _ = run(capsys, path, path)
    assert code == 0 and shown.count("Not measured") == 2
    assert "pip install no_such_package" in " ".join(shown.split())
    code, _, errors = run(capsys, path, path, "--metrics", "psnr_y,stlpips_vgg")
    assert code == 2 and "stlpips_vgg" in errors and "pip install" in errors


def test_without_scikit_image_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("mghf_fast.commands.evaluate.")]:
        if not name.endswith(".command"):
            monkeypatch.delitem(sys.modules, name)
    package = sys.modules["mghf_fast.commands.evaluate"]
    for name in ("metrics", "measures", "detail"):
        if hasattr(package, name):
            monkeypatch.delattr(package, name)
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    path = save(tmp_path / "a.png")
    code, _, errors = run(capsys, path, path)
    assert code == 2 and 'pip install "mghf_fast[evaluate]"' in errors


@pytest.mark.parametrize("side", ["sr", "hr"])
def test_a_deep_picture_is_told_before_anything_is_measured(
    side: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("sr", "hr"):
        save(tmp_path / folder / "a.png")
        save(tmp_path / folder / "b.png")
    Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(tmp_path / side / "b.png")
    code, out, err = run(capsys, tmp_path / "sr", tmp_path / "hr", "--metrics", "psnr_y")
    assert code == 2 and not out and "b.png: its pixel format" in err


def test_bad_input_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path / "a.png")
    narrow = save(tmp_path / "narrow.png", grey(90)[:, :32])
    broken = tmp_path / "broken.png"
    broken.write_bytes(a.read_bytes()[:60])
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(deep)
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, *told in (
        ((a, narrow), "a.png is 64 x 64", "narrow.png is 32 x 64"),
        ((a, broken), "broken.png"),
        ((deep, a), "deep.png", "8 bits"),
        ((a, tmp_path / "none.png"), "HR: there is no", "none.png"),
        ((a, tmp_path), "two pictures or two folders", "a.png is not"),
        ((empty, tmp_path), "no picture in the folder", "empty"),
        ((a, a, "--border", -1), "--border is -1"),
        ((a, a, "--border", 32), "--border 32 leaves nothing of a.png"),
        ((a, a, "--scale", 1), "--scale is 1"),
        ((a, a, "--scale", "nan"), "--scale is nan"),
        ((a, a, "--metrics", "psnr_y,mse"), "there is no 'mse'", "ssim_y"),
        ((a, a, "--json", tmp_path / "no" / "x.json"), "there is no folder"),
        ((a, a, "--json", empty), "is a folder"),
        ((a, a, "--json", a, "--force"), "is one of the pictures"),
    ):
        code, shown, errors = run(capsys, *words)
        assert code == 2 and errors.count("\n") == 1, errors
        assert all(text in errors for text in told), errors
        assert "mean" not in shown


def test_the_help_lists_every_measure() -> None:
    assert command.METRICS.split(", ") == list(measures.MEASURES)


def test_help_waits_for_no_pictures() -> None:
    code = (
        "import sys; from mghf_fast.commands import cli\n"
        "try: cli.main(['evaluate', '--help'])\n"
        "except SystemExit: print(sorted({'skimage', 'PIL', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n") and "SR HR" in done.stdout
