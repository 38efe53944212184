"""PSNR and SSIM, and shift-tolerant LPIPS as the judge, for 8-bit RGB pictures.

The papers' convention uses the luma Y of BT.601 in 16 to 235, as Matlab's ``rgb2ycbcr`` gives it,
not rounded, but 255 as its range. The same error then has 1.3 dB more than on luminance in 0 to
255, so the full-range measures have separate names.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from skimage.metrics import structural_similarity

from ..pixels import Pixels, luma, luminance

Judge = Callable[[Pixels, Pixels], float]

EQUAL = 100.0
"""PSNR of equal pictures and maximum of all, dB, so that means and tables stay finite."""
SSIM_SIGMA = 1.5
SSIM_WINDOW = 11
"""Side of SSIM's window, and so the minimum side of a picture, pixels."""


def check_pair(sr: Pixels, gt: Pixels) -> None:
    """Requires two pictures ``(H, W, 3)`` of uint8 and of one size.

    Raises:
        ValueError: another shape or dtype, or different sizes.
    """
    for name, picture in (("sr", sr), ("gt", gt)):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(
                f"{name} must be (H, W, 3) of uint8, got {picture.shape} of {picture.dtype}"
            )
    if sr.shape != gt.shape:
        raise ValueError(f"sr is {sr.shape} and gt is {gt.shape}; they must be of one size")


def without_border(picture: Pixels, border: int) -> Pixels:
    """The picture without ``border`` pixels on each side."""
    return picture[border : picture.shape[0] - border, border : picture.shape[1] - border]


def _psnr(sr: npt.NDArray[np.float64], gt: npt.NDArray[np.float64]) -> float:
    """10 log10(255^2 / MSE), dB, at most ``EQUAL``."""
    mse = float(np.mean((sr - gt) ** 2))
    return -10 * math.log10(max(mse / 255**2, 10 ** (-EQUAL / 10)))


def _ssim(sr: npt.NDArray[np.float64], gt: npt.NDArray[np.float64]) -> float:
    if min(gt.shape[:2]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM's window needs sides of at least {SSIM_WINDOW} pixels, got {gt.shape[:2]}"
        )
    return float(
        structural_similarity(
            gt,
            sr,
            gaussian_weights=True,
            sigma=SSIM_SIGMA,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=2 if gt.ndim == 3 else None,
        )
    )


def psnr_y(sr: Pixels, gt: Pixels) -> float:
    """PSNR in the papers' convention, dB, on :func:`luma`. Arrays ``(H, W, 3)`` of uint8.

    Raises:
        ValueError: another shape or dtype, or different sizes.
    """
    check_pair(sr, gt)
    return _psnr(luma(sr), luma(gt))


def ssim_y(sr: Pixels, gt: Pixels) -> float:
    """SSIM in the papers' convention: on :func:`luma`, Gaussian window of 11 pixels and sigma 1.5,
    K1 0.01, K2 0.03, range 255, mean over the pixels whose window is inside the picture.

    Raises:
        ValueError: as :func:`psnr_y`; or a side is below 11 pixels.
    """
    check_pair(sr, gt)
    return _ssim(luma(sr), luma(gt))


def psnr_y_full(sr: Pixels, gt: Pixels) -> float:
    """PSNR of the luminance in full range, dB; otherwise as :func:`psnr_y`."""
    check_pair(sr, gt)
    return _psnr(luminance(sr) * 255, luminance(gt) * 255)


def psnr_rgb(sr: Pixels, gt: Pixels) -> float:
    """PSNR over the three channels together, dB; otherwise as :func:`psnr_y`."""
    check_pair(sr, gt)
    return _psnr(sr.astype(np.float64), gt.astype(np.float64))


def ssim_rgb(sr: Pixels, gt: Pixels) -> float:
    """Mean of the three channels' SSIM; otherwise as :func:`ssim_y`."""
    check_pair(sr, gt)
    return _ssim(sr.astype(np.float64), gt.astype(np.float64))


def judge(net: str = "alex") -> Judge | None:
    """Shift-tolerant LPIPS as a function of two pictures, or None without its package.

    Args:
        net: ``"alex"`` (the judge of this project's studies) or ``"vgg"``.

    Returns:
        ``f(sr, gt)`` for ``(H, W, 3)`` uint8 arrays with sides of at least 48 pixels; 0 for equal
        ones, lower is more similar. It raises ValueError for others.
    """
    import torch
    from torch import Tensor

    from .stlpips import ShiftTolerantLPIPS, unavailable_reason

    if unavailable_reason() is not None:
        return None
    distance = ShiftTolerantLPIPS(net).eval()

    def image(pixels: Pixels) -> Tensor:
        return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]

    def of_pair(sr: Pixels, gt: Pixels) -> float:
        check_pair(sr, gt)
        with torch.no_grad():
            return float(distance(image(sr), image(gt)))

    return of_pair
