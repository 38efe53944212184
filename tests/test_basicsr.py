"""BasicSR, the package itself: its registry builds the losses, its pipeline trains with them."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import draws
import numpy as np
import pages
import pytest
import torch
import trainers

import mghf_fast
from mghf_fast import DECLoss, MGHFLoss

trainers.need("basicsr", "torchvision", "cv2", "yaml")

OWN_WEIGHTS = Path(mghf_fast.__file__).parent / "weights" / "procedural-v1.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    trainers.supply_torchvision()
    importlib.import_module("mghf_fast.integrations.basicsr")


def build(**options: Any) -> torch.nn.Module:
    from basicsr.losses import build_loss

    return build_loss(options)


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    gt = draws.rand(2, 3, 40, 48)
    return (gt + 0.1 * draws.randn_like(gt)).requires_grad_(), gt


def test_the_registry_builds_a_weighted_pair(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected = MGHFLoss(input_range="0,1")(*images)
    value, style = build(type="MGHFLoss", perceptual_weight=0.25)(*images)
    assert style is None
    torch.testing.assert_close(value, 0.25 * expected)
    value, style = build(type="MGHFLoss", perceptual_weight=0, dec_weight=0.5)(*images)
    assert value == 0
    torch.testing.assert_close(style, 0.5 * DECLoss()(*images))


def test_the_registry_builds_a_scalar(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    both = build(type="MGHFLoss", perceptual_weight=2, dec_weight=3, returns="scalar")(*images)
    expected = 2 * MGHFLoss(input_range="0,1")(*images) + 3 * DECLoss()(*images)
    torch.testing.assert_close(both, expected)
    dec = build(type="DECLoss", loss_weight=3, returns="scalar")(*images)
    torch.testing.assert_close(dec, 3 * DECLoss()(*images))
    value, style = build(type="DECLoss", threshold_db=20.0)(*images)
    assert style is None
    torch.testing.assert_close(value, DECLoss(threshold_db=20.0)(*images))


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"variant": "n"}, {"variant": "n", "input_range": "0,1"}),
        ({"preset": 2026, "extractor": "random"}, {"preset": "2026", "extractor": "random"}),
        ({"input_range": [-1, 1]}, {"input_range": "-1,1"}),
        ({"input_range": "[0, 1]"}, {"input_range": "0,1"}),
        ({"extractor": str(OWN_WEIGHTS)}, {"extractor": "procedural-v1"}),
    ],
)
def test_options_as_a_file_spells_them(
    options: dict[str, Any], same: dict[str, Any], images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    value, _ = build(type="MGHFLoss", perceptual_weight=1, **options)(*images)
    torch.testing.assert_close(value, MGHFLoss(**{"input_range": "0,1", **same})(*images))


def test_small_crops_and_video(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    sr, gt = (image.detach()[..., :24, :24] for image in images)
    value, _ = build(type="MGHFLoss", perceptual_weight=1)(sr, gt)
    assert value > 0
    clip, style = build(type="MGHFLoss", perceptual_weight=1, dec_weight=1)(sr[None], gt[None])
    torch.testing.assert_close(clip, value)
    assert style is not None


def test_what_is_wrong_is_said(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(TypeError, match=r"unknown option loss_weight; allowed are perceptual_w"):
        build(type="MGHFLoss", loss_weight=1)
    with pytest.raises(TypeError, match=r"unknown options a, b; allowed are loss_weight, returns"):
        build(type="DECLoss", a=1, b=2)
    with pytest.raises(ValueError, match="returns must be one of 'pair', 'scalar', got 'both'"):
        build(type="MGHFLoss", returns="both")
    with pytest.raises(TypeError, match="perceptual_weight must be a number, got '1e-1x'"):
        build(type="MGHFLoss", perceptual_weight="1e-1x")
    sr, gt = images
    for name in ("MGHFLoss", "DECLoss"):
        with pytest.raises(ValueError, match="gt requires a gradient and x does not"):
            build(type=name)(gt, sr)


OPTIONS = """
name: three
model_type: SRModel
scale: 4
num_gpu: 0
manual_seed: 0
datasets:
  train:
    name: train
    type: PairedImageDataset
    dataroot_gt: {folder}/gt
    dataroot_lq: {folder}/lq
    io_backend: {{type: disk}}
    gt_size: 64
    use_hflip: true
    use_rot: true
    num_worker_per_gpu: 0
    batch_size_per_gpu: 2
    dataset_enlarge_ratio: 1
    prefetch_mode: ~
  val:
    name: val
    type: PairedImageDataset
    dataroot_gt: {folder}/gt
    dataroot_lq: {folder}/lq
    io_backend: {{type: disk}}
network_g: {{type: SRVGGNetCompact, num_in_ch: 3, num_out_ch: 3, num_feat: 8, num_conv: 2,
             upscale: 4, act_type: prelu}}
path: {{pretrain_network_g: ~, strict_load_g: true, resume_state: ~}}
train:
  ema_decay: 0.9
  optim_g: {{type: Adam, lr: !!float 1e-4}}
  scheduler: {{type: MultiStepLR, milestones: [100], gamma: 0.5}}
  total_iter: 3
  warmup_iter: -1
  pixel_opt: {{type: L1Loss, loss_weight: 1.0, reduction: mean}}
  perceptual_opt: {perceptual}
val:
  val_freq: !!float 3
  save_img: false
  metrics: {{psnr: {{type: calculate_psnr, crop_border: 4, test_y_channel: false}}}}
logger: {{print_freq: 1, save_checkpoint_freq: !!float 3, use_tb_logger: false}}
dist_params: {{backend: gloo}}
"""


def pictures(folder: Path) -> None:
    """Six pairs of smooth pictures with some noise, 96 pixels and 24."""
    import cv2

    for kind in ("gt", "lq"):
        (folder / kind).mkdir()
    generator = np.random.default_rng(0)
    for number in range(6):
        coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        gt = cv2.resize(coarse, (96, 96), interpolation=cv2.INTER_CUBIC)
        gt = cv2.add(gt, generator.integers(0, 20, gt.shape, dtype=np.uint8))
        lq = cv2.resize(gt, (24, 24), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / "gt" / f"{number}.png"), gt)
        cv2.imwrite(str(folder / "lq" / f"{number}.png"), lq)


def train(folder: Path, perceptual: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    text = OPTIONS.format(folder=folder, perceptual=json.dumps(perceptual))
    options = folder / "x.yml"
    options.write_text(text)
    # The page's command, with these options, and with the torch that is installed here.
    command = shlex.split(pages.blocks("docs/integrations.md")["BasicSR: plain"])
    assert command[:2] == ["python", "-m"]
    return trainers.run(["-m", "trainers", *command[2:-1], str(options)], folder)


def test_three_iterations_without_any_python_of_the_users(tmp_path: Path) -> None:
    pictures(tmp_path)
    perceptual = {"type": "MGHFLoss", "perceptual_weight": 0.1, "extractor": "perceptual-v1"}
    done = train(tmp_path, {**perceptual, "dec_weight": 1e-3})
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "experiments" / "three"
    log = next(run.glob("train_three_*.log")).read_text()
    assert "Loss [MGHFLoss] is created." in log
    for name in ("l_pix", "l_percep", "l_style"):
        values = [float(v) for v in re.findall(rf"{name}: (\S+)", log)]
        assert len(values) == 3 and all(0 < abs(v) < 100 for v in values), log
    assert "psnr" in log
    # The checkpoint holds only the network.
    saved = torch.load(run / "models" / "net_g_3.pth", weights_only=True)
    assert set(saved) == {"params", "params_ema"}
    assert all(name.startswith("body.") for name in saved["params"])


def test_an_unknown_key_ends_the_training_with_the_allowed_ones(tmp_path: Path) -> None:
    pictures(tmp_path)
    done = train(tmp_path, {"type": "MGHFLoss", "perceptual_wieght": 0.1})
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "unknown option perceptual_wieght; allowed are perceptual_weight, returns" in last
