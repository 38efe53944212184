"""A whole loss step, forward and backward to SR: MGHF-n and MGHF-c against VGG-16 perceptual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mghf_fast
from mghf_fast.measure import available_memory
from mghf_fast.workloads import VGG16Perceptual, image_pair, workload

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "mghf_n": lambda: mghf_fast.MGHFLoss(variant="n"),
    "mghf_c": lambda: mghf_fast.MGHFLoss(variant="c"),
    "vgg16": VGG16Perceptual,
}
EAGER_MGHF_C_BYTES = 13 * 2**30
"""What the eager reference of MGHF-c needs at 512x512; a smaller image needs less."""


def _step(loss: Callable[..., Tensor], size: int, memory_format: torch.memory_format) -> Any:
    sr, gt = image_pair(size)
    sr = sr.detach().to(memory_format=memory_format).requires_grad_()
    gt = gt.to(memory_format=memory_format)
    return lambda: torch.autograd.grad(loss(sr, gt), sr)


@pytest.mark.parametrize("mode", ["eager", "channels_last", "compile"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [256, 512])
def test_loss_step(
    bench: Callable[..., Any], benchmark: Any, name: str, mode: str, size: int
) -> None:
    benchmark.group = f"loss step, {size}x{size}"
    memory_format = torch.channels_last if mode == "channels_last" else torch.contiguous_format
    loss = LOSSES[name]().to(memory_format=memory_format)
    function = torch.compile(loss) if mode == "compile" else loss
    step = _step(function, size, memory_format)
    bench(step, shape=f"1x3x{size}x{size}", loss=name, mode=mode)


@pytest.mark.parametrize("size", [256, 512])
def test_reference_step(bench: Callable[..., Any], benchmark: Any, size: int) -> None:
    """MGHF-c in plain PyTorch under ordinary autograd: what the fused ops are compared with."""
    needed = EAGER_MGHF_C_BYTES * size**2 // 512**2
    if (available := available_memory()) is not None and available < needed:
        pytest.skip(f"needs about {needed / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are free")
    benchmark.group = f"loss step, {size}x{size}"
    step = workload("total", "reference", size)
    bench(step, shape=f"1x3x{size}x{size}", loss="mghf_c", mode="reference autograd")
