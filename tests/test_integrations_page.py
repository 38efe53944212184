"""docs/integrations.md: every block of code works as it stands on the page, in the trainer itself
where PyPI has it, else in the stand-ins of trainers.py."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import draws
import pages
import pytest
import torch
import trainers
from torch import Tensor, nn

import mghf_fast
from mghf_fast.commands import cli

BLOCKS = pages.blocks("docs/integrations.md")
NOT_RUN = {
    "BasicSR: plain": "a whole training: test_basicsr.py runs the command with its own options",
}
"""Blocks that do not run here, and why."""


def step(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """One forward and backward, with a finite value and gradient."""
    gt = draws.rand(2, 3, 40, 48)
    sr = (gt + 0.1 * draws.randn_like(gt)).requires_grad_()
    value = loss(sr, gt)
    assert value.dim() == 0 and value.isfinite()
    (gradient,) = torch.autograd.grad(value, sr)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def names_after(code: str, **given: Any) -> dict[str, Any]:
    """The names that a page's Python leaves, which has the ``given`` ones."""
    exec(code, given)
    return given


# ---- the weight ----


def weight(code: str) -> None:
    pages.python_runs(code, "assert 0 < weight < float('inf')")


NETWORK = """
from torch import nn
def make_net(): return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))
"""


def calibrate_command(code: str) -> None:
    Image = pytest.importorskip("PIL.Image")
    for name, side in (("LR", 64), ("HR", 128)):
        Path(name).mkdir()
        pixels = (255 * draws.rand(side, side, 3)).byte()
        Image.fromarray(pixels.numpy()).save(f"{name}/0.png")
    Path("mine.py").write_text(NETWORK)
    torch.save(names_after(NETWORK)["make_net"]().state_dict(), "net_g.pth")
    program, *words = shlex.split(code)
    assert program == "mghf-fast"
    with patch.dict(sys.modules):  # without `mine` afterwards
        assert cli.main([*words, "--batch", "1", "--batches", "1"]) == 0


# ---- trainers that PyPI has ----


def basicsr_options(code: str) -> None:
    """Both slots of BasicSR's ``SRModel``."""
    trainers.need("basicsr", "torchvision", "cv2", "yaml")
    trainers.supply_torchvision()
    importlib.import_module("mghf_fast.integrations.basicsr")
    import yaml
    from basicsr.losses import build_loss

    options = yaml.safe_load(code)["train"]
    assert options.keys() == {"pixel_opt", "perceptual_opt"}
    pixel, perceptual = (build_loss(options[slot]) for slot in ("pixel_opt", "perceptual_opt"))
    step(lambda sr, gt: sum((v for v in perceptual(sr, gt) if v is not None), pixel(sr, gt)))


def lpips_import(code: str) -> None:
    pages.python_runs(
        code,
        "value = net_lpips(sr, gt).mean()\n"
        "value.backward()\n"
        "assert value.isfinite() and sr.grad.isfinite().all() and sr.grad.abs().sum() > 0",
    )


def pyiqa_script(code: str) -> None:
    trainers.need("pyiqa", "torchvision", "timm", "cv2", "yaml", "requests", "huggingface_hub")
    trainers.supply_torchvision()
    device = "cuda" if torch.cuda.is_available() else "cpu"  # pyiqa's own default

    def last_line(sr: Tensor, gt: Tensor) -> Tensor:
        *lines, last = code.splitlines()
        names = names_after("\n".join(lines), sr=sr.to(device), gt=gt.to(device))
        return eval(last, names)

    step(last_line)


# ---- trainers that PyPI has not ----


def write_file(code: str) -> None:
    """Writes a block to the file that its first line names."""
    path = Path(re.match(r"# (\S+\.py)\n", code)[1])
    path.parent.mkdir(parents=True)
    path.write_text(code)


def redux_file(code: str) -> None:
    write_file(code)
    with trainers.stand_in("traiNNer", "trainner_redux", True, Path()) as registry:
        step(registry.build({"type": "mghfloss", "loss_weight": 1.0}))


def redux_options(code: str) -> None:
    """The trainer's sum over ``losses``, each times its own ``loss_weight``."""
    trainers.need("yaml")
    import yaml

    class CharbonnierLoss(nn.Module):
        def __init__(self, loss_weight: float) -> None:
            super().__init__()
            self.loss_weight = loss_weight

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return ((x - target).square() + 1e-12).sqrt().mean()

    write_file(BLOCKS["traiNNer-redux: python"])
    with trainers.stand_in("traiNNer", "trainner_redux", True, Path()) as registry:
        registry.register()(CharbonnierLoss)
        options = yaml.safe_load("train:\n" + code)["train"]
        losses = [registry.build(entry) for entry in options.pop("losses")]
        assert not options
        assert any(type(loss).__name__ == "MGHFLoss" for loss in losses)
        step(lambda sr, gt: sum(loss(sr, gt) * abs(loss.loss_weight) for loss in losses))


def neosr_file(code: str) -> None:
    write_file(code)
    with trainers.stand_in("neosr", "neosr", False, Path()) as registry:
        step(registry.build({"type": "mghf_loss"}))


def neosr_options(code: str) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no parser of TOML")
    options = tomllib.loads(code)["train"]
    write_file(BLOCKS["neosr: python"])
    with trainers.stand_in("neosr", "neosr", False, Path()) as registry:
        step(registry.build(options.pop("perceptual_opt")))
    assert not options


def kair_names(code: str) -> dict[str, Any]:
    """What ``models/model_gan.py`` has after the page's imports."""
    losses = types.ModuleType("models.loss")
    losses.GANLoss = nn.Module  # type: ignore[attr-defined]
    with patch.dict(sys.modules, {"models": types.ModuleType("models"), "models.loss": losses}):
        return names_after(code)


def kair_imports(code: str) -> None:
    names = kair_names(code)
    assert "GANLoss" in names
    step(names["PerceptualLoss"](lossfn_type="mghf-n"))


def kair_options(code: str) -> None:
    """Within its section of the options. KAIR reads these six keys and multiplies itself."""
    others = '"F_feature_layer": [2, 7], "F_use_input_norm": true, "F_use_range_norm": false'
    options = json.loads(f"{{{code}{others}}}")
    weight = options.pop("F_lossfn_weight")
    keys = ("feature_layer", "weights", "lossfn_type", "use_input_norm", "use_range_norm")
    assert options.keys() == {f"F_{key}" for key in keys}
    make = kair_names(BLOCKS["KAIR: python"])["PerceptualLoss"]
    loss = make(**{key: options[f"F_{key}"] for key in keys})
    step(lambda sr, gt: weight * loss(sr, gt))


def sinsr_term(code: str) -> None:
    """The lines in ``training_losses_distill``, after the one that a comment has for
    ``__init__``."""
    model = types.SimpleNamespace()
    names_after(re.match(r"# in __init__: (.*)\n", code)[1], self=model, mghf_fast=mghf_fast)

    def total(sr: Tensor, gt: Tensor) -> Tensor:
        terms = {"loss": torch.zeros(2)}
        names_after(code, self=model, terms=terms, model_output_pedict_gt=sr, z_start_gt=gt)
        assert terms["hf"].shape == (2,)
        return terms["loss"].mean()

    step(total)


def sinsr_objective(code: str) -> None:
    diffusion, model = trainers.Diffusion(), trainers.Network()
    names = ("z_T", "z_y", "z_start_teacher", "z_start_gt", "lq")
    states = {name: 2 * draws.rand(2, 3, 32, 32) - 1 for name in names}
    loss = mghf_fast.HFDiffLoss()
    found = names_after(code, diffusion=diffusion, model=model, hf_diff=loss, **states)
    # The order of the arguments is the page's to show.
    expected = loss.distil(
        found["student"],
        noisy=states["z_T"],
        condition=states["z_y"],
        teacher_output=states["z_start_teacher"],
        gt=states["z_start_gt"],
        final_timestep=3,
    )
    assert found["loss"].isfinite() and torch.equal(found["loss"], expected)
    for gradient in torch.autograd.grad(found["loss"], list(model.parameters())):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


CHECKS: dict[str, Callable[[str], None]] = {
    "Which weight: python": weight,
    "Which weight: plain": calibrate_command,
    "BasicSR: yaml": basicsr_options,
    "Where LPIPS is called: python": lpips_import,
    "traiNNer-redux: python": redux_file,
    "traiNNer-redux: yaml": redux_options,
    "neosr: python": neosr_file,
    "neosr: toml": neosr_options,
    "KAIR: python": kair_imports,
    "KAIR: plain": kair_options,
    "pyiqa: python": pyiqa_script,
    "SinSR and HF-Diff: python": sinsr_term,
    "SinSR and HF-Diff: python 2": sinsr_objective,
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_block_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    CHECKS[name](BLOCKS[name])


def test_every_block_runs_or_is_listed() -> None:
    assert not CHECKS.keys() & NOT_RUN.keys()
    assert CHECKS.keys() | NOT_RUN.keys() == BLOCKS.keys()
