"""The demo: degradation, network, measures, the user's pictures, and a tiny run end to end."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import draws
import numpy as np
import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
Image = pytest.importorskip("PIL.Image")

from mghf_fast import MGHFLoss, weights  # noqa: E402
from mghf_fast.commands import cli, rasters  # noqa: E402
from mghf_fast.commands.demo import (  # noqa: E402
    DemoError,
    DemoSettings,
    losses,
    output,
    photographs,
    run,
    train,
)
from mghf_fast.commands.demo.degradation import blur, degrade, gaussian_kernel, reduce  # noqa: E402
from mghf_fast.commands.demo.metrics import Quality, measure, radial_power  # noqa: E402
from mghf_fast.commands.demo.network import (  # noqa: E402
    START_NAME,
    CompactEDSR,
    shipped_start,
    upsample_bicubic,
)
from mghf_fast.commands.demo.settings import random_source  # noqa: E402
from mghf_fast.commands.evaluate.stlpips import unavailable_reason  # noqa: E402
from mghf_fast.commands.memory import PeakMemory, resident_bytes  # noqa: E402
from mghf_fast.commands.pixels import Pixels  # noqa: E402


def picture(height: int = 128, width: int = 144, seed: int = 0) -> Pixels:
    """Smooth structure and fine texture, different for every seed."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a + seed) * np.cos(y / b) for a, b in random.uniform(1, 12, (6, 2))]
    base = np.stack([sum(w * c for w, c in zip(waves, random.normal(size=6))) for _ in range(3)], 2)  # noqa: B905
    return np.clip(128 + 25 * base, 0, 255).astype(np.uint8)


# --- degradation ---------------------------------------------------------------------------------


def test_degradation_repeats_with_its_seed_and_leaves_its_input_alone() -> None:
    gt = picture()
    before = gt.copy()
    first, again, other = (degrade(gt, np.random.default_rng(s)) for s in (1, 1, 2))
    assert first.shape == (32, 36, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(gt, before)


def test_degradation_keeps_the_picture() -> None:
    gt = picture()
    low = degrade(gt, np.random.default_rng(0)).astype(float)
    area = gt.reshape(32, 4, 36, 4, 3).mean((1, 3))
    assert abs(low.mean() - area.mean()) < 2
    assert np.corrcoef(low.ravel(), area.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("shape", [(130, 128, 3), (12, 64, 3)])
def test_degradation_refuses_sides_it_cannot_divide(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        degrade(np.zeros(shape, np.uint8), np.random.default_rng(0))


def test_blur_kernel_is_an_oriented_unit_mass() -> None:
    kernel = gaussian_kernel(3.0, 1.0, 0.0)
    assert kernel.sum() == pytest.approx(1)
    row, column = kernel.sum(0), kernel.sum(1)  # along x, along y
    axis = np.arange(21) - 10
    assert (row * axis**2).sum() > 4 * (column * axis**2).sum()


def test_blur_is_a_convolution_with_a_reflected_border() -> None:
    image = picture(40, 48).astype(np.float64)
    kernel = gaussian_kernel(2.0, 0.7, 0.6)
    padded = np.pad(image, ((10, 10), (10, 10), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (21, 21), axis=(0, 1))
    expected = np.einsum("hwcij,ij->hwc", windows, kernel[::-1, ::-1])
    np.testing.assert_allclose(blur(image, kernel), expected, atol=1e-9)


def test_both_reductions_keep_a_ramp_in_place() -> None:
    ramp = np.broadcast_to(np.arange(64.0)[:, None, None], (64, 64, 3))
    expected = np.arange(16) * 4 + 1.5
    for method in ("area", "bicubic"):
        low = reduce(ramp, method)
        assert low.shape == (16, 16, 3)
        np.testing.assert_allclose(low[3:-3, 5, 0], expected[3:-3], atol=1e-3)


# --- network and batches -------------------------------------------------------------------------


def test_untrained_network_is_bicubic_and_compact() -> None:
    network = CompactEDSR(torch.Generator().manual_seed(0))
    assert 100_000 < sum(p.numel() for p in network.parameters()) < 300_000
    x = torch.rand(2, 3, 17, 23, generator=torch.Generator().manual_seed(1))
    assert network(x).shape == (2, 3, 68, 92)
    torch.testing.assert_close(network(x), upsample_bicubic(x))


def test_network_weights_come_from_the_generator_alone() -> None:
    state = torch.get_rng_state()
    one, two, other = (CompactEDSR(torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.head.weight, two.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_the_start_that_ships_is_checked_small_and_better_than_bicubic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content, card = weights.read(START_NAME), weights.card(START_NAME)
    assert len(content) == card["bytes"] <= 2**20
    assert card["sha256"] == weights.OTHER_SHA256[START_NAME]
    network = shipped_start()
    held_out = train.hold_out(photographs.bundled().held_out, 0)
    better, worse = (
        Quality.mean([measure(train.super_resolve(n, h.lr), h.gt) for h in held_out]).psnr
        for n in (network, upsample_bicubic)
    )
    assert better > worse + 0.5
    # It is not a feature extractor, and an altered file is refused.
    assert START_NAME not in weights.SHA256
    monkeypatch.setitem(weights.OTHER_SHA256, START_NAME, "0" * 64)
    with pytest.raises(ValueError, match="'demo-start' are not the ones that shipped"):
        shipped_start()


def test_batches_repeat_and_the_crops_lie_over_each_other() -> None:
    shown = [photographs.Photograph(str(i), picture(seed=i)) for i in range(3)]
    one, two = (train.batches(shown, 2, 64, random_source(0, "x")) for _ in range(2))
    for _ in range(3):
        (low, high), (low2, high2) = next(one), next(two)
        assert low.shape == (2, 3, 16, 16)
        assert high.shape == (2, 3, 64, 64)
        assert torch.equal(low, low2) and torch.equal(high, high2)
        area = torch.nn.functional.avg_pool2d(high, 4)
        assert torch.corrcoef(torch.stack([low.flatten(), area.flatten()]))[0, 1] > 0.85


def test_splitting_the_backward_at_the_sr_image_changes_nothing() -> None:
    shown = [photographs.Photograph("a", picture())]
    networks = [CompactEDSR(torch.Generator().manual_seed(0)) for _ in range(2)]
    low, high = next(train.batches(shown, 2, 56, random_source(0, "x")))

    def objective(sr: torch.Tensor, gt: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"total": (sr - gt).abs().mean()}

    train.train(networks[0], iter([(low, high)]), objective, label="", steps=1, learning_rate=1e-2)
    optimizer = torch.optim.Adam(networks[1].parameters(), lr=1e-2, betas=(0.9, 0.99))
    objective(networks[1](low), high)["total"].backward()
    optimizer.step()
    for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    data = iter([(draws.rand(1, 3, 16, 16), draws.rand(1, 3, 64, 64))])
    with pytest.raises(DemoError, match="L1: the loss is nan at step 1"):
        train.train(
            CompactEDSR(torch.Generator()),
            data,
            lambda sr, gt: {"total": (sr * float("nan")).mean()},
            label="L1",
            steps=1,
            learning_rate=1e-3,
        )


# --- measures ------------------------------------------------------------------------------------


def test_a_picture_is_perfect_beside_itself() -> None:
    q = measure(picture(), picture())
    assert q.psnr == 100
    for value in (q.ssim, q.hf_energy, q.hf_correlation, q.sharpness):
        assert value == pytest.approx(1)
    assert q.hf_error == 0


def test_blur_loses_high_frequencies_and_noise_adds_uncorrelated_ones() -> None:
    gt = picture()
    smooth = train.to_pixels(torch.nn.functional.avg_pool2d(train.to_tensor(gt), 5, 1, 2))
    noise = np.random.default_rng(0).normal(0, 40, gt.shape)
    noisy = np.clip(gt + noise, 0, 255).astype(np.uint8)
    blurred, noised = measure(smooth, gt), measure(noisy, gt)
    assert blurred.hf_energy < 0.7 < 1.2 < noised.hf_energy
    assert blurred.sharpness < 1 < noised.sharpness
    assert blurred.hf_error > 1
    assert noised.hf_correlation < 0.95
    assert max(blurred.psnr, noised.psnr) < 40


def test_flat_pictures_give_finite_measures() -> None:
    flat = np.full((96, 96, 3), 7, np.uint8)
    for sr, gt in ((flat, picture(96, 96)), (picture(96, 96), flat), (flat, flat)):
        values = vars(measure(sr, gt))
        assert values.pop("stlpips") is None  # no judge was given
        assert all(np.isfinite(v) for v in values.values())


def test_white_noise_has_its_variance_in_every_ring() -> None:
    plane = np.random.default_rng(0).normal(0, 0.3, (256, 256))
    frequency, power = radial_power(plane)
    assert frequency[0] < 0.02 < 0.48 < frequency[-1]
    np.testing.assert_allclose(power[4:], 0.09, rtol=0.2)


def test_measure_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="one size"):
        measure(picture(96, 96), picture(96, 100))


def test_peak_memory_sees_what_is_freed_again() -> None:
    if resident_bytes() is None:
        pytest.skip("this system does not tell resident memory")
    with PeakMemory() as memory:
        block = np.ones(8_000_000)
        del block
        with memory.paused():
            block = np.ones(32_000_000)
            del block
    assert memory.rise is not None
    assert 50e6 < memory.rise < 120e6


# --- photographs ---------------------------------------------------------------------------------


def test_bundled_photographs_are_there_without_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the demo must not open a connection")

    monkeypatch.setattr("socket.socket.connect", no_network)
    collection = photographs.bundled()
    assert [p.name for p in collection.held_out] == ["astronaut", "chelsea", "coffee"]
    assert len(collection.training) >= 5
    assert not collection.skipped
    for photograph in collection.training + collection.held_out:
        height, width, colours = photograph.pixels.shape
        assert height % 4 == width % 4 == 0 and colours == 3
        assert min(height, width) >= 96 and max(height, width) <= photographs.LONGEST_SIDE


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Six usable pictures in two folders, and unusable ones of every kind."""
    root = tmp_path / "album"
    (root / "deeper").mkdir(parents=True)
    names = ("a.jpg", "b.PNG", "c.webp", "d.bmp", "e.tiff", "deeper/f.png")
    for seed, name in enumerate(names):
        Image.fromarray(picture(seed=seed)).save(root / name)
    Image.fromarray(picture(seed=1)).save(root / "copy of b.png")
    Image.fromarray(picture(40, 60)).save(root / "small.png")
    (root / "broken.jpg").write_bytes(b"not a picture")
    whole = (root / "a.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "empty.png").touch()
    Image.fromarray(np.zeros((128, 128), np.uint16)).save(root / "deep.tiff")
    (root / "notes.txt").write_text("not looked at")
    return root


def test_own_pictures_are_split_by_the_seed(album: Path) -> None:
    one, again = (photographs.from_directory(album, seed=0) for _ in range(2))
    assert [p.name for p in one.held_out] == [p.name for p in again.held_out]
    assert len(one.held_out) == 3 and len(one.training) == 3
    assert not {p.name for p in one.held_out} & {p.name for p in one.training}
    splits = {
        tuple(sorted(p.name for p in photographs.from_directory(album, seed=s).held_out))
        for s in range(8)
    }
    assert len(splits) > 1


def test_held_out_photographs_are_degraded_by_the_seed() -> None:
    shown = [photographs.Photograph("a", picture()), photographs.Photograph("b", picture())]
    one, again, other = (train.hold_out(shown, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one[0].lr, again[0].lr)
    assert (one[0].lr != other[0].lr).any()
    assert (one[0].lr != one[1].lr).any()


def test_unusable_pictures_are_named_with_the_reason(album: Path) -> None:
    reasons = dict(photographs.from_directory(album, seed=0).skipped)
    copies = [r for name, r in reasons.items() if "b." in name]
    assert len(copies) == 1 and "the same picture as" in copies[0]
    assert "too small (60 x 40" in reasons["small.png"]
    assert "8 bits" in reasons["deep.tiff"]
    for name in ("broken.jpg", "cut.jpg", "empty.png"):
        assert "not readable" in reasons[name]
    assert len(reasons) == 6


def test_earlier_results_are_not_taken_for_pictures(album: Path) -> None:
    (album / "out").mkdir()
    Image.fromarray(picture(seed=99)).save(album / "out" / "comparison.png")
    collection = photographs.from_directory(album, seed=0, exclude=album / "out")
    assert len(collection.training) + len(collection.held_out) == 6


def test_other_modes_and_orientations_become_upright_rgb(tmp_path: Path) -> None:
    grey = tmp_path / "grey.png"
    Image.fromarray(picture()[..., 0]).save(grey)
    assert photographs.load(grey).shape == (128, 144, 3)
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(128, 144)).save(turned, exif=exif)
    assert photographs.load(turned).shape == (144, 128, 3)
    large = tmp_path / "large.jpg"
    Image.fromarray(np.zeros((500, 2000, 3), np.uint8)).save(large)
    assert photographs.load(large).shape == (256, 1024, 3)


def test_names_with_odd_characters_can_be_printed() -> None:
    assert rasters.printable("a\x1b[31m\udcff") == "a\\x1b[31m\\udcff"
    assert rasters.printable("Zürich 東京.png") == "Zürich 東京.png"


# --- the whole -----------------------------------------------------------------------------------


def tiny(out: Path, images: Path, **changes: object) -> DemoSettings:
    values: dict[str, object] = dict(
        out=out, images=images, steps=2, pretrain_steps=3, batch=1, patch=56, checkpoints=1
    )
    return DemoSettings(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("scratch", [False, True])
def test_a_run_writes_its_report_and_repeats(
    scratch: bool, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    numpy_state = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    out = tmp_path / "new" / "out"
    settings = tiny(out, album, threads=1, from_scratch=scratch)
    first = run(settings)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[arg-type]
    assert torch.get_num_threads() == threads

    shown = capsys.readouterr()
    assert "6 files skipped" in shown.err
    for word in ("bicubic", "start", "L1", "MGHF-c", "PSNR", "SSIM", "ST-LPIPS", "HF energy"):
        assert word in shown.out
    judged = unavailable_reason() is None
    decided_by = "stlpips" if judged else "hf_error"
    assert first["decided_by"] == decided_by
    means = {method: each["mean"] for method, each in first["quality"].items()}
    assert all((mean["stlpips"] is not None) == judged for mean in means.values())
    mghf, l1 = means["MGHF-c"], means["L1"]
    if abs(mghf[decided_by] - l1[decided_by]) <= 0.01 * l1[decided_by]:
        expected, verdict = "no difference", "MGHF-c makes no difference to L1 alone: "
    elif mghf[decided_by] < l1[decided_by]:
        expected, verdict = "better", "MGHF-c is better than L1 alone: "
    else:
        expected, verdict = "worse", "MGHF-c is worse than L1 alone: "
    assert first["verdict"] == expected
    assert first["headline"].startswith(verdict) and first["headline"] in shown.out
    assert first["settings"]["start"]["from"] == (
        "scratch, 3 steps on L1" if scratch else "demo-start"
    )
    assert ("pre-training" in first["training"]) == scratch
    assert first["settings"]["mghf_gradient_in_lengths_of_l1"] > 0

    written = sorted(p.name for p in out.iterdir())
    assert written == ["comparison.png", "metrics.json", "report.html"]
    assert json.loads((out / "metrics.json").read_text()) == first
    report = (out / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4 * 3
    assert "<svg" in report and "prefers-color-scheme: dark" in report
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"base64,[^\"]*", "", report))
    # Self-contained: it has no references to other files.
    assert not re.search(r"(src|href)\s*=\s*\"(?!data:)|url\(|@import|<script", report)
    # Four columns, of twice the shortest side of a held-out picture.
    assert Image.open(out / "comparison.png").size[0] > 4 * 2 * 128

    second = run(settings)  # over its own files
    for metrics in (first, second):
        del metrics["cost"]
    assert first == second


def test_a_run_without_the_judge_says_so(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mghf_fast.commands.demo.pipeline.find_judge", lambda: None)
    result = run(tiny(tmp_path, album, steps=1))
    assert result["decided_by"] == "hf_error"
    assert result["quality"]["L1"]["mean"]["stlpips"] is None
    shown = capsys.readouterr().out
    assert "n/a" in shown and 'pip install "mghf_fast[evaluate]"' in shown
    assert "high-frequency error" in result["headline"]


def test_the_command_that_repeats_a_run_names_what_it_was_told() -> None:
    settings = DemoSettings(out=Path("a b"), from_scratch=True, threads=2, steps=7)
    told = settings.command("--ablation")
    assert told == (
        "mghf-fast demo --steps 7 --seed 0 --ablation --from-scratch --threads 2 --out 'a b'"
    )
    assert "--from-scratch" not in DemoSettings().command()


def test_the_demo_takes_the_extractor_of_a_loss_that_is_given_none() -> None:
    low, gt = next(train.batches([photographs.Photograph("a", picture())], 1, 96, random_source(0)))
    sr = upsample_bicubic(low)
    terms = losses.l1_with_mghf()(sr, gt)
    expected = MGHFLoss(preset=losses.PRESET, input_range="0,1")(sr, gt)
    torch.testing.assert_close(terms["mghf"], expected)
    torch.testing.assert_close(terms["total"], terms["l1"] + losses.MGHF_WEIGHT * terms["mghf"])


def test_settings_that_cannot_be_are_refused() -> None:
    for name, value in (("steps", 0), ("steps", -3), ("seed", -1), ("threads", 0), ("patch", 50)):
        with pytest.raises(DemoError, match=rf"{name} is {value}; allowed"):
            DemoSettings(**{name: value})  # type: ignore[arg-type]


def main(*words: object) -> int:
    return cli.main(["demo", *map(str, words)])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.startswith("mghf-fast: ") and text.count("\n") == 1 and "Traceback" not in text
    return text


def test_mistakes_on_the_command_line_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main("--steps", 0, "--out", out) == 2
    assert "steps is 0" in one_line(capsys)
    assert not out.exists()

    assert main("--images", tmp_path / "nowhere", "--out", out) == 2
    assert "no such directory" in one_line(capsys)

    (tmp_path / "few").mkdir()
    Image.fromarray(picture()).save(tmp_path / "few" / "one.png")
    Image.fromarray(picture(50, 50)).save(tmp_path / "few" / "two.png")
    assert main("--images", tmp_path / "few", "--out", out) == 2
    text = one_line(capsys)
    assert "1 of 2 picture files can be used, at least 2 are needed" in text
    assert "two.png: too small (50 x 50" in text

    file = tmp_path / "file"
    file.write_text("mine")
    assert main("--out", file) == 2
    assert "this is a file" in one_line(capsys)
    assert main("--out", file / "below") == 2
    assert "cannot be written" in one_line(capsys)
    assert file.read_text() == "mine"


def test_a_foreign_file_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.html").write_text("<h1>my own report</h1>")
    assert main("--out", tmp_path) == 2
    assert "report.html is there and is not the demo's" in one_line(capsys)
    assert (tmp_path / "report.html").read_text() == "<h1>my own report</h1>"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_failed_write_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output.write(tmp_path, "metrics.json", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DemoError, match="No space left"):
        output.write(tmp_path, "metrics.json", b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.startswith(("mghf_fast.commands.demo.", "skimage"))]:
        if name not in ("mghf_fast.commands.demo.command", "mghf_fast.commands.demo.settings"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    assert main("--out", tmp_path / "out") == 2
    assert 'pip install "mghf_fast[demo]"' in one_line(capsys)
