"""MGHF-n and the three content-style terms of a pair of feature stacks, M = 64 of 128 maps kept."""

import torch
from torch import Tensor

from benchmarks.cases import Shape, features, measured, standard_forms
from mghf_fast import functional
from mghf_fast.commands.table5.workloads import CHANNELS
from mghf_fast.losses import PRESETS
from mghf_fast.reference import content_style

OPTIONS = (CHANNELS // 2, PRESETS["2026"].alpha, PRESETS["2026"].gamma, 256, "channel")


def ours(s: Tensor, g: Tensor, precision: str = "auto") -> Tensor:
    return torch.stack(functional.content_style_terms(gt=g, sr=s, precision=precision)).sum()


def reference(s: Tensor, g: Tensor) -> Tensor:
    return torch.stack(content_style.content_style(g, s, *OPTIONS)[:4]).sum()


def inputs(shape: Shape) -> tuple[Tensor, Tensor]:
    s = features(shape)
    return s, features(shape, 1).mul_(0.5).add_(s).mul_(1.25**-0.5)


test_content_style = measured(
    "content_style", __name__, inputs, standard_forms(ours, reference, graded=True)
)
