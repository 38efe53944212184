"""The seeded blind degradation: blur, downsampling by 4, noise, JPEG, each of random strength.

The order is that of Zhang et al. (2021) and Real-ESRGAN's first stage, at moderate strength: what
a small network can learn to undo within a minute.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .photographs import Pixels
from .settings import SCALE

KERNEL_SIZE = 21
BLUR_SIGMA = (0.4, 1.6)
"""Standard deviations along both axes of the Gaussian, ground-truth pixels."""
NOISE_SIGMA = (0.0, 3.0)
"""Standard deviation of the Gaussian noise, of 255."""
JPEG_QUALITY = (80, 95)


def gaussian_kernel(sigma_x: float, sigma_y: float, angle: float) -> Tensor:
    """A Gaussian turned by ``angle`` radians: ``(KERNEL_SIZE, KERNEL_SIZE)``, sum 1."""
    axis = torch.arange(KERNEL_SIZE, dtype=torch.float64) - KERNEL_SIZE // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    kernel = torch.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2))
    return (kernel / kernel.sum()).float()


def _jpeg(pixels: Pixels, quality: int) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return np.asarray(Image.open(buffer), dtype=np.uint8)


def degrade(gt: Pixels, random: np.random.Generator) -> Pixels:
    """The low-resolution picture of ``gt``: ``(H, W, 3)`` -> ``(H / 4, W / 4, 3)``, 8 bits.

    Every choice is drawn from ``random`` and from nothing else, so a seed repeats it.

    Raises:
        ValueError: a side of ``gt`` is no multiple of 4 or shorter than 16.
    """
    height, width = gt.shape[:2]
    if height % SCALE or width % SCALE or min(height, width) < 16:
        raise ValueError(
            f"gt is {height} x {width}; allowed are multiples of {SCALE} from 16 a side"
        )
    image = torch.from_numpy(gt.astype(np.float32)).permute(2, 0, 1)[None] / 255

    sigma_x = random.uniform(*BLUR_SIGMA)
    isotropic = random.random() < 0.5
    sigma_y = sigma_x if isotropic else random.uniform(*BLUR_SIGMA)
    kernel = gaussian_kernel(sigma_x, sigma_y, random.uniform(0, math.pi))
    padded = F.pad(image, (KERNEL_SIZE // 2,) * 4, mode="reflect")
    image = F.conv2d(padded.transpose(0, 1), kernel[None, None]).transpose(0, 1)

    if random.random() < 0.5:
        image = F.avg_pool2d(image, SCALE)
    else:
        size = (height // SCALE, width // SCALE)
        image = F.interpolate(image, size, mode="bicubic", antialias=True)

    low = image[0].permute(1, 2, 0).double().numpy() * 255
    low += random.normal(0.0, random.uniform(*NOISE_SIGMA), low.shape)
    pixels = np.clip(np.rint(low), 0, 255).astype(np.uint8)
    return _jpeg(pixels, int(random.integers(JPEG_QUALITY[0], JPEG_QUALITY[1], endpoint=True)))
