"""`benchmarks.studies`: the studies' measurements, at tiny sizes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import draws
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
from PIL import Image

from benchmarks.studies import (
    adversarial,
    cost,
    extractors,
    grid,
    minimiser,
    objectives,
    opening,
    page,
    pictures,
    probe,
    quality,
    runs,
    study,
    terms,
    tuning,
)
from mghf_fast.commands.demo.network import CompactEDSR
from mghf_fast.commands.demo.photographs import bundled
from mghf_fast.commands.demo.train import to_tensor
from mghf_fast.commands.evaluate import stlpips
from mghf_fast.losses.mghf import PRESETS

judged = pytest.mark.skipif(
    stlpips.unavailable_reason() is not None, reason="stlpips_pytorch is not installed"
)
STEPS = ["--steps", "2", "--batch", "1", "--patch", "56"]
OBJECTIVES = ["mse", "mghf-n:F"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of the bundled photographs, in a study's layout of folders."""
    root = tmp_path_factory.mktemp("pictures")
    collection = bundled()
    photographs = [p.pixels for p in collection.training + collection.held_out]

    def put(name: str, pixels: Any) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels)).save(path)

    for i, pixels in enumerate(photographs[-3:]):
        put(f"train/{i}.png", pixels[100:228, 100:228])
    for name in ("Set14", *opening.SYNTHETIC):
        put(f"test/{name}/a.png", photographs[-1][60:156, 60:156])
    for name in opening.REAL:
        high = Image.fromarray(photographs[-2][60:124, 60:124])
        put(f"test/{name}/HR/a.png", np.asarray(high))
        put(f"test/{name}/LR/a.png", np.asarray(high.resize((16, 16))))
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    network = CompactEDSR(torch.Generator().manual_seed(0), channels=32)
    tuning.save_network(path, network)
    return path


# ---- the minimiser test ----


@pytest.fixture(scope="module")
def crops(folder: Path) -> Tensor:
    return minimiser.crops(folder / "train", 48, 2)


def test_a_shift_is_exact(crops: Tensor) -> None:
    moved = minimiser.shifted(crops, (1.0, -2.0))
    torch.testing.assert_close(moved[..., 4:-4, 4:-4], crops[..., 3:-5, 6:-2], atol=1e-5, rtol=0)
    halves = minimiser.shifted(minimiser.shifted(crops, (0.25, 0.5)), (0.75, -0.5))
    whole = minimiser.shifted(crops, (1.0, 0.0))
    # The border between the two was cut; only its echo remains in the middle.
    echo = (halves - whole)[..., 16:-16, 16:-16]
    assert float(echo.square().mean().sqrt()) < 0.01 < 0.05 < float((whole - crops).std())


def test_the_minimiser_of_an_mse_is_the_blurred_mean(crops: Tensor) -> None:
    y = minimiser.candidates(crops, 1.0)
    assert y.shape == (minimiser.CANDIDATES, 2, 3, 48, 48)
    best, curvature = minimiser.minimise(nn.Identity(), y, 20)
    torch.testing.assert_close(best, y.mean(0), atol=1e-4, rtol=0)
    assert float(curvature.abs().max()) < 1e-8
    row = minimiser.measure(nn.Identity(), crops, 1.0, 20)
    assert 0 < row["hf_energy"] < 0.8  # blurred
    energy = torch.stack([minimiser.hf_energy(k) for k in y]).mean(0)
    expected = float((minimiser.hf_energy(y.mean(0)) / energy).mean())
    assert row["hf_energy"] == pytest.approx(expected, rel=1e-3)
    # Any invertible linear map of the pixels has the same minimiser.
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    linear, _ = minimiser.minimise(lambda x: torch.einsum("dc,bchw->bdhw", turn, x), y, 20)
    torch.testing.assert_close(linear, best, atol=1e-3, rtol=0)


def test_curved_features_ask_for_more_detail_than_linear_ones(crops: Tensor) -> None:
    found = {
        name: minimiser.measure(extractors.load(name), crops, 1.0, 30)
        for name in ("linear", "curved-squeeze")
    }
    assert found["linear"]["curvature"] < 0.01 < 0.1 < found["curved-squeeze"]["curvature"]
    assert found["curved-squeeze"]["hf_energy"] > 1.05 * found["linear"]["hf_energy"]


def test_a_list_of_layers_counts_each(crops: Tensor) -> None:
    y = minimiser.candidates(crops, 1.0)
    one, curvature = minimiser.minimise(lambda x: x.abs(), y, 3)
    two, twice = minimiser.minimise(lambda x: [x.abs(), x.abs()], y, 3)
    torch.testing.assert_close(twice, curvature)  # relative to the variance
    torch.testing.assert_close(one, two)
    _, less = minimiser.minimise(lambda x: [x.abs(), x], y, 3)  # the second layer is linear
    assert bool((less < curvature).all())


def test_the_minimisers_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--images", str(folder / "train"), "--sides", "48", "--widths", "1", "--crops", "1"]
    words += ["--iterations", "2", "--json", str(tmp_path / "rows.json")]
    assert minimiser.main([*words, "--features", "pixels", "curved-squeeze"]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["features"], r["side"], r["shift"]) for r in rows] == [
        ("pixels", 48, 1.0), ("curved-squeeze", 48, 1.0),
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        minimiser.main([*words, "--features", "cruved"])
    assert ended.value.code == 2 and "curved-squeeze" in capsys.readouterr().err


# ---- features, objectives, pictures ----


def test_features_by_name(tmp_path: Path) -> None:
    image = draws.rand(1, 3, 64, 64) * 2 - 1
    shapes = {"pixels": (3, 64), "linear": (128, 64), "curved-squeeze": (128, 16)}
    for name, (channels, side) in shapes.items():
        module = extractors.load(name)
        assert module(image).shape == (1, channels, side, side)
        assert not any(p.requires_grad for p in module.parameters())
    file = tmp_path / "mine.safetensors"
    extractors.untrained("curved").save_pretrained(file)
    torch.testing.assert_close(
        extractors.load(str(file))(image), extractors.load("curved")(image), rtol=0, atol=0
    )
    assert objectives.label(f"mghf-c:{file}@2025") == "mghf-c:mine.safetensors@2025"
    first = objectives.identity(f"mghf-n:{file}")
    file.unlink()
    extractors.untrained("curved", 1).save_pretrained(file)
    assert objectives.identity(f"mghf-n:{file}") != first


@pytest.mark.parametrize(
    "name", ["mse", "dec", "mghf-n:linear", "mghf-c:curved-squeeze", "csc:curved-squeeze",
             "lip:pixels", pytest.param("vgg", marks=judged)],
)  # fmt: skip
def test_every_objective_leads_somewhere(name: str) -> None:
    gt = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    sr = (gt + 0.1).requires_grad_()
    loss = objectives.build(name)(sr, gt)
    (gradient,) = torch.autograd.grad(loss, sr)
    assert loss.shape == () and float(loss.detach()) > 0 and float(gradient.abs().max()) > 0


@judged
def test_the_vgg_loss_is_the_squared_difference_of_relu3_3() -> None:
    sr, gt = draws.rand(2, 1, 3, 64, 64)
    network = stlpips.ShiftTolerantLPIPS("vgg")
    expected = F.mse_loss(network.features(sr, 3)[-1], network.features(gt, 3)[-1])
    torch.testing.assert_close(objectives.build("vgg")(sr, gt), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["mfse", "mghf-n", "mghf-n:nothing", "vgg:curved:"])
def test_a_wrong_objective_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        objectives.build(name)


def test_a_crop_is_of_the_whole_picture(folder: Path) -> None:
    (whole,) = pictures.degraded(folder / "test" / "Set5")
    (crop,) = pictures.degraded(folder / "test" / "Set5", 48)
    assert whole.lr.shape == (24, 24, 3)
    np.testing.assert_array_equal(crop.gt, whole.gt[24:72, 24:72])
    np.testing.assert_array_equal(crop.lr, whole.lr[6:18, 6:18])
    with pytest.raises(ValueError, match="multiples of 4"):
        pictures.degraded(folder / "test" / "Set5", 50)


def test_real_pairs_must_match(folder: Path, tmp_path: Path) -> None:
    (pair,) = pictures.real(folder / "test" / "RealSR", 32)
    assert pair.gt.shape == (32, 32, 3) and pair.lr.shape == (8, 8, 3)
    with pytest.raises(ValueError, match="one folder of HR and one of LR"):
        pictures.real(tmp_path)
    for name, side in (("HR", 40), ("LR", 11)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (side, side)).save(tmp_path / name / "a.png")
    with pytest.raises(ValueError, match="not 4 times smaller"):
        pictures.real(tmp_path)


# ---- training, probe ----


def test_networks_on_the_way() -> None:
    first, second = (CompactEDSR(torch.Generator().manual_seed(s)) for s in (0, 1))
    middle = tuning.mixed(first, second, 0.25)
    for name, value in middle.state_dict().items():
        expected = 0.75 * first.state_dict()[name] + 0.25 * second.state_dict()[name]
        torch.testing.assert_close(value, expected)
    ends = tuning.mixed(first, second, 0.0), tuning.mixed(first, second, 1.0)
    for end, network in zip(ends, (first, second), strict=True):
        for name, value in end.state_dict().items():
            torch.testing.assert_close(value, network.state_dict()[name], rtol=0, atol=0)


def test_a_unit_weight_gives_gradients_of_one_length(folder: Path, start: Path) -> None:
    network = tuning.load_network(start)
    photographs = pictures.training(folder / "train")
    recipe = tuning.Recipe(1, 1, 56)
    weight = tuning.unit_weight(F.mse_loss, network, photographs, recipe)
    data = [next(tuning.crops(photographs, recipe, 0))]

    def length(term: tuning.Term) -> float:
        return tuning.gradient_length(term, network, data)

    assert length(F.l1_loss) == pytest.approx(1 / math.sqrt(3 * 56 * 56), rel=0.02)
    assert weight * length(F.mse_loss) == pytest.approx(length(F.l1_loss), rel=0.5)
    with pytest.raises(ValueError, match="no weight"):
        tuning.unit_weight(lambda sr, gt: 0 * sr.sum(), network, photographs, recipe)


@judged
def test_the_probe_repeats_and_resumes(
    folder: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["--start", str(start), "--images", str(folder / "train"), "--seeds", "0", *STEPS]
    words += ["--validation", str(folder / "test" / "Set14"), "--features", "curved-squeeze"]
    words += ["--json", str(tmp_path / "rows.json")]

    def rows(cache: str) -> list[dict[str, Any]]:
        assert probe.main([*words, "--cache", str(tmp_path / cache)]) == 0
        return json.loads((tmp_path / "rows.json").read_text())

    def settled(row: dict[str, Any]) -> dict[str, Any]:
        timed = ("seconds_per_step", "loss_seconds")
        l1 = {k: v for k, v in row["l1"].items() if k not in timed}
        return {k: v for k, v in row.items() if k not in timed} | {"l1": l1}

    (first,) = rows("one")
    (again,) = rows("two")
    assert settled(first) == settled(again)
    assert [p["alpha"] for p in first["points"]] == list(probe.ALPHAS)
    assert set(first["points"][0]) == {"alpha", "psnr", "ssim", "stlpips"}
    assert first["points"][-1]["psnr"] != first["l1"]["psnr"]
    assert first["objective"] == "mghf-n:curved-squeeze" and first["weight"] > 0

    def never(*_: Any) -> None:
        raise AssertionError("trained although it is in the cache")

    monkeypatch.setattr(probe, "fine_tune", never)
    assert rows("one") == [first]
    assert "less L1's" in capsys.readouterr().out


# ---- the study ----


@judged
def test_the_study_end_to_end(
    folder: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    base = ["--pictures", str(folder), "--start", str(start), "--out", str(out), *STEPS]
    base += ["--features", "curved-squeeze"]
    words = [*base, "--objectives", *OBJECTIVES, "--seeds", "1"]

    assert study.main([*words, "--open-test"]) == 2
    told = capsys.readouterr().err
    assert "the test stays closed: 2 trainings" in told and "mghf-n:F, seed 0" in told
    assert not (out / "opened.json").exists() and not (out / "test").exists()

    assert study.main([*words, "--only", "train"]) == 0
    kept = {p: p.stat().st_mtime_ns for p in (out / "networks").iterdir()}
    assert out / "networks" / "mse-x10-seed0.safetensors" in kept
    plan = study.make(study.arguments().parse_args(words))
    (trained,) = (p for p in kept if re.fullmatch(r"mghf-n-f-\w{8}-x10-seed0.json", p.name))
    assert trained.name.startswith(plan.stem("mghf-n:F", 10, 0).name)
    other = dataclasses.replace(plan, features="curved")  # has its own files
    assert not other.match_file("mghf-n:F", 0).exists() and other.match_file("mse", 0).exists()
    assert study.main([*words, "--only", "train"]) == 0  # everything is there
    assert {p: p.stat().st_mtime_ns for p in (out / "networks").iterdir()} == kept

    assert study.main([*words, "--open-test"]) == 0
    (file,) = out.glob("*-features.json")
    result = json.loads(file.read_text())
    assert result["test"]["pictures"] == dict.fromkeys(opening.SETS, 1)
    networks = {(m["objective"], m["target"]) for m in result["test"]["means"]}
    assert networks == {
        ("start", None), ("l1", None), *((n, t) for n in OBJECTIVES for t in runs.TARGETS),
    }  # fmt: skip
    opened = json.loads((out / "opened.json").read_text())
    assert opened["pictures"] == result["test"]["pictures"]
    text = (out / "features.md").read_text()
    assert f"Opened on {opened['opened']}" in text and str(tmp_path) not in file.read_text()
    ElementTree.fromstring((out / "assets" / page.PLOT).read_text())

    (out / "test" / "Set5" / "a.png.json").rename(tmp_path / "a.png.json")
    assert opening.opened(plan) is None  # a picture is missing, so no result
    (tmp_path / "a.png.json").rename(out / "test" / "Set5" / "a.png.json")
    assert opening.opened(plan) is not None

    capsys.readouterr()
    assert study.main([*base, "--objectives", "mse", "--seeds", "1", "--open-test"]) == 2
    assert "with mghf-n:F too, which must not be dropped" in capsys.readouterr().err
    assert study.main([*words, "--open-test", "--crop", "32"]) == 2
    assert "it is opened once" in capsys.readouterr().err

    # Another objective may be judged later; earlier judgements do not change.
    before = json.loads((out / "test" / "Set5" / "a.png.json").read_text())["networks"]
    more = [*base, "--objectives", *OBJECTIVES, "vgg", "--seeds", "1"]
    assert study.main([*more, "--open-test"]) == 2
    assert "vgg, seed 0" in capsys.readouterr().err
    assert study.main([*more, "--only", "train", "grid"]) == 0
    assert study.main([*more, "--open-test"]) == 0
    after = json.loads((out / "test" / "Set5" / "a.png.json").read_text())["networks"]
    assert before.items() <= after.items() and "vgg|0|0.5" in after
    assert study.main([*more, "--open-whole"]) == 0
    result = json.loads(file.read_text())
    (added,) = result["test"]["added"]
    assert added["objectives"] == ["vgg"] and result["test"]["opened"] == opened["opened"]
    assert result["whole"]["pictures"] == dict.fromkeys(opening.WHOLE_SETS, 1)
    assert {row["objective"] for row in result["whole"]["means"]} == {"start", "l1", "vgg"}
    assert {row["objective"] for row in result["grid"]["rows"]} == {
        "gt", "l1", *OBJECTIVES, "vgg",
    }  # fmt: skip
    assert f"Added on {added['opened']}" in (out / "features.md").read_text()

    assert study.main([*words, "--steps", "3", "--only", "train"]) == 2
    assert "holds a study with steps 2, here it is 3" in capsys.readouterr().err


def test_the_grid_is_told_from_a_picture() -> None:
    image = to_tensor(bundled().held_out[0].pixels[:128, :128])
    pattern = torch.zeros(4, 4)
    pattern[1, 2] = 0.02
    plain, marked = grid.peaks(image), grid.peaks(image + pattern.repeat(32, 32))
    assert abs(plain) < 1 < marked - plain
    noise = torch.rand(1, 3, 98, 130, generator=torch.Generator().manual_seed(0))
    assert -0.6 < grid.peaks(noise) < 0.2


def test_the_adversarial_term_learns(start: Path, folder: Path) -> None:
    network = tuning.load_network(start)
    photographs = pictures.training(folder / "train")
    recipe = tuning.Recipe(steps=2, batch=2, patch=56)
    term = objectives.build("gan")
    assert isinstance(term, adversarial.AdversarialTerm)
    data = tuning.crops(photographs, recipe, tuning.PREPARATION_SEED)
    lr, gt = next(data)
    with torch.no_grad():
        sr = network(lr)
    untrained = float(term(sr, gt))
    assert untrained == float(term(sr, gt))  # without a gradient nothing learns
    term.prepare(network, data)
    assert float(term(sr, gt)) > untrained + 0.2  # it has learned to distinguish them
    before = [p.clone() for p in term.discriminator.parameters()]
    sr.requires_grad_()
    (gradient,) = torch.autograd.grad(term(sr, gt), sr)
    assert float(gradient.abs().sum()) > 0
    assert any(
        not torch.equal(a, b) for a, b in zip(before, term.discriminator.parameters(), strict=True)
    )
    assert tuning.unit_weight(term, network, photographs, recipe) > 0


def test_what_is_chosen_follows_from_the_files(tmp_path: Path, start: Path) -> None:
    plan = runs.Study(tmp_path, start, tmp_path, tmp_path, "curved", ("l1", "mse"), (0, 1))

    def put(ratio: float, loss: float) -> None:
        stem = plan.stem("mse", ratio, 0)
        runs.write_json(stem.with_name(stem.name + ".json"), {"psnr": 25 - loss, "l1_psnr": 25.0})

    assert plan.chosen("mse") is None
    put(1.0, 0.2)
    assert plan.chosen("mse") is None
    put(3.0, 0.6)
    assert plan.chosen("mse") == 3.0
    put(3.0, 0.5)
    put(10.0, 0.54)
    assert plan.chosen("mse") == 10.0
    assert plan.missing() == ["mse, seed 0", "mse, seed 1"]
    assert plan.full_name("mghf-c:F@2025") == "mghf-c:curved@2025"
    assert plan.full_name("mse") == "mse"


def test_a_preset_less_some_terms() -> None:
    whole, less = objectives.preset("2026"), objectives.preset("2026-no-lip-no-correlation")
    assert whole == PRESETS["2026"]
    assert less.gammas == (2, 2, 0) and less.betas == (6e-3, 0, 5e-4)
    alone = objectives.preset("2026-no-naive-no-mse-no-correlation-no-gram")
    assert alone.factors() == {**dict.fromkeys(whole.factors(), 0.0), "lip": 8e-2}
    with pytest.raises(ValueError, match="less terms such as -no-lip .*got '2026-no-lap'"):
        objectives.preset("2026-no-lap")
    assert objectives.identity("mghf-c:curved@2026") != objectives.identity("mghf-c:curved@2025")


def test_the_terms_gradients_over_sizes_of_crops(folder: Path, start: Path, tmp_path: Path) -> None:
    plan = runs.Study(
        tmp_path,
        start,
        folder / "train",
        folder / "test" / "Set14",
        "curved-squeeze",
        ("l1",),
        (0,),
    )
    found = terms.measure(plan, ("2026", "2026-no-lip"), (64,))
    whole, less = found["rows"]
    assert whole["side"] == 64 and whole["naive"] == less["naive"] > 0
    assert "lip" not in less and whole["lip"] > 0 and whole["total"] != less["total"]


@judged
def test_the_cost_is_told_beside_the_vgg_loss(tmp_path: Path, start: Path) -> None:
    plan = runs.Study(tmp_path, start, tmp_path, tmp_path, "curved", ("l1", "mse", "vgg"), (0,))
    found = cost.measure(plan, plan.compared, rounds=2, side=64)
    rows = {row["objective"]: row for row in found["rows"]}
    assert rows["vgg"]["of_vgg"] == 1 and rows["mse"]["of_vgg"] < 0.2


@pytest.mark.skipif(not quality.Lite2.available(), reason="EfficientNet-Lite2 is not installed")
def test_the_second_judge() -> None:
    judge = quality.Lite2()
    image = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    features = judge.features(image)
    assert [f.shape[1] for f in features] == [16, 24, 48, 88, 120, 208]
    other = judge.features((image + 0.2).clamp(0, 1))
    assert float(judge.compare(features, features)) == 0 < float(judge.compare(other, features))
