"""pyiqa, the package itself: MGHF as a metric and as a loss."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import draws
import pytest
import torch
import trainers

from mghf_fast import MGHFLoss

trainers.need("pyiqa", "torchvision", "timm", "cv2", "yaml", "requests", "huggingface_hub")


@pytest.fixture(scope="module")
def create_metric() -> Callable[..., Any]:
    trainers.supply_torchvision()
    importlib.import_module("mghf_fast.integrations.pyiqa")
    import pyiqa

    def create(name: str, **options: Any) -> Any:
        return pyiqa.create_metric(name, device=torch.device("cpu"), **options)

    return create


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    gt = draws.rand(2, 3, 40, 48)
    sr = (gt + 0.05 * draws.randn_like(gt)).clamp(0, 1)
    return sr.requires_grad_(), gt


@pytest.mark.parametrize("variant", ["c", "n"])
def test_metric_and_loss(
    variant: str, create_metric: Callable[..., Any], images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    name = "mghf" if variant == "c" else "mghf-n"
    expected = MGHFLoss(variant, input_range="0,1", reduction="none")(*images)
    metric = create_metric(name)
    assert metric.lower_better
    found = metric(*images)
    assert found.shape == (2, 1) and not found.requires_grad
    torch.testing.assert_close(found[:, 0], expected.detach())

    loss = create_metric(name, as_loss=True)
    torch.testing.assert_close(loss(*images), expected.mean())
    (gradient,) = torch.autograd.grad(loss(*images), images[0])
    assert gradient.abs().sum() > 0
    # pyiqa's own `loss_weight` weights the images of a batch.
    weights = torch.tensor([[3.0], [1.0]])
    weighted = create_metric(name, as_loss=True, loss_weight=weights)
    torch.testing.assert_close(weighted(*images), (0.75 * expected[0] + 0.25 * expected[1]))
    with pytest.raises(ValueError, match="y requires a gradient and x does not"):
        loss(images[1], images[0])


def test_options(
    create_metric: Callable[..., Any], images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    loss = create_metric("mghf", as_loss=True, extractor="random", preset=2026)
    expected = MGHFLoss(preset="2026", extractor="random", input_range="0,1")
    torch.testing.assert_close(loss(*images), expected(*images))
    grey = [image[:, :1] for image in images]
    same = [image.expand(-1, 3, -1, -1) for image in grey]
    torch.testing.assert_close(loss(*grey), expected(*same))
    with pytest.raises(TypeError, match="MGHF got the unknown option colour; allowed are variant"):
        create_metric("mghf", colour=1)
