"""The length of the gradient of each term of MGHF-c relative to L1's, for crops of several sizes.

A weight beside L1 that is right for one size of crop is right for another if this length does not
change. LIP's does: with more patches there are more negatives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mghf_fast import MGHFLoss

from . import extractors, objectives
from .runs import Study
from .tuning import FIRST_BATCHES, Recipe, crops

SIDES = (64, 96, 128, 192, 256)


def lengths(loss: MGHFLoss, sr: Tensor, gt: Tensor) -> dict[str, float]:
    """Each weighted term's gradient in ``sr`` over L1's, and the total's."""
    sr = sr.detach().requires_grad_()
    base = torch.linalg.vector_norm(torch.autograd.grad(F.l1_loss(sr, gt), sr)[0])
    found = {}
    for name, factor in {**loss.preset.factors(), "total": 1.0}.items():
        if not factor:
            continue
        # A separate forward, because terms share the buffers of their gradients.
        (gradient,) = torch.autograd.grad(factor * loss.terms(sr, gt)[name], sr)
        found[name] = float(torch.linalg.vector_norm(gradient) / base)
    return found


def measure(study: Study, presets: Sequence[str], sides: Sequence[int] = SIDES) -> dict[str, Any]:
    """A row for each preset and side of a crop, means over the start network's first batches."""
    torch.set_num_threads(1)
    setup = study.setup()
    extractor = extractors.load(study.features)
    rows = []
    for side in sides:
        recipe = Recipe(batch=2, patch=side)
        data = list(itertools.islice(crops(setup.photographs, recipe, 0), FIRST_BATCHES))
        with torch.no_grad():
            pairs = [(setup.start(lr), gt) for lr, gt in data]
        for preset in presets:
            loss = MGHFLoss("c", objectives.preset(preset), extractor, input_range="0,1")
            found = [lengths(loss, sr, gt) for sr, gt in pairs]
            mean = {k: math.fsum(f[k] for f in found) / len(found) for k in found[0]}
            rows.append(
                {"preset": preset, "side": side, **{k: float(f"{v:.4g}") for k, v in mean.items()}}
            )
    return {"batches": FIRST_BATCHES, "batch": 2, "rows": rows}
