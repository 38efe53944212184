"""How many Sinkhorn iterations the kernels make before a map counts as settled.

    python -m benchmarks.iterations
    python -m benchmarks.iterations --pictures DIR --epsilon 1 0.1 0.05 --sizes 256 512 --maps 16

Embeddings are the loss's own: photographs and their blurred copies, through the extractor that
ships and an untrained one. On them the kernels' iterations run in float32 with their order of sums,
without noise and with errors of 1.2e-7 and 2.4e-7 in every power and reciprocal, as a GPU's
approximate instructions have them. A line shows how many maps made how many iterations, by the
kernels' rule and by their previous one, and the distance of the plan from that of all 50 iterations
in float64. "scaling" is the arithmetic of CUDA and the CPU, "powers" that of Triton.
"""

from __future__ import annotations

import argparse
import collections
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mghf_fast import MGHFLoss
from mghf_fast.commands.demo import photographs
from mghf_fast.commands.demo.settings import DemoError

Array = npt.NDArray[Any]
Spreads = npt.NDArray[np.float64]

ITERATIONS = 50
SIZES = (64, 128, 256, 512, 1024)
"""Sides of the pictures in pixels: 4, 25, 100, 441 and 1764 patches."""
MAPS = {64: 128, 128: 128, 256: 32, 512: 8, 1024: 2}
EXTRACTORS = ("perceptual-v1", "random")
NOISES = (0.0, 1.2e-7, 2.4e-7)


# ---- the rules ----

# Twins: csrc/common/sinkhorn_settling.h, kernels/sinkhorn_potentials.py.
CLEAN, FASTEST, REST = 1e-5, 0.05, 1e-6


def settled(spreads: Sequence[float]) -> int:
    """The number of iterations after which the kernels stop. ``spreads`` are the differences
    between the largest and the smallest relative change of v (or g) in each iteration.

    The changes that are still to come add up to rate / (1 - rate) times the last one. Where the
    last one may be rounding, it is assumed to have fallen at the rate seen last."""
    previous = rest = rate = 1.0
    for t, spread in enumerate(spreads, 1):
        if previous > CLEAN:
            rate, rest = max(spread / previous, FASTEST), spread
        else:
            rest *= rate
        previous = spread
        if t > 1 and rate * rest <= REST * (1 - rate):
            return t
    return len(spreads)


def settled_before(spreads: Sequence[float], rounding: float) -> int:
    """The same by the previous rule: a spread of at most ``rounding``, and at most half of the one
    before."""
    previous = 0.0
    for t, spread in enumerate(spreads, 1):
        if t > 1 and spread <= rounding and spread <= 0.5 * previous:
            return t
        previous = spread
    return len(spreads)


# ---- the arithmetic ----


def errors(of: Array, size: float) -> Array:
    """Relative errors of up to ``size``, equal for equal numbers, as an instruction's are."""
    if size == 0:
        return np.float32(1) + np.zeros_like(of)
    mixed = (of.view(np.uint32) * np.uint32(2654435761)) >> np.uint32(8)
    return (1 + size * ((mixed % np.uint32(1000)) / 500.0 - 1)).astype(np.float32)


def pairwise(x: Array, axis: int) -> Array:
    """The sum, halves added to halves."""
    x = np.moveaxis(x, axis, 0)
    while (n := x.shape[0]) > 1:
        left = x[: n // 2] + x[n // 2 : n // 2 * 2]
        x = left if n % 2 == 0 else np.concatenate([left, x[-1:]])
    return x[0]


def powers(scores: Array, noise: float, iterations: int) -> tuple[Spreads, Spreads]:
    """Triton's arithmetic: potentials as integers and rests of exponents of two, columns summed in
    blocks of rows. Returns the spreads of the changes of g, (maps, iterations), for the rule and
    for the previous one."""
    b, n, _ = scores.shape
    rows = max(1, 8192 // max(16, 1 << (n - 1).bit_length()))
    step = np.float32(math.log(2))
    whole = np.round(scores / step).astype(np.float32)
    part = ((scores - whole * step) / step).astype(np.float32)
    diagonal = np.eye(n, dtype=bool)
    whole_g, part_g = np.zeros((b, 1, n), np.float32), np.zeros((b, 1, n), np.float32)
    found = []
    for _ in range(iterations):
        integers = np.where(diagonal, np.float32(-1e30), whole + whole_g)
        exponents = np.maximum((integers - integers.max(2, keepdims=True)) + (part + part_g), -200)
        terms = np.where(diagonal, np.float32(0), np.exp2(exponents) * errors(exponents, noise))
        terms = terms * (1 / pairwise(terms, 2))[:, :, None]
        padded = np.pad(terms, ((0, 0), (0, -n % rows), (0, 0)))
        total = np.zeros((b, min(rows, padded.shape[1]), n), np.float32)
        for start in range(0, n, rows):
            total += padded[:, start : start + rows]
        sums = pairwise(total, 1)
        rests = part_g - (np.log2(sums) * errors(sums, noise))[:, None]
        rounded = np.round(rests)
        change = (rounded + (rests - rounded - part_g)).astype(np.float32)
        whole_g, part_g = whole_g + rounded, (rests - rounded).astype(np.float32)
        found.append(np.ptp(change, axis=(1, 2)))
    spreads = np.array(found, np.float64).T
    return spreads * math.log(2), spreads


def scaling(scores: Array, noise: float, iterations: int) -> tuple[Spreads, Spreads]:
    """The arithmetic of CUDA and the CPU: u and v with K; a lane has every 32nd column, a warp
    pairs of rows. Returns the spreads of the changes of v for the rule, and those of u for the
    previous one."""
    b, n, _ = scores.shape
    kernel = np.exp(scores - scores.max(2, keepdims=True)).astype(np.float32)
    kernel = kernel * errors(kernel, noise) * (1 - np.eye(n, dtype=np.float32))
    wide, high = -(-n // 32) * 32, -(-n // 16) * 16
    kernel = np.pad(kernel, ((0, 0), (0, high - n), (0, wide - n)))
    u: Array = np.ones((b, n), np.float32)
    v: Array = u
    of_v, of_u = [], []
    for _ in range(iterations):
        products = kernel * np.pad(v, ((0, 0), (0, wide - n)))[:, None]
        lanes = np.zeros((b, high, 32), np.float32)
        for word in range(0, wide, 32):
            lanes += products[:, :, word : word + 32]
        sums = pairwise(lanes, 2)[:, :n]
        of_u.append(np.ptp(u * sums, axis=1))
        u = 1 / sums * errors(sums, noise)
        products = kernel * np.pad(u, ((0, 0), (0, high - n)))[:, :, None]
        warps = np.zeros((b, 8, wide), np.float32)
        for r in range(high // 16):
            for row in range(2):
                warps += products[:, r * 16 + row : (r + 1) * 16 : 2]
        total = warps[:, 0]
        for warp in range(1, 8):
            total = total + warps[:, warp]
        total = total[:, :n]
        of_v.append(np.ptp(v * total, axis=1))
        v = 1 / total * errors(total, noise)
    return np.array(of_v, np.float64).T, np.array(of_u, np.float64).T


ARITHMETICS: dict[str, tuple[Callable[..., tuple[Spreads, Spreads]], float]] = {
    "powers": (powers, 1e-6),
    "scaling": (scaling, 5e-7),
}
"""Each arithmetic, and the largest spread that the previous rule took for rounding (Triton's in
powers of two)."""


def largest_rest(similarity: Tensor, epsilon: float, made: Sequence[int]) -> float:
    """The largest distance of log plan after so many iterations from that after all, in float64."""
    logs = similarity.double() / epsilon
    logs.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    g = torch.zeros(logs.shape[:2], dtype=torch.float64).unsqueeze(1)
    plans = {}
    for t in range(1, ITERATIONS + 1):
        f = -torch.logsumexp(logs + g, 2, keepdim=True)
        g = -torch.logsumexp(logs + f, 1, keepdim=True)
        for index, count in enumerate(made):
            if count == t:
                plans[index] = f[index], g[index]
    most = 0.0
    for index, (early_f, early_g) in plans.items():
        rest = (f[index] - early_f) + (g[index] - early_g)
        most = max(most, rest.fill_diagonal_(0).abs().max().item())
    return most


# ---- the embeddings ----


def pictures(folder: Path | None) -> list[Tensor]:
    """Photographs, (1, 3, H, W) in [0, 1]: those that come with scikit-image, or the folder's."""
    found = photographs.bundled() if folder is None else photographs.from_directory(folder, 0)
    return [
        torch.from_numpy(p.pixels.copy()).permute(2, 0, 1).unsqueeze(0) / 255
        for p in (*found.held_out, *found.training)
    ]


def fitted(picture: Tensor, size: int) -> Tensor:
    """The square in the middle, enlarged if it is smaller than ``size``."""
    height, width = picture.shape[2:]
    if min(height, width) < size:
        scale = size / min(height, width)
        sides = [max(size, round(side * scale)) for side in (height, width)]
        picture = F.interpolate(picture, sides, mode="bicubic", align_corners=False).clamp(0, 1)
        height, width = picture.shape[2:]
    top, left = (height - size) // 2, (width - size) // 2
    return picture[..., top : top + size, left : left + size]


def embeddings(loss: MGHFLoss, picture: Tensor, size: int, maps: int) -> tuple[Tensor, Tensor]:
    """The embeddings that MGHF-c contrasts, (maps, N, 64) each: queries of the picture reduced by 4
    and enlarged again, keys of the picture itself."""
    gt = fitted(picture, size)
    small = F.interpolate(gt, scale_factor=0.25, mode="bicubic", antialias=True)
    sr = F.interpolate(small, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    projected = []
    with torch.no_grad():
        for image in (sr, gt):  # one stack of features at a time: 512 MiB of 1024 x 1024 pixels
            features = loss._features(image)
            projected.append(loss.local_information._projection(features)(features))
            del features
    query, key = projected
    chosen = torch.linspace(0, query.shape[0] - 1, min(maps, query.shape[0])).long()
    return query[chosen], key[chosen]


# ---- the report ----


def histogram(counts: Sequence[int]) -> str:
    """ "3: 20, 4: 4": iterations, and how many maps made them."""
    return ", ".join(
        f"{made}: {maps}" for made, maps in sorted(collections.Counter(counts).items())
    )


def lines(
    query: Tensor, key: Tensor, epsilon: float, noises: Sequence[float] = NOISES
) -> Iterator[tuple[str, float, list[int], list[int], float]]:
    """Arithmetic, noise, the counts by the rule and the previous one, and the plan's distance."""
    similarity = query @ key.mT
    scores = (similarity / epsilon).numpy()
    for name, (iterate, rounding) in ARITHMETICS.items():
        for noise in noises:
            spreads, old_spreads = iterate(scores, noise, ITERATIONS)
            counts = [settled(row) for row in spreads]
            before = [settled_before(row, rounding) for row in old_spreads]
            yield name, noise, counts, before, largest_rest(similarity, epsilon, counts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.iterations")
    parser.add_argument("--pictures", type=Path, help="a folder; default: scikit-image's")
    parser.add_argument("--count", type=int, default=1, help="pictures of each size (default 1)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="sides in pixels")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 0.1, 0.05])
    parser.add_argument("--maps", type=int, help="of each picture, at most")
    options = parser.parse_args(arguments)
    for argument, values in (("sizes", options.sizes), ("epsilon", options.epsilon)):
        if min(values) <= 0:
            parser.error(f"argument --{argument}: {min(values)} is not above 0")
    if min(options.sizes) < 32:
        parser.error(f"argument --sizes: {min(options.sizes)} is below a patch's 32 pixels")
    for argument, value in (("count", options.count), ("maps", options.maps)):
        if value is not None and value < 1:
            parser.error(f"argument --{argument}: {value} is not at least 1")
    try:
        found = pictures(options.pictures)[: options.count]
    except DemoError as error:
        parser.error(str(error).replace("--images", "--pictures"))
    for extractor in EXTRACTORS:
        loss = MGHFLoss(extractor=extractor)
        for size in options.sizes:
            maps = options.maps or MAPS.get(size, 1)
            pairs = [embeddings(loss, picture, size, maps) for picture in found]
            query, key = (torch.cat(side) for side in zip(*pairs, strict=True))
            for epsilon in options.epsilon:
                print(f"{extractor}, N = {query.shape[1]}, {len(query)} maps, epsilon {epsilon:g}")
                for name, noise, counts, before, rest in lines(query, key, epsilon):
                    print(
                        f"  {name:7} noise {noise:7.1e}  {histogram(counts):24} "
                        f"before {histogram(before):24} log plan within {rest:.1e}",
                        flush=True,
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
