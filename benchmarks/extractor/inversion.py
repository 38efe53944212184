"""Part (b): image -> features -> image.

*Exact*: the blocks' inverses, then the least-squares inverse of the stem, a 3 x 3 convolution, by
conjugate gradients. *Descent*: L-BFGS on the image from grey and a little noise (at plain
grey a ReLU network without biases has no gradient), for the squared distance of the features alone,
with the same number of evaluations for every kind of features.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from mghf_fast import DetailFeatureExtractor
from mghf_fast.nn import InvertibleBlock

from .scenes import Scene
from .subjects import RANDOM, TRAINED, VGG_LAYERS, Subject, of_extractor, random_extractor, vgg16

SIDE, BUDGET, PHOTOGRAPHS = 64, 200, 4
MOST_DB = 120.0
"""Errors below a millionth of the range are float32's and not compared."""


def psnr(found: Tensor, image: Tensor) -> float:
    """dB, of images in [0, 1]; ``MOST_DB`` at most."""
    error = float((found.clamp(0, 1).double() - image.double()).square().mean())
    return min(MOST_DB, -10 * math.log10(max(error, 1e-30)))


def undo_stem(stem: nn.Conv2d, features: Tensor, iterations: int = 300) -> Tensor:
    """The image whose stem features are nearest, (B, C, H, W) -> (B, 3, H, W)."""
    weight = stem.weight.double()
    assert stem.bias is not None
    target = features.double() - stem.bias.double().view(-1, 1, 1)

    def transposed(y: Tensor) -> Tensor:
        return F.conv_transpose2d(y, weight, padding=1)

    def normal(x: Tensor) -> Tensor:
        return transposed(F.conv2d(x, weight, padding=1))

    right = transposed(target)
    x = torch.zeros_like(right)
    residual, direction = right.clone(), right.clone()
    norm = first = residual.square().sum()
    for _ in range(iterations):
        if norm <= 1e-28 * first:
            break
        along = normal(direction)
        step = norm / (direction * along).sum()
        x = x + step * direction
        residual = residual - step * along
        norm, before = residual.square().sum(), norm
        direction = residual + norm / before * direction
    return x


@torch.no_grad()
def exact(extractor: DetailFeatureExtractor, image: Tensor, dtype: torch.dtype) -> Tensor:
    """The image that the inverse gives back of features rounded to ``dtype``.

    Raises:
        ValueError: the stem is not the linear one.
    """
    if not isinstance(extractor.stem, nn.Conv2d):
        raise ValueError("only an extractor with stem='conv' has an exact inverse")
    features = extractor(image * 2 - 1).to(dtype).float()
    for block in reversed(extractor.blocks):
        assert isinstance(block, InvertibleBlock)
        features = block.inverse(features)
    return (undo_stem(extractor.stem, features).float() + 1) / 2


def descend(features: Callable[[Tensor], Tensor], image: Tensor, budget: int) -> Tensor:
    """The image that ``budget`` evaluations of the features and their gradient find."""
    with torch.no_grad():
        target = features(image)
    scale = 1 / target.var().clamp_min(1e-12)
    generator = torch.Generator().manual_seed(0)
    x = (0.5 + 0.1 * torch.randn(image.shape, generator=generator)).requires_grad_()
    best: list[tuple[float, Tensor]] = [(math.inf, x.detach().clone())]
    used = 0

    def closure() -> Tensor:
        nonlocal used
        used += 1
        loss = (features(x) - target).square().mean() * scale
        x.grad = torch.autograd.grad(loss, x)[0].contiguous()
        value = float(loss.detach())
        if used <= budget and value < best[0][0]:
            best[0] = value, x.detach().clone()
        return loss.detach()

    optimizer = torch.optim.LBFGS(
        [x], max_iter=budget, max_eval=budget, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=0, tolerance_change=0,
    )  # fmt: skip
    while used < budget:
        before = used
        optimizer.step(closure)
        if used - before < 3:  # the line search finds nothing lower any more
            break
    return best[0][1]


def measure(
    trained: DetailFeatureExtractor,
    scenes: Sequence[Scene],
    seeds: Sequence[int],
    budget: int = BUDGET,
) -> tuple[dict[str, Any], bytes]:
    """The part's result, and a picture of what came back."""
    extractors = [(TRAINED, 0, trained)]
    extractors += [(RANDOM, seed, random_extractor(trained, seed)) for seed in seeds]
    rows: list[dict[str, Any]] = []
    shown: dict[str, list[Tensor]] = {"photograph": [scene.image for scene in scenes]}

    def add(name: str, seed: int, how: str, found: list[Tensor]) -> None:
        each = [psnr(f, s.image) for f, s in zip(found, scenes, strict=True)]
        rows.append(
            {"subject": name, "seed": seed, "how": how, "psnr": [round(p, 2) for p in each]}
        )
        if seed == seeds[0] or name == TRAINED:
            shown[f"{name}, {how}"] = found

    images = [scene.image[None] for scene in scenes]
    for name, seed, extractor in extractors:
        for how, dtype in (("exact", torch.float32), ("exact, bfloat16", torch.bfloat16)):
            add(name, seed, how, [exact(extractor, image, dtype)[0] for image in images])
        subject = of_extractor(name, extractor, seed)
        add(name, seed, "descent", [descend(subject.features, i, budget)[0] for i in images])
    for layer in VGG_LAYERS:
        network: Subject = of_extractor(f"VGG-16 {layer}", vgg16(layer, seeds[0]), seeds[0])
        found = [descend(network.features, image, budget)[0] for image in images]
        add(network.name, seeds[0], "descent", found)
    facts = {
        "photographs": [scene.name for scene in scenes],
        "side": scenes[0].image.shape[1],
        "budget": budget,
        "rows": rows,
    }
    return facts, strip(shown)


STRIP = {
    "photograph": "photograph",
    f"{TRAINED}, exact": "inverse",
    f"{TRAINED}, descent": "descent",
    **{f"VGG-16 {layer}, descent": f"VGG {layer}" for layer in VGG_LAYERS},
}
"""What the picture shows, with the label of its column."""


def strip(shown: dict[str, list[Tensor]], zoom: int = 2) -> bytes:
    """A row for each photograph, a column for each way back, as PNG."""
    columns = [(label, shown[name]) for name, label in STRIP.items() if name in shown]
    side, gap, head = columns[0][1][0].shape[1] * zoom, 6, 24
    size = (len(columns) * (side + gap) + gap, head + len(columns[0][1]) * (side + gap))
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=15)
    for x, (label, pictures) in enumerate(columns):
        left = gap + x * (side + gap)
        draw.text((left + side / 2, head / 2), label, "black", font=font, anchor="mm")
        for y, picture in enumerate(pictures):
            pixels = (picture.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            image.paste(tile, (left, head + y * (side + gap)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
