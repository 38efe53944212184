"""The three terms by which SinSR distils a many-step diffusion teacher into one step.

x_T the noisy start, y the LR condition, x^_0 the teacher's output from x_T, x_0 the ground truth
distill     = mse(student(x_T, y, T), x^_0)
inverse     = mse(student(x^_0, y, 0), x_T)                              HF-Diff eq. 7
consistency = mse(student(stopgrad(student(x_0, y, 0)), y, T), x_0)      HF-Diff eq. 8
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .. import _checks as check

Student = Callable[[Tensor, Tensor, int], Tensor]
"""``student(x, y, timestep)``: maps a state ``x`` under the LR condition ``y`` in one step."""


class DistillationTerms(NamedTuple):
    """The three terms, scalars or (B,), and ``sr``, the student's image from the consistency cycle,
    which HF-Diff's perceptual and distribution terms compare with the ground truth."""

    distill: Tensor
    inverse: Tensor
    consistency: Tensor
    sr: Tensor


def distillation_terms(
    student: Student,
    noisy: Tensor,
    condition: Tensor,
    teacher_output: Tensor,
    gt: Tensor,
    final_timestep: int,
    *,
    reduction: str = "mean",
) -> DistillationTerms:
    """The three terms, each the mean square of a difference. No gradient reaches the teacher or gt.

    Args:
        student: called four times, as in the equations above; maps a state (B, C, H, W), the
            condition and a timestep to a state.
        noisy: x_T, the noisy start from which the teacher made its output, (B, C, H, W).
        condition: y, passed on to ``student`` as it is.
        teacher_output: x^_0, same shape as ``noisy``.
        gt: x_0, same shape.
        final_timestep: T.
        reduction: ``"mean"`` for scalars, ``"none"`` for one value per image, (B,).

    Raises:
        TypeError, ValueError: ``noisy``, ``teacher_output`` and ``gt`` are not floating-point
            tensors of one shape on one device; or another ``reduction``.
    """
    check.check_choice("reduction", reduction, ("mean", "none"))
    for name, state in (("noisy", noisy), ("teacher_output", teacher_output), ("gt", gt)):
        check.check_tensor(name, state, "(B, C, H, W)", tangents=True)
        check.check_pair("noisy", noisy, name, state)

    def mse(x: Tensor, target: Tensor) -> Tensor:
        if reduction == "mean":
            return F.mse_loss(x, target)
        return F.mse_loss(x, target, reduction="none").flatten(1).mean(1)

    teacher_output, gt = teacher_output.detach(), gt.detach()
    distill = mse(student(noisy, condition, final_timestep), teacher_output)
    inverse = mse(student(teacher_output, condition, 0), noisy)
    sr = student(student(gt, condition, 0).detach(), condition, final_timestep)
    return DistillationTerms(distill, inverse, mse(sr, gt), sr)
