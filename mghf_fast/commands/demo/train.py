"""Training, with the same loop, batches and schedule for every objective."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..memory import PeakMemory
from ..pixels import Pixels, luminance
from .degradation import degrade
from .metrics import Judge, Quality, measure
from .objectives import Objective
from .photographs import Photograph
from .settings import SCALE, DemoError, random_source

MARGIN = 16
"""Ground-truth pixels around a crop that are degraded with it and then cut off, so that the crop
has no border effects."""

CROP = 192
"""Side in pixels of the crop shown of a held-out photograph; smaller for smaller photographs."""


def to_tensor(pixels: Pixels) -> Tensor:
    """``(H, W, 3)`` in 0 to 255 -> ``(1, 3, H, W)`` in [0, 1]."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 255


def to_pixels(image: Tensor) -> Pixels:
    """The inverse of :func:`to_tensor`, rounded and clipped to 8 bits."""
    levels = (image[0].clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 0).numpy())


def batches(
    photographs: list[Photograph], batch: int, patch: int, random: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random crops, flipped and rotated, each degraded in its own way.

    Yields:
        ``lr (batch, 3, patch / 4, patch / 4)`` and ``gt (batch, 3, patch, patch)``, 0 to 1.
    """
    framed = [
        np.pad(p.pixels, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="reflect")
        for p in photographs
    ]
    window = patch + 2 * MARGIN
    while True:
        lows, highs = [], []
        for _ in range(batch):
            pixels = framed[random.integers(len(framed))]
            top, left = (int(random.integers(side - window + 1)) for side in pixels.shape[:2])
            crop = pixels[top : top + window, left : left + window]
            crop = np.rot90(crop, int(random.integers(4)))
            if random.random() < 0.5:
                crop = crop[:, ::-1]
            crop = np.ascontiguousarray(crop)
            margin = MARGIN // SCALE
            low = np.ascontiguousarray(degrade(crop, random)[margin:-margin, margin:-margin])
            lows.append(to_tensor(low))
            highs.append(to_tensor(np.ascontiguousarray(crop[MARGIN:-MARGIN, MARGIN:-MARGIN])))
        yield torch.cat(lows), torch.cat(highs)


def busiest_window(gt: Pixels, side: int = CROP) -> tuple[int, int]:
    """Top and left of the window with the largest sum of gradient magnitudes.

    It uses only the ground truth, so that no method's result influences what is shown.
    """
    dy, dx = np.gradient(luminance(gt))
    sums = np.pad(np.hypot(dy, dx).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    window = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(np.argmax(window), window.shape)
    return int(top), int(left)


@dataclass(frozen=True)
class HeldOut:
    """A held-out photograph with its degraded version and the position of the crop to show."""

    name: str
    gt: Pixels
    lr: Pixels
    top: int
    left: int
    side: int

    def window(self, picture: Pixels) -> Pixels:
        """The crop to show, ``(side, side, 3)``, of a picture of this photograph's size."""
        return picture[self.top : self.top + self.side, self.left : self.left + self.side]


def hold_out(photographs: list[Photograph], seed: int) -> list[HeldOut]:
    """Degrades each photograph in a way that depends on ``seed`` and its name.

    The crops to show have one size, ``CROP`` or the shortest side of any photograph.
    """
    side = min([CROP, *(min(p.pixels.shape[:2]) for p in photographs)])
    return [
        HeldOut(
            p.name,
            p.pixels,
            degrade(p.pixels, random_source(seed, "held out", p.name)),
            *busiest_window(p.pixels, side),
            side,
        )
        for p in photographs
    ]


@torch.no_grad()
def super_resolve(network: Callable[[Tensor], Tensor], lr: Pixels) -> Pixels:
    """Enlarges one picture by 4."""
    return to_pixels(network(to_tensor(lr)))


@dataclass
class Training:
    """The record of one training; only seconds and bytes differ from run to run."""

    label: str
    terms: dict[str, list[float]] = field(default_factory=dict)
    """Every loss term at every step."""
    checkpoints: list[int] = field(default_factory=list)
    """Number of steps done at each measurement of the held-out photographs."""
    quality: list[Quality] = field(default_factory=list)
    """Mean over the held-out photographs at each checkpoint."""
    held_out_terms: dict[str, list[float]] = field(default_factory=dict)
    """Every term of ``probe`` on the held-out crops at each checkpoint, and the ``judge``'s
    distance as ``"stlpips"``."""
    step_seconds: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)
    memory_bytes: int | None = None

    @property
    def median_step_seconds(self) -> float:
        return statistics.median(self.step_seconds)

    @property
    def loss_share(self) -> float:
        """Share of the step spent in the objective and its gradient to the SR image, 0 to 1."""
        pairs = zip(self.loss_seconds, self.step_seconds, strict=True)
        return statistics.median(loss / step for loss, step in pairs)


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Cosine from ``peak`` to a twentieth of it, after a short linear warm-up."""
    warm_up = min(1.0, (step + 1) / max(1, min(20, steps // 10)))
    return peak * warm_up * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _short(terms: dict[str, float]) -> dict[str, str]:
    names = ("l1", "naive", "csc", "lip")
    return {name: f"{terms[name]:.3f}" for name in names if name in terms}


def train(
    network: nn.Module,
    data: Iterator[tuple[Tensor, Tensor]],
    objective: Objective,
    *,
    label: str,
    steps: int,
    learning_rate: float,
    held_out: Sequence[HeldOut] = (),
    probe: Objective | None = None,
    checkpoints: int = 0,
    judge: Judge | None = None,
) -> Training:
    """Trains ``network`` in place with Adam.

    Args:
        data: yields ``(lr, gt)`` batches.
        objective: see :mod:`mghf_fast.commands.demo.objectives`.
        label: name for the progress bar and the report.
        held_out: photographs measured before the first step and ``checkpoints`` times after it.
        probe: an objective that is measured then too, on their crops.
        judge: perceptual distance measured on the same crops (on whole photographs it would take
            longer than the training).

    Raises:
        DemoError: the loss is no longer finite.
    """
    record = Training(label)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    measure_at = {round(steps * (i + 1) / checkpoints) for i in range(checkpoints)}
    terminal = sys.stderr.isatty()
    report_at = {math.ceil(steps * (i + 1) / 4) for i in range(4)}

    def check(done: int) -> None:
        if not held_out:
            return
        pictures = [super_resolve(network, h.lr) for h in held_out]
        qualities = [measure(p, h.gt) for p, h in zip(pictures, held_out, strict=True)]
        record.checkpoints.append(done)
        record.quality.append(Quality.mean(qualities))
        if judge is not None:
            crops = [(h.window(p), h.window(h.gt)) for p, h in zip(pictures, held_out, strict=True)]
            distance = statistics.fmean(judge(sr, gt) for sr, gt in crops)
            record.held_out_terms.setdefault("stlpips", []).append(distance)
        if probe is not None:
            shown = zip(pictures, held_out, strict=True)
            sr = torch.cat([to_tensor(h.window(p)) for p, h in shown])
            gt = torch.cat([to_tensor(h.window(h.gt)) for h in held_out])
            with torch.no_grad():
                terms = probe(sr, gt)
            for name, term in terms.items():
                record.held_out_terms.setdefault(name, []).append(float(term))

    check(0)
    with (
        PeakMemory() as memory,
        tqdm(total=steps, desc=f"{label:<12}", disable=not terminal, dynamic_ncols=True) as bar,
    ):
        for step in range(steps):
            lr, gt = next(data)
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, steps, learning_rate)

            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            sr = network(lr)
            # A leaf between network and loss splits the backward pass, so that the loss can be
            # timed separately; the gradients are the same.
            leaf = sr.detach().requires_grad_()
            loss_start = time.perf_counter()
            terms = objective(leaf, gt)
            torch.autograd.backward(terms["total"])
            loss_seconds = time.perf_counter() - loss_start
            torch.autograd.backward(sr, leaf.grad)
            optimizer.step()
            record.step_seconds.append(time.perf_counter() - start)
            record.loss_seconds.append(loss_seconds)

            values = {name: float(term.detach()) for name, term in terms.items()}
            for name, value in values.items():
                record.terms.setdefault(name, []).append(value)
            if not math.isfinite(values["total"]):
                raise DemoError(f"{label}: the loss is {values['total']} at step {step + 1}")
            bar.set_postfix(_short(values), refresh=False)
            bar.update()
            done = step + 1
            if not terminal and done in report_at:
                shown = "  ".join(f"{k} {v}" for k, v in _short(values).items())
                print(f"{label:<12} step {done:>4}/{steps}  {shown}", file=sys.stderr, flush=True)
            if done in measure_at:
                with memory.paused():
                    check(done)
    record.memory_bytes = memory.rise
    return record
