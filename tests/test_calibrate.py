"""The weight from gradients, for losses with a known answer, and the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import draws
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mghf_fast import MGHFLoss
from mghf_fast.commands import cli
from mghf_fast.commands.calibrate import pairs
from mghf_fast.integrations import calibrate
from mghf_fast.integrations.calibrate import measure, weight_for


def batches(count: int = 3, side: int = 32) -> list[tuple[Tensor, Tensor]]:
    return [(draws.rand(2, 3, side, side), draws.rand(2, 3, side, side)) for _ in range(count)]


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))


def test_a_multiple_of_the_pixel_loss() -> None:
    network, data = net(), batches()
    found = measure(lambda sr, gt: 8 * F.l1_loss(sr, gt), network, data)
    assert len(found.loss) == len(found.pixel) == 3
    assert found.ratio == pytest.approx(8)
    assert found.cosine == pytest.approx((1, 1, 1))
    assert found.weight(2) == pytest.approx(0.25)
    assert weight_for(lambda sr, gt: 8 * F.l1_loss(sr, gt), network, data) == pytest.approx(1 / 8)


def test_the_median_and_the_length_in_the_parameters() -> None:
    network = nn.Conv2d(3, 3, 1)
    data = batches(4)
    ratios = []
    for low, gt in data:
        lengths = []
        for loss in (F.mse_loss, F.l1_loss):
            gradients = torch.autograd.grad(loss(network(low), gt), list(network.parameters()))
            lengths.append(sum(g.square().sum() for g in gradients).sqrt())
        ratios.append(float(lengths[0] / lengths[1]))
    found = measure(F.mse_loss, network, data)
    assert found.ratios == pytest.approx(ratios, rel=1e-5)
    middle = sum(sorted(ratios)[1:3]) / 2
    assert weight_for(F.mse_loss, network, iter(data), 0.5) == pytest.approx(0.5 / middle, rel=1e-5)


def test_the_weight_gives_the_ratio_with_the_loss_itself() -> None:
    network, data = nn.Conv2d(3, 3, 3, padding=1), batches(1, 64)
    loss = MGHFLoss("n", input_range="0,1")
    weight = weight_for(loss, network, data, ratio=3.0)
    lengths = []
    for value in (F.l1_loss, lambda sr, gt: weight * loss(sr, gt)):
        gradients = torch.autograd.grad(value(network(data[0][0]), data[0][1]), network.weight)
        lengths.append(float(gradients[0].norm()))
    assert lengths[1] / lengths[0] == pytest.approx(3, rel=0.05)  # apart from the biases


def test_nothing_is_changed() -> None:
    network = net().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    data = batches()
    torch.set_rng_state(state)
    with torch.no_grad():
        measure(F.mse_loss, network, data)
    assert network.training
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_wrong_is_said() -> None:
    network, data = net(), batches(1)
    with pytest.raises(ValueError, match="batches must hold at least one pair"):
        measure(F.mse_loss, network, [])
    with pytest.raises(ValueError, match="net must have a trainable parameter"):
        measure(F.mse_loss, net().requires_grad_(False), data)
    with pytest.raises(TypeError, match=r"loss must return a scalar tensor, got \(2, 1, 1, 1\)"):
        measure(lambda sr, gt: sr.mean((1, 2, 3), keepdim=True), network, data)
    with pytest.raises(TypeError, match="loss must return a scalar tensor, got tuple"):
        measure(lambda sr, gt: (sr.mean(), None), network, data)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="loss must depend on sr, its first argument"):
        measure(lambda sr, gt: gt.mean(), network, data)
    with pytest.raises(ValueError, match="the gradient of loss in batch 0 has the length 0"):
        measure(lambda sr, gt: 0 * sr.mean(), network, data)
    with pytest.raises(ValueError, match="the gradient of pixel in batch 0 has the length nan"):
        measure(F.mse_loss, network, data, lambda sr, gt: sr.mean() * float("nan"))
    with pytest.raises(ValueError, match="ratio must be finite and above 0, got 0"):
        weight_for(F.mse_loss, network, data, ratio=0)


def folder(tmp_path: Path, scale: int, *, side: int = 96, count: int = 2) -> list[str]:
    """LR and HR folders of smooth noise."""
    Image = pytest.importorskip("PIL.Image")
    words = []
    for kind, size in (("lr", side // scale), ("hr", side)):
        (tmp_path / kind).mkdir()
        words.append(str(tmp_path / kind))
        for number in range(count):
            torch.manual_seed(number)
            pixels = F.interpolate(draws.rand(1, 3, 12, 12), size=(size, size), mode="bilinear")
            if kind == "hr":
                pixels = (pixels + 0.05 * draws.randn_like(pixels)).clamp(0, 1)
            array = (pixels[0].permute(1, 2, 0) * 255).byte().numpy()
            Image.fromarray(array).save(tmp_path / kind / f"{number}.png")
    return words


SMALL = ["--crop", "48", "--batch", "2", "--batches", "2"]


def test_messages_name_the_commands_own_arguments(tmp_path: Path) -> None:
    low, high = map(Path, folder(tmp_path, 2))
    with pytest.raises(FileNotFoundError, match="^LR: there is no "):
        pairs.load(tmp_path / "none", high, 48)
    next(iter(low.iterdir())).unlink()
    with pytest.raises(ValueError, match="without: HR "):
        pairs.load(low, high, 48)
    for path in low.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="^LR: there is no picture in the folder"):
        pairs.load(low, high, 48)


def weight_printed(text: str) -> float:
    return float(text.strip().splitlines()[-1].removeprefix("weight: "))


def test_command_with_the_network_that_ships(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["calibrate", *folder(tmp_path, 4), *SMALL]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert "MGHF-c (perceptual-v1, balanced) beside L1, in the parameters of demo-start" in first
    assert "2 batches of 2 crops of 48 pixels, scale 4" in first
    assert cli.main([*words, "--ratio", "3"]) == 0
    again = capsys.readouterr().out
    assert weight_printed(again) == pytest.approx(3 * weight_printed(first), rel=0.01)


def test_one_weight_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the median ratio, 2; the median of the weights 1 and 1/3 would be another."""
    found = calibrate.Calibration((1.0, 3.0), (1.0, 1.0), (1.0, 1.0))
    monkeypatch.setattr(calibrate, "measure", lambda *arguments: found)
    assert cli.main(["calibrate", *folder(tmp_path, 1), *SMALL]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^weight for a ratio of 1 +(\S+)", text, re.M) == ["0.5"]
    assert weight_printed(text) == 0.5


def test_command_in_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["calibrate", *folder(tmp_path, 1), *SMALL, "--variant", "n", "--extractor", "random"]
    assert cli.main(words) == 0
    assert "in the pixels of the pictures" in capsys.readouterr().out


NETWORK = """
from torch import nn
def small(): return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))
def none(): return None
"""


def test_command_with_a_network_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["calibrate", *folder(tmp_path, 2), *SMALL, "--variant", "n"]
    (tmp_path / "my_network_of_a_test.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    state = {f"0.{name}": value for name, value in nn.Conv2d(3, 12, 3).state_dict().items()}
    torch.save({"params": state}, tmp_path / "x.pth")
    network = ["--network", "my_network_of_a_test:small"]
    assert cli.main([*words, *network, "--weights", "x.pth", "--pixel", "l2"]) == 0
    assert "beside L2, in the parameters of my_network_of_a_test:small" in capsys.readouterr().out
    torch.save({"params": {}}, tmp_path / "y.pth")
    for more, said in (
        ([], "the network that ships is for scale 4, the pairs are of 2: name yours"),
        (["--network", "small"], "--network must be MODULE:NAME, got 'small'"),
        (["--network", "no_module:x"], "--network no_module:x: No module named 'no_module'"),
        (["--network", "my_network_of_a_test:none"], "must give a torch.nn.Module, got NoneType"),
        ([*network, "--weights", "y.pth"], "--weights y.pth: Error(s) in loading state_dict"),
        ([*network, "--weights", "z.pth"], "No such file or directory: 'z.pth'"),
        ([*network, "--crop", "49"], "--crop must be a multiple of the scale 2, got 49"),
        ([*network, "--crop", "200"], "--crop 200 fits none of the pictures"),
        ([*network, "--batches", "0"], "--batches must be 1 or more, got 0"),
        ([*network, "--ratio", "-1"], "--ratio must be above 0, got -1"),
    ):
        assert cli.main([*words, *more]) == 2
        errors = capsys.readouterr().err
        assert said in errors and errors.count("\n") == 1


def test_pairs_that_are_none(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    low, high = map(Path, folder(tmp_path, 2))
    Image.new("RGB", (96, 90)).save(high / "1.png")
    with pytest.raises(ValueError, match="1: HR must be a whole multiple of LR, got 96 x 90 for"):
        pairs.load(low, high, 48)


def test_the_page_says_what_its_result_says() -> None:
    from benchmarks.report import ROOT
    from benchmarks.studies import weights

    page = (ROOT / "docs" / "integrations.md").read_text()
    (name,) = set(re.findall(r"results/([\w.-]+-weights\.json)", page))
    result = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    assert weights.table(result["ratios"]) in page, "python -m benchmarks.studies.weights"
    # And the text's figures: the medians of the shipped network and 300 steps later.
    for title, line in re.findall(
        r"^\| (.+?)(?: \(the defaults\))? \| ([\d.]+ to [\d.]+) times L1", page, re.M
    ):
        trained = [
            row["ratio"]
            for row in result["ratios"]
            if row["loss"].startswith(title.split(", of its")[0]) and row["network"] != "untrained"
        ]
        low, high = (float(number) for number in line.split(" to "))
        assert trained, title
        assert low == pytest.approx(0.1 * min(trained), rel=0.12)
        assert high == pytest.approx(0.1 * max(trained), rel=0.12)
