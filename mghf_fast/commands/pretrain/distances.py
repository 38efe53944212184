"""The extractor learns a teacher's distances: ``--objective distances``.

For pairs of a picture y and a distorted one x, with F the extractor's features divided by the root
of their channels, so that |F(x) - F(y)|^2 over pixels is MGHF-n, and f the teacher's times the root
of ``gain``:

* hint: |F(x) - F(y) - R (f(x) - f(y))|^2 divided by the teacher's distance, pair by pair. R maps
  the teacher's many channels to the extractor's few as isometrically as possible: it has
  orthonormal rows, and solves Procrustes' problem for a running average of the differences'
  cross-covariance. No gradient flows through it.
* distance: Huber loss of log |F(x) - F(y)|^2 - log |f(x) - f(y)|^2.
* the penalties of :mod:`.guards`.
* blur aversion, optional: softplus(log d(a, b) - log d(mean, b)) for candidates a, b of one
  picture, so that another sharp candidate is nearer than the blurred mean.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn import DetailFeatureExtractor
from . import guards, networks
from .distributed import Ranks
from .items import Source
from .pairs import OCTAVES, PairBatch, Pairs, held_out_pairs, training_pairs
from .run import INVERTIBILITY_IMAGES, Run, TrainedNetwork
from .settings import PROCEDURAL, Settings
from .teachers import differences, distance, make_teacher, on_grid

AVERAGED = 0.98
"""Decay per step of the running average of the cross-covariance."""
HUBER = 0.5
"""Threshold of the Huber loss, in logarithms."""
BETAS = (0.9, 0.99)
_SMALL_DISTANCE, _SMALL_SQUARE = 1e-7, 1e-8


class Extracting(TrainedNetwork):
    """The extractor alone."""

    def __init__(self, extractor: DetailFeatureExtractor) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> features divided by the root of their number of channels."""
        features: Tensor = self.extractor(image)
        return features / math.sqrt(self.extractor.channels)


def build(settings: Settings) -> Extracting:
    """The extractor with its first weights, the same in every process."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(settings.seed)
        return Extracting(DetailFeatureExtractor(**settings.extractor()))


def polar(matrix: Tensor) -> Tensor:
    """The matrix with orthonormal columns that is nearest to ``matrix``, (N, C), N >= C."""
    # By the small C x C matrix in float64, twenty times faster than an SVD of the large one.
    # Directions with singular value 0 are dropped, not rotated arbitrarily.
    tall = matrix.double()
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    kept = values > values[-1] * 1e-12
    roots = torch.where(kept, values.clamp(min=1e-300).rsqrt(), torch.zeros_like(values))
    return (tall @ (vectors * roots) @ vectors.T).to(matrix.dtype)


class Fit:
    """How the features' differences of a batch fit the teacher's.

    Args:
        features: differences of the extractor's features, (B, C, h, w).
        layers: differences of the teacher's, on the same grid (:func:`.teachers.on_grid`).
    """

    def __init__(self, features: Tensor, layers: list[Tensor], wanted: Tensor) -> None:
        self._features, self._layers = features, layers
        squares = [layer.square().sum(1).mean((1, 2)) for layer in layers]
        self._scale = torch.stack(squares).sum(0) + _SMALL_SQUARE
        found = features.square().sum(1).mean((1, 2))
        self.log_ratio = (found + _SMALL_DISTANCE).log() - (wanted + _SMALL_DISTANCE).log()
        self.log_wanted = (wanted + _SMALL_DISTANCE).log()

    @torch.no_grad()
    def cross_covariance(self) -> Tensor:
        """Covariance of the teacher's channels and the extractor's, (N, C): the mean over pairs
        and pixels, each pair divided by its distance."""
        weighed = self._features / self._scale[:, None, None, None]
        found = []
        for layer in self._layers:
            side = layer.shape[-1]
            small = weighed
            if side < small.shape[-1]:
                small = F.avg_pool2d(small, small.shape[-1] // side)
            teacher = layer.permute(0, 2, 3, 1).flatten(0, 2)
            found.append(teacher.T @ small.permute(0, 2, 3, 1).flatten(0, 2) / len(teacher))
        return torch.cat(found)

    def residual(self, rotation: Tensor) -> Tensor:
        """|F(x) - F(y) - R (f(x) - f(y))|^2 divided by the teacher's distance, (B,); ``rotation``
        is R transposed."""
        grid = self._features.shape[-1]
        with torch.no_grad():
            target = torch.zeros_like(self._features)
            parts = rotation.split([layer.shape[1] for layer in self._layers])
            for layer, part in zip(self._layers, parts, strict=True):
                turned = F.conv2d(layer, part.T[:, :, None, None])
                if (ratio := grid // layer.shape[-1]) > 1:
                    turned = F.interpolate(turned, scale_factor=ratio, mode="nearest")
                target += turned
        return (self._features - target).square().sum(1).mean((1, 2)) / self._scale

    def huber(self) -> Tensor:
        """Huber loss of the logarithms of the distances, (B,)."""
        nothing = torch.zeros_like(self.log_ratio)
        return F.huber_loss(self.log_ratio, nothing, delta=HUBER, reduction="none")


def blur_aversion(features: Tensor) -> Tensor:
    """softplus(log d(a, b) - log d(mean, b)), the mean over pairs of candidates.

    Args:
        features: features of the candidates, followed by those of their mean, (K + 1, C, h, w).
    """
    *candidates, mean = features

    def logarithm(one: Tensor, other: Tensor) -> Tensor:
        return ((one - other).square().sum(0).mean() + _SMALL_DISTANCE).log()

    terms = [
        F.softplus(logarithm(other, one) - logarithm(mean, one))
        for place, one in enumerate(candidates)
        for other in candidates[:place] + candidates[place + 1 :]
    ]
    return torch.stack(terms).mean()


class DistancesRun(Run):
    """A training whose objective is a teacher's distances."""

    PARTS = ("residual", "huber", "octave_penalty", "noise_penalty", "inverse_penalty")
    LARGEST_NORM = 1.0

    def __init__(
        self, settings: Settings, source: Source, ranks: Ranks, device: torch.device, steps: int
    ) -> None:
        self._steps = steps
        self.teacher = make_teacher(settings.teacher).to(device)
        self.pairs = Pairs(
            source, networks.load(settings.networks), settings.seed, settings.blur_aversion > 0
        )
        super().__init__(settings, source, ranks, device, build(settings).to(device), BETAS)
        self.grid = settings.size // self.network.extractor.downscale
        self.covariance: Tensor | None = None
        """The running average, (N, C)."""

    def remarks(self) -> list[str]:
        if self.settings.data != (PROCEDURAL,):
            return []
        return ["note: photographs teach distances better than procedural pictures do"]

    def make_scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        warm_up, end, steps = self.settings.warm_up, self.settings.lr_end, self._steps

        def factor(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
            return min(1.0, (step + 1) / (warm_up + 1)) * (end + (1 - end) * cosine)

        return torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def batches(self, last: int) -> Iterator[PairBatch]:
        return training_pairs(
            self.pairs, self.step, last, batch=self.settings.batch, rank=self.ranks.rank,
            ranks=self.ranks.world, workers=self.settings.workers,
        )  # fmt: skip

    def _features(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features of the distorted pictures, of the pictures, of the probes, and of the candidates
        with their mean."""
        images = [batch.distorted, batch.gt, batch.probes]
        if len(batch.candidates):
            images += [batch.candidates, batch.candidates.mean(0, keepdim=True)]
        all_at_once = torch.cat(images).to(self.device, non_blocking=True)
        pairs, probes = len(batch.gt), len(batch.probes)
        network = self.trained if self.network.training else self.network
        found: Tensor = network(all_at_once * 2 - 1)
        return (
            found[:pairs],
            found[pairs : 2 * pairs],
            found[2 * pairs : 2 * pairs + probes],
            found[2 * pairs + probes :],
        )

    @torch.no_grad()
    def _teach(self, batch: PairBatch) -> tuple[list[Tensor], Tensor]:
        """The teacher's differences on the extractor's grid, and its distances, both scaled by the
        gain."""
        both = torch.cat([batch.distorted, batch.gt]).to(self.device, non_blocking=True)
        of = differences(self.teacher.features(both))
        gain, size = self.settings.gain, self.settings.size
        layers = [
            on_grid(layer, size // stride, self.grid) * math.sqrt(gain)
            for layer, stride in zip(of, self.teacher.strides, strict=True)
        ]
        return layers, distance(of) * gain

    def _turn(self, fit: Fit) -> Tensor:
        """Adds this batch to the running average; returns R transposed."""
        now = self.ranks.sum(fit.cross_covariance()) / self.ranks.world
        if self.covariance is None:
            self.covariance = now
        else:
            self.covariance = self.covariance.lerp(now, 1 - AVERAGED)
        return polar(self.covariance)

    def objective(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        settings = self.settings
        layers, wanted = self._teach(batch)
        distorted, gt, probes, candidates = self._features(batch)
        fit = Fit(distorted - gt, layers, wanted)
        residual = fit.residual(self._turn(fit)).mean()
        huber = fit.huber().mean()
        loss = settings.hint * residual + settings.log_distance * huber
        # Penalties without a weight are measured too, for the curve.
        with torch.set_grad_enabled(settings.octave_guard + settings.noise_guard > 0):
            response = guards.responses(probes, gt[0])
            octaves, noise = guards.octave_penalty(response), guards.noise_penalty(response)
        with torch.set_grad_enabled(settings.inverse_guard > 0):
            direction = self._direction(gt[0])
            growth = guards.inverse_growth(self.network.extractor, self._unscaled(gt[0]), direction)
            inverse = guards.inverse_penalty(growth)
        loss = loss + settings.octave_guard * octaves + settings.noise_guard * noise
        loss = loss + settings.inverse_guard * inverse
        if len(candidates):
            loss = loss + settings.blur_aversion * blur_aversion(candidates)
        return loss, torch.stack([residual, huber, octaves, noise, inverse])

    def _unscaled(self, features: Tensor) -> Tensor:
        return features * math.sqrt(self.network.extractor.channels)

    def _direction(self, features: Tensor) -> Tensor:
        """A Gaussian direction of the features' shape, different in every step."""
        generator = torch.Generator().manual_seed(self.step)
        return torch.randn(features.shape, generator=generator).to(features)

    def look(self) -> dict[str, float]:
        """The fit of the distances on held-out pairs, and the guards' figures."""
        moments = torch.zeros(8, dtype=torch.float64, device=self.device)
        answers = torch.zeros(len(OCTAVES) + 3, dtype=torch.float64, device=self.device)
        rotation = None if self.covariance is None else polar(self.covariance)
        probe: Tensor | None = None
        for batch in held_out_pairs(
            self.pairs, self.source.held_out_images, self.settings.batch, self.ranks.rank,
            self.ranks.world,
        ):  # fmt: skip
            self.skip(batch)
            layers, wanted = self._teach(batch)
            distorted, gt, probes, _ = self._features(batch)
            fit = Fit(distorted - gt, layers, wanted)
            a = fit.log_wanted.double()
            b = a + fit.log_ratio.double()
            residual = torch.zeros_like(a) if rotation is None else fit.residual(rotation)
            values = torch.stack(
                [torch.ones_like(a), a, b, a * a, b * b, a * b, residual, fit.huber()]
            )
            moments += values.sum(1)
            answers[:-1] += guards.responses(probes, gt[0])
            answers[-1] += 1
            if probe is None:
                probe = batch.gt[:INVERTIBILITY_IMAGES].to(self.device) * 2 - 1
        n, a1, b1, aa, bb, ab, residuals, huber = self.ranks.sum(moments).tolist()
        spread = math.sqrt(max(aa / n - (a1 / n) ** 2, 0) * max(bb / n - (b1 / n) ** 2, 0))
        correlation = (ab / n - a1 * b1 / n**2) / spread if spread else 0.0
        answers = self.ranks.sum(answers)
        error = 0.0 if probe is None else self.network.extractor.invertibility_error(probe)
        return {
            "held_out_correlation": min(max(correlation, -1.0), 1.0),  # rounding may exceed 1
            "held_out_log_ratio": (b1 - a1) / n,
            "held_out_huber": huber / n,
            "held_out_residual": residuals / n,
            **guards.figures(answers[:-1] / answers[-1]),
            "invertibility_error": error,
        }

    def figures(self) -> dict[str, Any]:
        settings = self.settings
        held_out = ("correlation", "log_ratio", "huber", "residual")
        names = [f"octave_{place}" for place in range(1, len(OCTAVES))]
        return {
            "teacher": {"name": settings.teacher, **self.teacher.facts()},
            "networks": [
                {"name": name, "sha256": digest}
                for name, digest in zip(
                    settings.networks, networks.digests(settings.networks), strict=True
                )
            ],
            "pairs": self.step * settings.batch,
            **{f"held_out_{name}": self.latest(f"held_out_{name}") for name in held_out},
            "octaves": [*(self.latest(name) for name in names), 1.0],
            "octave_spread": self.latest("octave_spread"),
            "noise_over_blur": self.latest("noise_over_blur"),
        }

    def exported(self) -> tuple[DetailFeatureExtractor, float]:
        """The extractor unchanged, because the gain fixes the scale of its features."""
        return copy.deepcopy(self.network.extractor).cpu().eval(), 1.0

    def state(self) -> dict[str, Any]:
        return {**super().state(), "covariance": self.covariance}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        found = state["covariance"]
        self.covariance = None if found is None else found.to(self.device)
