"""The seeded blind degradation: blur, downsampling by 4, noise, JPEG, each of random strength.

The order is that of Zhang et al. (2021) and Real-ESRGAN's first stage, at a moderate strength that
a small network can learn to undo within a minute. It uses only NumPy, so that batches are the same
for any number of PyTorch threads and do not compete with them.
"""

from __future__ import annotations

import io
import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..pixels import Pixels
from .settings import SCALE

Plane = npt.NDArray[np.float64]

KERNEL_SIZE = 21
BLUR_SIGMA = (0.4, 1.6)
"""Range of the Gaussian's standard deviations along both axes, ground-truth pixels."""
NOISE_SIGMA = (0.0, 3.0)
"""Range of the Gaussian noise's standard deviation, on a scale of 0 to 255."""
JPEG_QUALITY = (80, 95)


def gaussian_kernel(sigma_x: float, sigma_y: float, angle: float) -> Plane:
    """A Gaussian rotated by ``angle`` radians: ``(KERNEL_SIZE, KERNEL_SIZE)``, sum 1."""
    axis = np.arange(KERNEL_SIZE) - KERNEL_SIZE // 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    kernel: Plane = np.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2))
    return kernel / kernel.sum()


def blur(image: Plane, kernel: Plane) -> Plane:
    """Convolves each channel of ``(H, W, 3)`` with ``kernel``; the border is reflected."""
    edge = KERNEL_SIZE // 2
    padded = np.pad(image, ((edge, edge), (edge, edge), (0, 0)), mode="reflect")
    size = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, size)[..., None]
    blurred = np.fft.irfft2(spectrum, size, axes=(0, 1))
    # The kernel starts at the origin instead of being centred on it: everything is shifted by
    # `edge`, and the part that wrapped around is cut off.
    return blurred[2 * edge :, 2 * edge :]


def reduce(image: Plane, method: str) -> Plane:
    """``(H, W, 3)`` -> ``(H / 4, W / 4, 3)``: ``"area"`` or antialiased ``"bicubic"``."""
    height, width = image.shape[0] // SCALE, image.shape[1] // SCALE
    if method == "area":
        area: Plane = image.reshape(height, SCALE, width, SCALE, 3).mean((1, 3))
        return area
    channels = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    small = [c.resize((width, height), Image.Resampling.BICUBIC) for c in channels]
    return np.stack([np.asarray(c, dtype=np.float64) for c in small], axis=2)


def _jpeg(pixels: Pixels, quality: int) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return np.asarray(Image.open(buffer), dtype=np.uint8)


def degrade(gt: Pixels, random: np.random.Generator) -> Pixels:
    """The low-resolution picture of ``gt``: ``(H, W, 3)`` -> ``(H / 4, W / 4, 3)``, 8 bits.

    Every choice is drawn from ``random`` alone, so a seed repeats it.

    Raises:
        ValueError: a side of ``gt`` is not a multiple of 4 or shorter than 16.
    """
    height, width = gt.shape[:2]
    if height % SCALE or width % SCALE or min(height, width) < 16:
        raise ValueError(
            f"gt is {height} x {width}; allowed are multiples of {SCALE} from 16 a side"
        )
    sigma_x = random.uniform(*BLUR_SIGMA)
    isotropic = random.random() < 0.5
    sigma_y = sigma_x if isotropic else random.uniform(*BLUR_SIGMA)
    blurred = blur(
        gt.astype(np.float64), gaussian_kernel(sigma_x, sigma_y, random.uniform(0, math.pi))
    )
    low = reduce(blurred, "area" if random.random() < 0.5 else "bicubic")
    low += random.normal(0.0, random.uniform(*NOISE_SIGMA), low.shape)
    pixels = np.clip(np.rint(low), 0, 255).astype(np.uint8)
    return _jpeg(pixels, int(random.integers(JPEG_QUALITY[0], JPEG_QUALITY[1], endpoint=True)))
