"""Comparison at equal PSNR, with intervals over seeds and pictures.

An objective has three networks per seed: L1's, and two on the way to its own that lose more and
more PSNR. Their mean qualities over the pictures form a curve. It is read at L1's PSNR minus a
target, by piecewise linear interpolation, and extrapolation to at most ``STRETCH`` times its
length. A curve that does not reach the target gives its end, and is reported as not reached. *As
chosen* are the two networks as they are, whatever PSNR they have. Differences are paired: same
seed, same pictures. The interval is the middle 95 % of ``RESAMPLES`` bootstrap samples of seeds and
pictures, for each of which the whole computation is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

STRETCH = 1.2
RESAMPLES = 2000
BETTER, EVEN, WORSE = "better", "even", "worse"


class Curves(NamedTuple):
    """PSNR and a distance of an objective's networks: (seeds, 3, pictures) each, L1's first."""

    psnr: Array
    distance: Array


def at_loss(psnr: Array, distance: Array, target: float) -> tuple[Array, Array]:
    """The distance where a curve has lost ``target`` dB, and whether it gets there.

    Args:
        psnr, distance: (..., 3), means over pictures, L1's first.

    Returns:
        (...) and (...) of 0 or 1.
    """
    lost = psnr[..., :1] - psnr
    first, last = lost[..., 1], lost[..., 2]
    reached = (last > 0) & (STRETCH * last >= target)
    start, middle, end = (distance[..., i] for i in range(3))
    early = (target <= first) & (first > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        before = start + (middle - start) * target / first
        after = middle + (end - middle) * (target - first) / (last - first)
        whole = start + (end - start) * target / last
    after = np.where(last - first > 1e-3, after, whole)  # both networks are the same
    found = np.where(reached, np.where(early, before, after), end)
    return found, reached.astype(np.float64)


class Difference(NamedTuple):
    """Mean of paired differences (negative: nearer to the truth) and its 95 % interval."""

    mean: float
    low: float
    high: float
    reached: float
    """Share of the seeds in which both come to the target's PSNR; 1 as chosen."""
    psnr: float
    """The difference in PSNR, dB: 0 at equal PSNR, and the target against L1."""

    def outcome(self) -> str:
        """Which of the two is nearer to the truth; a smaller distance is better."""
        if self.high < 0:
            return BETTER
        return WORSE if self.low > 0 else EVEN


def _means(values: Array, counts: Array) -> Array:
    """(seeds, 3, pictures), (draws, pictures) -> (draws, seeds, 3)."""
    weights = counts / counts.sum(1, keepdims=True)
    means: Array = np.einsum("dp,stp->dst", weights, values)
    return means


def difference(
    ours: Curves,
    theirs: Curves | None,
    target: float,
    *,
    chosen: int | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """``ours`` minus ``theirs``, or minus L1 itself for None, at L1's PSNR minus ``target``.

    With ``chosen``, 1 or 2, the difference of the networks at that place as they are.

    Raises:
        ValueError: the two have different seeds or pictures.
    """
    if theirs is not None and theirs.psnr.shape != ours.psnr.shape:
        raise ValueError(
            f"theirs has the shape {theirs.psnr.shape}, ours {ours.psnr.shape}: they are not paired"
        )
    seeds, _, pictures = ours.psnr.shape
    random = np.random.default_rng(seed)
    draws = random.multinomial(pictures, np.full(pictures, 1 / pictures), resamples)
    counts = np.concatenate(
        [np.ones((1, pictures)), draws.astype(np.float64)]
    )  # the figure itself comes first

    def points(curves: Curves, distance: Array) -> tuple[Array, Array]:
        means = _means(distance, counts)
        if chosen is not None:
            return means[..., chosen], np.ones(means.shape[:2])
        return at_loss(_means(curves.psnr, counts), means, target)

    found, reached = points(ours, ours.distance)
    # The curve of PSNR over PSNR gives the PSNR at which the comparison is really made.
    fidelity = points(ours, ours.psnr)[0][0]
    if theirs is None:
        other, both = _means(ours.distance, counts)[..., 0], reached
        fidelity = fidelity - ours.psnr[:, 0].mean(1)
    else:
        other, there = points(theirs, theirs.distance)
        both = reached * there
        fidelity = fidelity - points(theirs, theirs.psnr)[0][0]
    each = found - other  # (1 + draws, seeds)
    drawn = random.integers(seeds, size=(resamples, seeds))
    bootstrap = np.take_along_axis(each[1:], drawn, 1).mean(1)
    low, high = np.quantile(bootstrap, (0.025, 0.975))
    return Difference(
        float(each[0].mean()),
        float(low),
        float(high),
        float(both[0].mean()),
        float(fidelity.mean()),
    )


def curves(
    found: dict[str, dict[str, Any]],
    sets: Sequence[str],
    name: str,
    seeds: Sequence[int],
    targets: Sequence[float],
    metric: str,
    base: str = "l1",
) -> Curves:
    """An objective's curves from the test's record, the pictures pooled.

    Args:
        found: ``found[set][picture][network][metric]``.
    """
    pictures = [row for each in sets for row in found[each].values()]

    def stack(key: str) -> Array:
        return np.array(
            [
                [
                    [row[network][key] for row in pictures]
                    for network in (
                        f"{base}|{seed}|",
                        *(f"{name}|{seed}|{target:g}" for target in targets),
                    )
                ]
                for seed in seeds
            ]
        )

    return Curves(stack("psnr"), stack(metric))
