"""The demo's objectives and ``mghf-fast demo --ablation``, on tiny trainings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
Image = pytest.importorskip("PIL.Image")

from mghf_fast import MGHFLoss  # noqa: E402
from mghf_fast.commands import cli  # noqa: E402
from mghf_fast.commands.demo import DemoError, DemoSettings, ablation, losses, objectives  # noqa: E402
from mghf_fast.commands.demo import run_ablation as run  # noqa: E402
from mghf_fast.commands.demo.network import upsample_bicubic  # noqa: E402
from mghf_fast.commands.evaluate.stlpips import ShiftTolerantLPIPS, unavailable_reason  # noqa: E402

needs_vgg = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))


def pair(side: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gt = torch.rand(2, 3, side // 4, side // 4, generator=generator)
    gt = torch.nn.functional.interpolate(gt, scale_factor=4.0, mode="bicubic").clamp(0, 1)
    return (gt + 0.05 * torch.randn(gt.shape, generator=generator)).clamp(0, 1), gt


# --- objectives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["n", "c"])
def test_mghf_is_the_loss_itself(variant: str) -> None:
    sr, gt = pair()
    terms = objectives.mghf("random", variant, "2025")(sr.requires_grad_(), gt)
    expected = MGHFLoss(variant, "2025", "random", input_range="0,1")(sr, gt)
    torch.testing.assert_close(terms["total"], expected)
    assert terms["total"].requires_grad and not terms["naive"].requires_grad


@needs_vgg
def test_vgg_is_the_mean_squared_error_of_one_layer() -> None:
    sr, gt = pair()
    network = ShiftTolerantLPIPS("vgg")
    s, g = (network.features(x, 3)[-1] for x in (sr, gt))
    assert s.shape[1] == 256
    terms = objectives.vgg16()(sr.requires_grad_(), gt)
    torch.testing.assert_close(terms["total"].detach(), (s - g).square().mean())
    torch.autograd.backward(terms["total"])
    assert sr.grad is not None and sr.grad.abs().sum() > 0


@needs_vgg
def test_lpips_is_the_mean_distance() -> None:
    sr, gt = pair()
    expected = ShiftTolerantLPIPS("vgg")(sr, gt).mean()
    objective = objectives.lpips_vgg()
    terms = objective(sr.requires_grad_(), gt)
    torch.testing.assert_close(terms["total"].detach(), expected)
    assert float(objective(gt, gt)["total"].detach()) == 0


def test_l1_is_added_with_the_weight_on_the_other() -> None:
    sr, gt = pair()

    def square(sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        loss = (sr - gt).square().mean()
        return {"total": loss, "square": loss.detach()}

    terms = objectives.with_l1(square, 0.25, "other")(sr, gt)
    mae, mse = (sr - gt).abs().mean(), (sr - gt).square().mean()
    torch.testing.assert_close(terms["total"], mae + 0.25 * mse)
    assert set(terms) == {"total", "l1", "other", "square"}
    torch.testing.assert_close(terms["other"], mse)


def test_the_length_of_l1s_gradient_is_that_of_its_signs() -> None:
    sr, gt = pair(64)
    low = torch.nn.functional.avg_pool2d(gt, 4)
    batches = iter([(low, sr)] * 9)
    length = objectives.gradient_length(objectives.l1, upsample_bicubic, batches)
    assert length == pytest.approx(sr.numel() ** -0.5, rel=1e-3)
    assert len(list(batches)) == 9 - objectives.FIRST_BATCHES
    with pytest.raises(ValueError, match="data gives no batch"):
        objectives.gradient_length(objectives.l1, upsample_bicubic, [])


# --- the tables ----------------------------------------------------------------------------------


def test_rows_that_keep_one_term_have_its_gradient_alone() -> None:
    rows = {row.name: row for row in ablation.ROWS}
    sr, gt = pair()
    terms = MGHFLoss(preset=losses.PRESET, extractor=losses.EXTRACTOR, input_range="0,1").terms(
        sr, gt
    )
    preset = ablation.PRESETS[losses.PRESET]
    (g1, g2, g3), (b1, b2, _) = preset.gammas, preset.betas
    for name, expected in (
        ("AWDFE MSE only", g2 * b1 * terms["csc_mse"]),
        ("MGHF-n + AWDFE MSE", g1 * terms["naive"] + g2 * b1 * terms["csc_mse"]),
        ("correlation only", g2 * b2 * terms["csc_correlation"]),
        ("CSC", g2 * terms["csc"]),
        ("MGHF-n + CSC", g1 * terms["naive"] + g2 * terms["csc"]),
        ("LIP only", g3 * terms["lip"]),
        ("MGHF-c", terms["total"]),
        ("MGHF-n", terms["naive"]),
    ):
        build = rows[name].build
        assert build is not None
        torch.testing.assert_close(build()(sr, gt)["total"], expected, rtol=1e-4, atol=1e-8)


def tiny(out: Path, tmp_path: Path) -> DemoSettings:
    album = tmp_path / "album"
    album.mkdir(exist_ok=True)
    for seed in range(4):
        random = np.random.default_rng(seed)
        small = Image.fromarray(random.integers(0, 256, (24, 28, 3), np.uint8))
        small.resize((112, 96), Image.Resampling.BICUBIC).save(album / f"{seed}.png")
    return DemoSettings(out=out, images=album, steps=1, batch=1, patch=56, threads=1)


def test_the_ablation_matches_gradients_and_repeats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    state = torch.get_rng_state()
    first = run(tiny(out, tmp_path))
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.name for p in out.iterdir()] == ["ablation.json"]
    assert json.loads((out / "ablation.json").read_text()) == first
    rows = {row["name"]: row for row in first["rows"]}
    assert rows["L1 (base)"]["weight"] == 0
    # The demo's own objective is one of the rows, with its own weight.
    assert rows["MGHF-c"]["weight"] == pytest.approx(losses.MGHF_WEIGHT, rel=1e-4)
    left_out = ["VGG-16 loss", "LPIPS loss"] if unavailable_reason() else []
    assert first["left_out"] == left_out
    assert [*rows, *left_out] == [row.name for row in ablation.ROWS]

    shown = capsys.readouterr().out
    for words in ("Table 6", "Table 4", "0.2713", "5.54", "cannot be compared with these"):
        assert words in shown
    assert all(shown.count(f"\n{name} ") >= 1 for name in rows)

    second = run(tiny(out, tmp_path))  # over its own file
    for result in (first, second):
        del result["seconds"]
        for row in result["rows"]:
            del row["step_seconds"]
    assert first == second


def test_without_the_package_its_rows_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablation, "unavailable_reason", lambda: "the package is not installed")
    monkeypatch.setattr("mghf_fast.commands.demo.pipeline.find_judge", lambda: None)
    kept = [r for r in ablation.ROWS if r.name in (ablation.BASE, ablation.NAIVE, ablation.VGG)]
    monkeypatch.setattr(ablation, "ROWS", tuple(kept))
    result = run(tiny(tmp_path / "out", tmp_path))
    assert [row["name"] for row in result["rows"]] == [ablation.BASE, ablation.NAIVE]
    assert result["left_out"] == [ablation.VGG]
    assert "Left out: VGG-16 loss; the package is not installed." in capsys.readouterr().out


def test_an_objective_without_a_gradient_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing() -> objectives.Objective:
        return lambda sr, gt: {"total": 0 * sr.sum()}

    monkeypatch.setattr(ablation, "ROWS", (ablation.Row("nothing", nothing),))
    with pytest.raises(DemoError, match="nothing: its gradient is 0.0 on the first batches"):
        run(tiny(tmp_path / "out", tmp_path))


def test_a_foreign_ablation_file_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ablation.json").write_text("{}")
    assert cli.main(["demo", "--ablation", "--out", str(tmp_path)]) == 2
    assert "ablation.json is there and is not the demo's" in capsys.readouterr().err
    assert (tmp_path / "ablation.json").read_text() == "{}"
