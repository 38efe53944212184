"""The minimiser test: in some features, which picture is nearest to several possible truths?

    python -m benchmarks.studies.minimiser --images photographs/ --features curved my.safetensors

A low resolution determines the truth except for its detail. Here eight candidates y_k are one crop
under sub-pixel shifts, and

    x* = argmin_x sum_k |F(x) - F(y_k)|^2,

found by L-BFGS from the candidates' mean, is what a network would learn to output. For a linear F
it is the mean, a blurred picture. The result, for shifts of up to 1 and up to 4 pixels either way
and crops of 64 and 96 pixels, consists of means over the crops of:

    hf energy   of x* above 0.125 cycles a pixel (what a picture four times smaller cannot carry),
                relative to the candidates' own: 1 is as sharp as they are
    psnr        of x* to the nearest candidate, dB (colour, of the full range)
    curvature   |F(mean) - mean F|^2 / variance of F(y_k): 0 for a linear F

From Python: ``measure(features, images, width)`` with any ``features(image of -1 to 1)`` that gives
a tensor or a list of them (each counts by its mean square), and ``images`` from
``crops(folder, side)``.
Features by name are those of :mod:`benchmarks.studies.extractors`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mghf_fast.commands.demo.metrics import BAND
from mghf_fast.commands.demo.photographs import load
from mghf_fast.commands.demo.train import busiest_window
from mghf_fast.commands.pixels import Pixels
from mghf_fast.commands.rasters import SUFFIXES

from . import extractors
from .extractors import Features

WIDTHS, SIDES = (1.0, 4.0), (64, 96)
CANDIDATES, CROPS, ITERATIONS = 8, 4, 60
MARGIN = 16
"""Pixels around a crop that are shifted with it and then cut off."""


def crops(folder: Path, side: int, count: int = CROPS) -> Tensor:
    """The most detailed window, with its margin, of each of ``count`` pictures spread over
    ``folder``: (count, 3, side + 2 MARGIN, side + 2 MARGIN) of -1 to 1."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    window, found = side + 2 * MARGIN, list[Pixels]()
    places = dict.fromkeys(int(i) for i in np.linspace(0, len(files) - 1, 3 * count))
    for place in places if files else ():
        try:
            pixels = load(files[place])
        except ValueError:
            continue
        if min(pixels.shape[:2]) >= window:
            top, left = busiest_window(pixels, window)
            found.append(pixels[top : top + window, left : left + window])
    if not found:
        raise ValueError(f"--images {folder}: no picture of at least {window} pixels a side")
    chosen = [found[int(i)] for i in np.linspace(0, len(found) - 1, min(count, len(found)))]
    images = torch.from_numpy(np.stack(chosen).astype(np.float32)).permute(0, 3, 1, 2)
    return images.contiguous() / 127.5 - 1


def shifted(images: Tensor, offset: Sequence[float]) -> Tensor:
    """The images shifted exactly by a fraction of a pixel: by a phase in the spectrum of their
    mirrored continuation, which has no jump at the border. (B, 3, H, W) -> the same."""
    height, width = images.shape[2:]
    mirrored = torch.cat([images, images.flip(2)], 2)
    mirrored = torch.cat([mirrored, mirrored.flip(3)], 3).double()
    spectrum = torch.fft.fft2(mirrored)
    turn = (
        torch.fft.fftfreq(2 * height, dtype=torch.float64)[:, None] * offset[0]
        + torch.fft.fftfreq(2 * width, dtype=torch.float64)[None] * offset[1]
    )
    moved = torch.fft.ifft2(spectrum * torch.exp(-2j * torch.pi * turn)).real
    return moved[..., :height, :width].to(images.dtype)


def candidates(images: Tensor, width: float, count: int = CANDIDATES, seed: int = 0) -> Tensor:
    """(K, B, 3, side, side): each crop under ``count`` shifts drawn within +- ``width`` pixels."""
    offsets = np.random.default_rng(seed).uniform(-width, width, (count, 2))
    moved = torch.stack([shifted(images, offset) for offset in offsets.tolist()])
    return moved[..., MARGIN:-MARGIN, MARGIN:-MARGIN].contiguous()


def _list(found: Tensor | list[Tensor]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _per_crop(squares: list[Tensor]) -> Tensor:
    """(B,): the mean of each layer's squares, summed over the layers."""
    return torch.stack([s.flatten(1).mean(1) for s in squares]).sum(0)


def hf_energy(images: Tensor) -> Tensor:
    """Energy of the luminance above the band's edge under a Hann window, (B,)."""
    weights = images.new_tensor([0.299, 0.587, 0.114]).double().view(3, 1, 1)
    plane = (images.double() * weights).sum(1)
    height, width = plane.shape[1:]
    window = torch.outer(
        torch.hann_window(height, periodic=False, dtype=torch.float64),
        torch.hann_window(width, periodic=False, dtype=torch.float64),
    )
    spectrum = torch.fft.fft2((plane - plane.mean((1, 2), keepdim=True)) * window)
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
    return spectrum.abs().square()[:, radius >= BAND].sum(1)


def minimise(features: Features, y: Tensor, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """x* of the candidates (K, B, 3, H, W), and the curvature at their mean, (B,).

    sum_k |F(x) - F(y_k)|^2 is K |F(x) - mean F|^2 plus a constant, so only the mean is needed.
    """
    with torch.no_grad():
        each = [_list(features(k)) for k in y]
        mean = [torch.stack(layer).mean(0) for layer in zip(*each, strict=True)]
        spread = torch.stack(
            [_per_crop([(f - m).square() for f, m in zip(k, mean, strict=True)]) for k in each]
        ).mean(0)
    x = y.mean(0).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=iterations, max_eval=2 * iterations, history_size=20,
        tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def distance() -> Tensor:
        found = _list(features(x))
        return _per_crop([(f - m).square() for f, m in zip(found, mean, strict=True)]) / spread

    def closure() -> Tensor:
        optimizer.zero_grad()
        # Scaled so that each pixel's share is of order one, as the search's first step expects.
        loss = distance().sum() * x[0].numel()
        torch.autograd.backward(loss)
        return loss

    with torch.no_grad():
        curvature = distance()
    optimizer.step(closure)
    return x.detach(), curvature


def measure(
    features: Features, images: Tensor, width: float, iterations: int = ITERATIONS
) -> dict[str, float]:
    """``hf_energy``, ``psnr`` and ``curvature`` of features, means over the crops of ``images``
    (with their margins, from :func:`crops`), for shifts within +- ``width`` pixels."""
    y = candidates(images, width)
    best, curvature = minimise(features, y, iterations)
    energy = torch.stack([hf_energy(k) for k in y]).mean(0)
    mse = ((best - y) / 2).square().flatten(2).mean(2).amin(0)
    return {
        "hf_energy": float((hf_energy(best) / energy).mean()),
        "psnr": float((-10 * torch.log10(mse.clamp_min(1e-12))).mean()),
        "curvature": float(curvature.mean()),
    }


def table(
    names: Sequence[str],
    folder: Path,
    *,
    sides: Sequence[int] = SIDES,
    widths: Sequence[float] = WIDTHS,
    count: int = CROPS,
    iterations: int = ITERATIONS,
) -> list[dict[str, Any]]:
    """A row for each features' name, crop side and width of the shifts, printed when it is done."""
    rows: list[dict[str, Any]] = []
    print("features                          side  shift  hf energy    psnr  curvature  seconds")
    for name in names:
        module = extractors.load(name)
        for side in sides:
            images = crops(folder, side, count)
            for width in widths:
                began = time.perf_counter()
                row = {"features": extractors.label(name), "side": side, "shift": width}
                row |= measure(module, images, width, iterations)
                row["seconds"] = round(time.perf_counter() - began, 2)
                rows.append(row)
                print(
                    f"{row['features']:<32}  {side:>4}  {width:>5g}  {row['hf_energy']:>9.3f}  "
                    f"{row['psnr']:>6.2f}  {row['curvature']:>9.4f}  {row['seconds']:>7.1f}",
                    flush=True,
                )
    return rows


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.minimiser",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--features", nargs="+", required=True, metavar="NAME_OR_FILE")
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES), metavar="PIXELS")
    parser.add_argument("--widths", type=float, nargs="+", default=list(WIDTHS), metavar="PIXELS")
    parser.add_argument("--crops", type=int, default=CROPS)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows, too")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    try:
        rows = table(
            args.features,
            args.images,
            sides=args.sides,
            widths=args.widths,
            count=args.crops,
            iterations=args.iterations,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
