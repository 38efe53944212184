"""The distorted pictures of the pairs whose distances are learned: outputs of super-resolution
networks, variations of these, and other distortions.

A perceptual loss needs correct distances where its training operates: between blurred outputs, the
ground truth, and detail that is sharp but wrong. Other distortions keep them correct elsewhere.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Random = np.random.Generator


class Scene(NamedTuple):
    """A picture and the ingredients of its distortions, (3, S, S) in [0, 1] each."""

    gt: Tensor
    sr: Tensor
    """A network's output for the degraded picture."""
    elsewhere: Tensor
    """The detail that the network's output for another picture lacks."""


def noise(shape: torch.Size, random: Random) -> Tensor:
    """Gaussian noise of standard deviation 1."""
    return torch.from_numpy(random.standard_normal(tuple(shape), dtype=np.float32))


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blurs (3, S, S); ``sigma`` in pixels, at most 2.2; the border is reflected."""
    radius = 7
    axis = torch.arange(-radius, radius + 1.0)
    kernel = torch.exp(-0.5 * (axis / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(image[None], (radius,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(3, 1, 1, -1), groups=3)
    return F.conv2d(rows, kernel.view(1, 1, -1, 1).expand(3, 1, -1, 1), groups=3)[0]


def shift(image: Tensor, across: float, down: float) -> Tensor:
    """Shifts (3, S, S) by pixels, fractions included; bicubic."""
    height, width = image.shape[1:]
    moved = torch.tensor([[[1.0, 0.0, 2 * across / width], [0.0, 1.0, 2 * down / height]]])
    grid = F.affine_grid(moved, [1, 3, height, width], align_corners=False)
    return F.grid_sample(
        image[None], grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )[0]


def random_shift(image: Tensor, least: float, most: float, random: Random) -> Tensor:
    """Shifts by ``least`` to ``most`` pixels in a random direction."""
    length, angle = random.uniform(least, most), random.uniform(0, 2 * math.pi)
    return shift(image, length * math.cos(angle), length * math.sin(angle))


def band_noise(image: Tensor, low: float, high: float, rms: float, random: Random) -> Tensor:
    """Noise of the image's shape with frequencies from ``low`` to ``high``, cycles per pixel."""
    rows, columns = (torch.fft.fftfreq(side) for side in image.shape[1:])
    radius = torch.hypot(rows[:, None], columns[None])
    spectrum = torch.fft.fft2(noise(image.shape, random)) * ((radius >= low) & (radius < high))
    plane = torch.fft.ifft2(spectrum).real
    return plane * (rms / plane.square().mean().sqrt())


def _network_output(scene: Scene, random: Random) -> Tensor:
    return scene.sr


def _on_the_way(scene: Scene, random: Random) -> Tensor:
    """A mixture of the network's output and the truth."""
    return scene.gt + (scene.sr - scene.gt) * random.uniform(0.1, 1.0)


def _wrong_detail(scene: Scene, random: Random) -> Tensor:
    """Sharp, but with the detail of another picture, or its own in the wrong place."""
    detail = scene.elsewhere
    if random.random() < 0.5:
        moves = tuple(int(m) for m in random.integers(-4, 5, 2))
        detail = torch.roll(scene.gt - scene.sr, moves, (1, 2))
    return scene.sr + detail * random.uniform(0.2, 1.1)


def _sharpened_output(scene: Scene, random: Random) -> Tensor:
    mean = F.avg_pool2d(scene.sr, 3, 1, 1, count_include_pad=False)
    return scene.sr + (scene.sr - mean) * random.uniform(0.3, 2.0)


def _white_noise(scene: Scene, random: Random) -> Tensor:
    return scene.gt + noise(scene.gt.shape, random) * random.uniform(0.005, 0.08)


def _coloured_noise(scene: Scene, random: Random) -> Tensor:
    base = scene.sr if random.random() < 0.5 else scene.gt
    side = int(random.choice([2, 3, 5]))
    height, width = base.shape[1:]
    white = noise(torch.Size((3, height + side - 1, width + side - 1)), random)
    smooth = F.avg_pool2d(white, side, 1)
    smooth = smooth / smooth.std()
    if random.random() < 0.5:  # brightness only
        smooth = smooth[:1].expand(3, -1, -1)
    return base + smooth * random.uniform(0.005, 0.06)


def _shifted(scene: Scene, random: Random) -> Tensor:
    """A shifted copy, which has nearly the same low resolution."""
    return random_shift(scene.gt, 0.2, 1.5, random)


def _blurred(scene: Scene, random: Random) -> Tensor:
    return gaussian_blur(scene.gt, random.uniform(0.4, 2.2))


def _jpeg(scene: Scene, random: Random) -> Tensor:
    from PIL import Image

    pixels = (scene.gt * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=int(random.integers(20, 90)))
    return as_tensor(np.asarray(Image.open(buffer)))


def _enlarged(scene: Scene, random: Random) -> Tensor:
    """Steps or ringing at edges: reduced by 4 and enlarged by a fixed filter."""
    small = F.interpolate(scene.gt[None], scale_factor=0.25, mode="area")
    mode = ("nearest", "bilinear", "bicubic")[int(random.integers(3))]
    return F.interpolate(small, scale_factor=4, mode=mode)[0]


SHARES: tuple[tuple[float, Callable[[Scene, Random], Tensor]], ...] = (
    (0.30, _network_output),
    (0.15, _on_the_way),
    (0.10, _wrong_detail),
    (0.07, _sharpened_output),
    (0.08, _white_noise),
    (0.08, _coloured_noise),
    (0.07, _shifted),
    (0.07, _blurred),
    (0.04, _jpeg),
    (0.04, _enlarged),
)
"""Probability of each distortion; the sum is 1."""
_SHARE = np.array([share for share, _ in SHARES])
EXTRA_NOISE = (0.15, 0.01)
"""Probability of noise on top of a distortion, and its standard deviation."""


def as_tensor(pixels: np.ndarray) -> Tensor:
    """(S, S, 3) of 8 bits -> (3, S, S) in [0, 1], float32."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255


def distort(scene: Scene, random: Random) -> Tensor:
    """A random distortion of a picture, (3, S, S) in [0, 1]; S is a multiple of 4."""
    _, distortion = SHARES[int(random.choice(len(SHARES), p=_SHARE))]
    image = distortion(scene, random)
    often, strength = EXTRA_NOISE
    if random.random() < often:
        image = image + noise(image.shape, random) * strength
    return image.clamp(0, 1)
