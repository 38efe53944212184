"""The student of SinSR (wyf0912/SinSR) for HF-Diff, as in its ``training_losses_distill``.

With T the last step of the diffusion, z_T the noisy start, z^_0 the teacher's output and f the
network, SinSR's three terms (``learn_xT`` and ``finetune_use_gt: 1``) are

    mse     mean (f(s(z_T), T) - z^_0)^2
    mse_xT  mean (f(s(z^_0), 0) - z_T)^2
    mse_gt  mean (f(s(stopgrad f(s(z_0), 0)), T) - z_0)^2

where s(z) = ``diffusion._scale_input(z, T)`` divides a state by its deviation *at T*, also in the
calls that pass step 0 to the network. A student that scales for the step that it passes computes
another inverse term.

:func:`student` returns f(s(.), .) for :func:`mghf_fast.losses.distillation.distillation_terms` and
``HFDiffLoss.distil``; their distill, inverse and consistency are then SinSR's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..losses.distillation import Student

__all__ = ["final_timestep", "student"]


def final_timestep(diffusion: Any) -> int:
    """T, the last step of a SinSR or ResShift diffusion: ``diffusion.num_timesteps - 1``."""
    return int(diffusion.num_timesteps) - 1


def student(
    diffusion: Any,
    model: Callable[..., Tensor],
    model_kwargs: Mapping[str, Any] | None = None,
) -> Student:
    """The one-step student ``(x, y, timestep) -> Tensor`` from SinSR's network.

    Args:
        diffusion: SinSR's or ResShift's ``GaussianDiffusion``: ``num_timesteps`` and
            ``_scale_input(x, t)`` are used.
        model: its network, called as ``model(x, t, **model_kwargs)`` with ``t`` (B,) of int64.
        model_kwargs: the trainer's keyword arguments, ``{"lq": lq}`` for a conditioned network.
            The student's own ``y`` is therefore not used.
    """
    last, more = final_timestep(diffusion), dict(model_kwargs or {})

    def run(x: Tensor, y: Tensor, timestep: int) -> Tensor:
        def steps(step: int) -> Tensor:
            return torch.full((x.shape[0],), step, dtype=torch.int64, device=x.device)

        return model(diffusion._scale_input(x, steps(last)), steps(timestep), **more)

    return run
