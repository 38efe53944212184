"""Part (c): what the loss answers to.

*At one PSNR*: blur, white noise, JPEG and ringing (an ideal low-pass), each as strong as gives a
photograph this PSNR; the loss over the MSE, which the PSNR makes equal, relative to noise. An MSE
says 1 for all. *Order*: stronger blur, noise and compression shall cost more; of all pairs of
levels, the share on which the loss agrees. *Octaves*: what the features answer to noise of one
octave of frequencies.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mghf_fast import DetailFeatureExtractor, MGHFLoss

from .scenes import Scene
from .subjects import RANDOM, TRAINED, random_extractor

SIDE, PSNR = 192, 30.0
LEVELS: dict[str, tuple[float, ...]] = {
    "blur": (0.4, 0.6, 0.8, 1.2, 1.8, 2.7),
    "noise": (1, 2, 4, 8, 16, 32),
    "JPEG": (5, 10, 20, 40, 70, 90),
}
UNITS = {
    "blur": "standard deviation, pixels",
    "noise": "standard deviation of 255",
    "JPEG": "100 - quality",
    "ringing": "1 / cut-off, pixels a cycle",
}
OCTAVES = tuple((2.0**-k, 2.0 ** (1 - k)) for k in (6, 5, 4, 3, 2))
"""Of the radial frequency, cycles a pixel, up to the finest."""
OCTAVE_NOISE = 2 / 255
"""Standard deviation of the noise of an octave."""
Evaluate = Callable[[Tensor, Tensor], dict[str, list[float]]]
"""(B, 3, H, W) and their ground truth, (3, H, W) -> distances of each by metric."""


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian, the border reflected."""
    radius = max(1, math.ceil(3 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-((x / sigma) ** 2) / 2)
    kernel = (kernel / kernel.sum()).to(image.dtype)
    y = F.pad(image[None], (radius,) * 4, mode="reflect")
    y = F.conv2d(y, kernel.view(1, 1, 1, -1).expand(3, 1, 1, -1), groups=3)
    return F.conv2d(y, kernel.view(1, 1, -1, 1).expand(3, 1, -1, 1), groups=3)[0]


def noise(image: Tensor, sigma: float) -> Tensor:
    """White and Gaussian, the same pattern each time; not clipped, which would be another noise."""
    generator = torch.Generator().manual_seed(0)
    return image + sigma / 255 * torch.randn(image.shape, generator=generator)


def jpeg(image: Tensor, strength: float) -> Tensor:
    """Pillow's, with quality 100 - ``strength``."""
    pixels = (image.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=round(100 - strength))
    decoded = np.asarray(Image.open(buffer), dtype=np.float32) / 255
    return torch.from_numpy(decoded).permute(2, 0, 1).contiguous()


def ringing(image: Tensor, strength: float) -> Tensor:
    """All frequencies above 1 / ``strength`` cycles a pixel cut off, the border mirrored."""
    height, width = image.shape[1:]
    mirrored = torch.cat((image, image.flip(1)), 1)
    mirrored = torch.cat((mirrored, mirrored.flip(2)), 2)
    fy = torch.fft.fftfreq(2 * height)[:, None]
    fx = torch.fft.rfftfreq(2 * width)[None]
    # A soft edge one coefficient wide makes the strength a continuous one.
    width_of_edge = 1 / (2 * max(height, width))
    keep = ((1 / strength - (fy.square() + fx.square()).sqrt()) / width_of_edge + 0.5).clamp(0, 1)
    back = torch.fft.irfft2(torch.fft.rfft2(mirrored) * keep, s=mirrored.shape[1:])
    return back[:, :height, :width].contiguous()


DISTORTIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], float, float]] = {
    "blur": (blur, 0.2, 8.0),
    "noise": (noise, 0.2, 80.0),
    "JPEG": (jpeg, 2.0, 99.0),
    "ringing": (ringing, 1.4, 40.0),
}
"""What it does, and the least and the greatest strength."""


def mse(found: Tensor, image: Tensor) -> float:
    return float((found.double() - image.double()).square().mean())


def at_psnr(name: str, image: Tensor, wanted: float) -> tuple[Tensor, float]:
    """The image distorted to a PSNR, in dB, or as near as it gets; and the strength."""
    distort, low, high = DISTORTIONS[name]
    target = 10 ** (-wanted / 10)
    if name == "JPEG":
        qualities = [float(s) for s in range(int(low), int(high) + 1)]
        strength = min(
            qualities, key=lambda s: abs(math.log(max(mse(jpeg(image, s), image), 1e-12) / target))
        )
        return jpeg(image, strength), strength
    for _ in range(30):
        middle = math.sqrt(low * high)
        if mse(distort(image, middle), image) < target:
            low = middle
        else:
            high = middle
    return distort(image, low), low


def by_mse(images: Tensor, gt: Tensor) -> dict[str, list[float]]:
    return {"MSE": [mse(image, gt) for image in images]}


def by_loss(extractor: DetailFeatureExtractor) -> Evaluate:
    """MGHF-n and MGHF-c with an extractor, in one pass."""
    loss = MGHFLoss("c", extractor=extractor, input_range="0,1", reduction="none")

    @torch.no_grad()
    def evaluate(images: Tensor, gt: Tensor) -> dict[str, list[float]]:
        terms = [loss.terms(each, gt.expand_as(each)) for each in images.split(4)]
        return {
            metric: torch.cat([t[name] for t in terms]).tolist()
            for metric, name in (("MGHF-n", "naive"), ("MGHF-c", "total"))
        }

    return evaluate


def response(
    values: Mapping[str, Sequence[float]], errors: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Of each distortion the loss over the MSE relative to that of noise: the geometric mean over
    the photographs, of which ``values`` and ``errors`` (the MSEs) have one each."""
    per_error = {
        name: [math.log(v / e) for v, e in zip(values[name], errors[name], strict=True)]
        for name in values
    }
    noise_ = per_error["noise"]
    return {
        name: math.exp(sum(a - b for a, b in zip(logs, noise_, strict=True)) / len(noise_))
        for name, logs in per_error.items()
    }


def octave_noise(image: Tensor, low: float, high: float) -> Tensor:
    """Noise of the frequencies from ``low`` up to ``high``, of the image's shape, the same each
    time."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(image.shape, generator=generator)
    fy = torch.fft.fftfreq(image.shape[1])[:, None]
    fx = torch.fft.rfftfreq(image.shape[2])[None]
    radius = (fy.square() + fx.square()).sqrt()
    kept = torch.fft.rfft2(white) * ((radius >= low) & (radius < high))
    found = torch.fft.irfft2(kept, s=image.shape[1:])
    return found * (OCTAVE_NOISE / found.square().mean().sqrt())


@torch.no_grad()
def by_octave(extractor: DetailFeatureExtractor, scenes: Sequence[Scene]) -> list[float]:
    """Mean square of what noise of each octave changes in the features, relative to the finest:
    the mean over the photographs."""
    found = torch.zeros(len(OCTAVES), dtype=torch.float64)
    for scene in scenes:
        # An octave at a time, and the image itself in front.
        noisy = [scene.image + octave_noise(scene.image, *octave) for octave in OCTAVES]
        first, *others = (extractor(each[None] * 2 - 1) for each in (scene.image, *noisy))
        change = torch.stack([(other - first).double().square().mean() for other in others])
        found += change / change[-1] / len(scenes)
    return [float(f"{value:.4g}") for value in found]


def order(values: Sequence[Sequence[float]]) -> tuple[int, int]:
    """Of the pairs of levels of each photograph, weakest first: agreements and all."""
    pairs = [p for each in values for p in itertools.combinations(each, 2)]
    return sum(weak < strong for weak, strong in pairs), len(pairs)


def measure(
    trained: DetailFeatureExtractor,
    scenes: Sequence[Scene],
    seeds: Sequence[int],
    wanted: float = PSNR,
) -> dict[str, Any]:
    """The part's result."""
    matched = {
        name: [at_psnr(name, scene.image, wanted)[0] for scene in scenes] for name in DISTORTIONS
    }
    errors = {
        name: [mse(i, scene.image) for i, scene in zip(images, scenes, strict=True)]
        for name, images in matched.items()
    }
    # Of each photograph all that it is distorted to: at one PSNR, then every level of each kind.
    distorted = [
        torch.stack(
            [images[i] for images in matched.values()]
            + [
                DISTORTIONS[name][0](scene.image, level)
                for name, levels in LEVELS.items()
                for level in levels
            ]
        )
        for i, scene in enumerate(scenes)
    ]

    def row(name: str, seed: int, metric: str, values: list[list[float]]) -> dict[str, Any]:
        """``values`` holds a photograph's distances in the order of ``distorted``."""
        at_one = {kind: [each[k] for each in values] for k, kind in enumerate(matched)}
        found: dict[str, Any] = {"subject": name, "seed": seed, "metric": metric}
        found["response"] = {k: round(v, 3) for k, v in response(at_one, errors).items()}
        found["order"], found["curve"] = {}, {}
        start = len(matched)
        for kind, levels in LEVELS.items():
            part = [each[start : start + len(levels)] for each in values]
            start += len(levels)
            found["order"][kind] = order(part)
            # Relative to the strongest level, mean over the photographs.
            relative = np.mean([[v / each[-1] for v in each] for each in part], axis=0)
            found["curve"][kind] = [float(f"{v:.4g}") for v in relative]
        return found

    rows = []
    extractors = [(TRAINED, 0, trained)]
    extractors += [(RANDOM, seed, random_extractor(trained, seed)) for seed in seeds]
    subjects: list[tuple[str, int, Evaluate]] = [("MSE", 0, by_mse)]
    subjects += [(name, seed, by_loss(extractor)) for name, seed, extractor in extractors]
    for name, seed, evaluate in subjects:
        found = [evaluate(i, scene.image) for i, scene in zip(distorted, scenes, strict=True)]
        for metric in found[0]:
            rows.append(row(name, seed, metric, [each[metric] for each in found]))
    return {
        "photographs": [scene.name for scene in scenes],
        "side": scenes[0].image.shape[1],
        "psnr": wanted,
        "reached": {
            name: [round(-10 * math.log10(e), 2) for e in each] for name, each in errors.items()
        },
        "levels": {name: list(values) for name, values in LEVELS.items()},
        "rows": rows,
        "octaves": [
            {"subject": name, "seed": seed, "response": by_octave(extractor, scenes)}
            for name, seed, extractor in extractors
        ],
    }
