"""DINO-v2 as an embedder: small models of the three libraries, built without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import draws
import pytest
import torch
import trainers
from torch import Tensor, nn

from mghf_fast import HFDiffLoss, functional
from mghf_fast.integrations import dino

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "init_values": 1.0}


class HubModel(nn.Module):
    """The interface of torch.hub's DINO-v2: a dictionary of tokens, ``patch_size``."""

    def __init__(self, patch_size: int = 14, width: int = 24) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.drop = nn.Dropout(0.5)

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        assert not any(side % self.patch_size for side in x.shape[2:])
        tokens = self.drop(self.embed(x).flatten(2).transpose(1, 2))
        return {"x_norm_clstoken": tokens.mean(1), "x_norm_patchtokens": tokens}


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] with sides that are not multiples of 14."""
    gt = 2 * draws.rand(2, 3, 50, 64) - 1
    return (gt + 0.2 * draws.randn_like(gt)).requires_grad_(), gt


def check(embedder: dino.Embedder, width: int, tokens: int, images: tuple[Tensor, Tensor]) -> None:
    """Shapes, frozen weights, evaluation mode, gradients in the image only, and use in the loss."""
    sr, gt = images
    embedder.tokens = "patch"
    assert embedder(sr).shape == (2, tokens, width)
    embedder.tokens = "class"
    found = embedder(sr)
    assert found.shape == (2, width)
    assert not any(p.requires_grad for p in embedder.parameters())
    assert not embedder.state_dict().keys() & {"mean", "deviation"}
    loss = HFDiffLoss("random", embedder=embedder).train()
    terms = loss.terms(sr, gt)
    expected = functional.js_divergence_loss(found, embedder(gt))
    torch.testing.assert_close(terms["js"], expected)  # no dropout either
    assert expected > 0
    (gradient,) = torch.autograd.grad(terms["js"], sr)
    assert gradient.shape == sr.shape and gradient.abs().sum() > 0


def test_torch_hub(images: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    check(dino.Embedder(HubModel()), 24, 4 * 5, images)  # 56 x 70
    (tmp_path / "hubconf.py").write_text(
        "from test_dino import HubModel\ndef dinov2_small(patch): return HubModel(patch)\n"
    )
    embedder = dino.from_hub(
        "dinov2_small", str(tmp_path), source="local", patch=16, input_range="0,1"
    )
    assert embedder.patch_size == 16
    check(embedder, 24, 3 * 4, images)


def test_timm(images: tuple[Tensor, Tensor]) -> None:
    trainers.need("timm", "torchvision", "huggingface_hub")
    trainers.supply_torchvision()
    name = "vit_small_patch14_dinov2"
    embedder = dino.from_timm(name, pretrained=False, img_size=56, **SMALL)
    check(embedder, 24, 4 * 5, images)
    name = "vit_small_patch14_reg4_dinov2"  # register tokens belong to no patch
    embedder = dino.from_timm(name, pretrained=False, img_size=56, **SMALL)
    check(embedder, 24, 4 * 5, images)


def test_transformers(images: tuple[Tensor, Tensor]) -> None:
    trainers.need("transformers", "huggingface_hub")
    trainers.supply_torchvision()
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    check(dino.Embedder(Dinov2Model(config)), 24, 4 * 5, images)


def test_preparation(images: tuple[Tensor, Tensor]) -> None:
    embedder = dino.Embedder(HubModel())
    x = draws.rand(1, 3, 28, 42)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (dino.MEAN, dino.DEVIATION))
    torch.testing.assert_close(embedder.prepared(2 * x - 1), (x - mean) / deviation)
    assert embedder.prepared(images[0]).shape == (2, 3, 56, 70)
    assert embedder.prepared(draws.rand(1, 3, 5, 6)).shape == (1, 3, 14, 14)
    unit = dino.Embedder(HubModel(), input_range="0,1")
    torch.testing.assert_close(unit.prepared(x), embedder.prepared(2 * x - 1))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"tokens": "all"}, ValueError, "tokens must be one of 'class', 'patch', got 'all'"),
        ({"input_range": None}, ValueError, "input_range must be one of '0,1', '-1,1', got None"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1, got 0"),
        ({"model": abs}, TypeError, "model must be a torch.nn.Module, got builtin_function"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        dino.Embedder(**{"model": HubModel(), **options})


def test_bad_input() -> None:
    embedder = dino.Embedder(HubModel())
    with pytest.raises(ValueError, match="image must have 3 channels, got 4"):
        embedder(draws.rand(1, 4, 28, 28))
    with pytest.raises(TypeError, match=r"model must give tokens \(B, T, D\).*of Identity"):
        dino.Embedder(nn.Identity())(draws.rand(1, 3, 28, 28))
