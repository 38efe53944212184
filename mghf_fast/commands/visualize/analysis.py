"""Computes what is shown: one picture's features, entropies and weights; for two pictures also the
terms of the loss, their shares and the transport plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import functional
from ...losses import MGHFLoss
from ...losses.mghf import Preset, downscale_of
from ...nn import DetailFeatureExtractor, PatchProjection
from ...ops.content_style import importance_weights
from . import shares

PATCH = 32


@dataclass(frozen=True)
class Link:
    """Mass that the plan moves from patch ``query`` of the second picture to patch ``key`` of the
    first, as a multiple of a uniform plan's."""

    query: int
    key: int
    strength: float


@dataclass(frozen=True)
class Comparison:
    """The comparison of two pictures by the loss.

    Attributes:
        terms: MGHF-c's total and its unweighted terms, those with a weight in the preset, by the
            names of ``MGHFLoss.terms``.
        weighted: the terms' contributions to the total, whose sum it is.
        shares: term, or ``total``, -> (H, W), whose mean over pixels is the term (``total``:
            weighted). With features at 1/r of the resolution, it is constant on r x r pixels.
        gradient: length of the total's gradient in the second picture's pixels, (H, W).
        corners: top and left of every patch, image pixels.
        links: the strongest links, strongest first; none if there is a single patch.
    """

    terms: dict[str, float]
    weighted: dict[str, float]
    shares: dict[str, Tensor]
    gradient: Tensor
    corners: list[tuple[int, int]]
    links: list[Link]


@dataclass(frozen=True)
class Analysis:
    """The analysis of one picture, or of two.

    Attributes:
        features: each picture's features, (C, H, W), or (C, H / r, W / r) with a squeeze stem.
        entropy: normalised channel entropies of each picture, (C,), 0 to 1.
        order: indices of the maps, most important first, (C,).
        weights: w of the maps in that order, (C,); the loss uses the first ``kept``.
        kept: M, the number of maps that the loss keeps.
    """

    features: list[Tensor]
    entropy: list[Tensor]
    order: Tensor
    weights: Tensor
    kept: int
    comparison: Comparison | None = None


def make_loss(extractor: DetailFeatureExtractor | None, preset: str) -> MGHFLoss:
    """MGHF-c for images in [0, 1], with one value per image.

    Raises:
        ValueError: an unknown preset, or an extractor for other than three channels.
    """
    if extractor is not None and extractor.in_channels != 3:
        raise ValueError(
            f"the extractor takes {extractor.in_channels} channels; pictures have 3 (one for "
            "latents cannot be shown)"
        )
    return MGHFLoss("c", preset, extractor, reduction="none", input_range="0,1")


@torch.no_grad()
def _features(loss: MGHFLoss, image: Tensor) -> Tensor:
    """(3, H, W) in [0, 1] -> the loss's features, (C, H, W)."""
    assert isinstance(loss.extractor, DetailFeatureExtractor)  # make_loss allows no other
    features = loss.extractor(2 * image[None] - 1, backend=loss.backend)[0]
    broken = int((~torch.isfinite(features)).flatten(1).any(1).sum())
    if broken:
        raise ValueError(
            f"the extractor's features are not finite numbers in {broken} of {len(features)} maps; "
            "its weights are broken or far too large"
        )
    return features


def analyse(loss: MGHFLoss, images: list[Tensor], links: int = 30) -> Analysis:
    """Analyses one picture, or compares two.

    Args:
        loss: from :func:`make_loss`.
        images: (3, H, W) in [0, 1]: the ground truth, and optionally a super-resolved version.
        links: maximum number of the plan's links to keep.

    Raises:
        ValueError: features that are not finite; two pictures smaller than a patch.
    """
    if len(images) == 2 and min(images[0].shape[1:]) < PATCH:
        height, width = images[0].shape[1:]
        raise ValueError(
            f"two pictures are compared patch by patch: at least {PATCH} pixels a side are "
            f"needed, got {width} x {height} (one picture alone can be smaller)"
        )
    features = [_features(loss, image) for image in images]
    entropy = [functional.channel_entropy(f[None], loss.content_style.bins)[0] for f in features]
    gt, sr = features[0][None], features[-1][None]
    channels = len(features[0])
    style = loss.content_style
    # For all maps; the loss uses only the first M.
    order, weights = importance_weights(gt, sr, channels, style.alpha, style.gamma, style.bins)
    kept = style.top_m or max(channels // 2, 1)
    found = Analysis(features, entropy, order[0], weights[0].float(), kept)
    if len(images) == 1:
        return found
    comparison = _compare(loss, images, found, links)
    return Analysis(features, entropy, order[0], found.weights, kept, comparison)


def contributions(terms: dict[str, float], preset: Preset) -> dict[str, float]:
    """Each term's contribution to the total."""
    factors = preset.factors()
    return {name: factor * terms[name] for name, factor in factors.items() if name in terms}


def _compare(loss: MGHFLoss, images: list[Tensor], found: Analysis, links: int) -> Comparison:
    gt, sr = images[0][None], images[1][None].clone().requires_grad_()
    terms = loss.terms(sr, gt)
    (gradient,) = torch.autograd.grad(terms["total"].sum(), sr)
    values = {name: float(term.detach()) for name, term in terms.items()}
    if not all(map(math.isfinite, values.values())):
        broken = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        raise ValueError(f"the loss of these pictures is not a finite number: {broken}")
    weighted = contributions(values, loss.preset)

    height, width = images[0].shape[1:]
    kept, weights = found.order[: found.kept], found.weights[: found.kept]
    (g, s), (kept_g, kept_s) = found.features, (f[kept] for f in found.features)
    squeeze = downscale_of(loss.extractor)
    stride = loss.local_information.stride
    sizes = (*g.shape[1:], PATCH // squeeze, stride // squeeze)
    parts = {
        "naive": shares.naive(g, s),
        "csc_mse": shares.mse(kept_g, kept_s, weights),
        "csc_correlation": shares.correlation(kept_g, kept_s),
        "csc_gram": shares.gram(kept_g, kept_s, weights),
    }
    corners: list[tuple[int, int]] = []
    strongest: list[Link] = []
    if "lip" in values:
        patch_losses, plan = _patches(loss, g, s)
        parts["lip"] = shares.lip(patch_losses, *sizes)
        corners = [(squeeze * y, squeeze * x) for y, x in shares.patch_corners(*sizes)]
        strongest = strongest_links(plan, links)
    parts = {
        name: shares.enlarged(part, squeeze, height, width)
        for name, part in parts.items()
        if name in values
    }
    factors = loss.preset.factors()
    total = sum((factors[name] * part for name, part in parts.items()), torch.zeros(height, width))
    parts["total"] = total
    magnitude = shares.gradient_magnitude(gradient[0])
    return Comparison(values, weighted, parts, magnitude, corners, strongest)


@torch.no_grad()
def _patches(loss: MGHFLoss, gt: Tensor, sr: Tensor) -> tuple[Tensor, Tensor]:
    """The patches' losses, (N,), and plans, (N, N), each averaged over the maps."""
    local = loss.local_information
    projection = local.projections[str(PATCH)]
    assert isinstance(projection, PatchProjection)
    losses: list[Tensor] = []
    plans: list[Tensor] = []
    for g, s in zip(gt.split(16), sr.split(16), strict=True):  # plans of 16 maps at a time
        query, key = projection(s[None]), projection(g[None])
        losses.append(
            functional.monce_loss(
                query,
                key,
                temperature=local.temperature,
                epsilon=local.epsilon,
                iterations=local.iterations,
                negative_weight=local.negative_weight,
                cost=local.cost,
                reduction="none",
            ).sum(0)
        )
        plan = functional.sinkhorn_plan(
            query @ key.mT, cost=local.cost, epsilon=local.epsilon, iterations=local.iterations
        )
        plans.append(plan.sum(0))
    return torch.stack(losses).sum(0) / len(gt), torch.stack(plans).sum(0) / len(gt)


def strongest_links(plan: Tensor, count: int) -> list[Link]:
    """The ``count`` strongest of the queries' strongest links, strongest first.

    Args:
        plan: (N, N), rows are queries.
    """
    n = len(plan)
    if n < 2:
        return []
    mass, key = plan.max(1)
    queries = mass.sort(descending=True, stable=True)[1][:count]
    even = 1 / (n - 1)
    return [Link(int(q), int(key[q]), float(mass[q]) / even) for q in queries]
