"""HF-Diff's objective with SinSR's parts: the adapter's student gives SinSR's own three terms.

The contract is that of SinSR f173549 of September 2024 (``training_losses_distill``): its terms are
reimplemented below, with stand-ins for the diffusion and the network (trainers.py).
"""

from __future__ import annotations

import draws
import pytest
import torch
from torch import Tensor, nn
from trainers import Diffusion, Network

from mghf_fast import HFDiffLoss, MGHFLoss
from mghf_fast.integrations import resshift, sinsr
from mghf_fast.losses.distillation import distillation_terms


@pytest.fixture
def states() -> dict[str, Tensor]:
    names = ("noisy", "condition", "teacher_output", "gt", "lq")
    return {name: draws.randn(3, 3, 16, 16) for name in names}


def sinsr_terms(diffusion: Diffusion, network: nn.Module, s: dict[str, Tensor]) -> list[Tensor]:
    """mse, mse_xT and mse_gt, (B,) each, for SinSR's distillation configuration."""
    last = torch.full((3,), diffusion.num_timesteps - 1)

    def call(x: Tensor, t: Tensor) -> Tensor:
        return network(diffusion._scale_input(x, last), t, lq=s["lq"])

    with torch.no_grad():
        noise_of_gt = call(s["gt"], 0 * last)
    pairs = (
        (s["teacher_output"], call(s["noisy"], last)),
        (s["noisy"], call(s["teacher_output"], 0 * last)),
        (s["gt"], call(noise_of_gt, last)),
    )
    return [(target - found).square().mean((1, 2, 3)) for target, found in pairs]


def test_the_terms_are_sinsrs(states: dict[str, Tensor]) -> None:
    diffusion, network = Diffusion(), Network()
    lq = states.pop("lq")
    expected = [term.mean() for term in sinsr_terms(diffusion, network, {**states, "lq": lq})]
    last = sinsr.final_timestep(diffusion)
    student = sinsr.student(diffusion, network, {"lq": lq})
    terms = distillation_terms(student, **states, final_timestep=last)
    for found, value in zip(terms[:3], expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
    # And so are their gradients in the network.
    for found, value in zip(terms[:3], expected, strict=True):
        gradients = [
            torch.autograd.grad(v, list(network.parameters()), retain_graph=True)
            for v in (found, value)
        ]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_whole_objective(states: dict[str, Tensor]) -> None:
    diffusion, network = Diffusion(), Network()
    lq = states.pop("lq")
    loss = HFDiffLoss(eta1=0.2)
    student = sinsr.student(diffusion, network, {"lq": lq})
    value = loss.distil(student, **states, final_timestep=sinsr.final_timestep(diffusion))
    terms = [term.mean() for term in sinsr_terms(diffusion, network, {**states, "lq": lq})]
    sr = distillation_terms(student, **states, final_timestep=3).sr
    hf = MGHFLoss("n")(sr, states["gt"])
    torch.testing.assert_close(value, sum(terms) + 0.2 * hf, rtol=1e-6, atol=0)


def test_a_student_that_scales_for_the_step_it_tells_is_another(
    states: dict[str, Tensor],
) -> None:
    diffusion, network = Diffusion(), Network()
    lq = states.pop("lq")

    def naive(x: Tensor, y: Tensor, timestep: int) -> Tensor:
        t = torch.full((x.shape[0],), timestep)
        return network(diffusion._scale_input(x, t), t, lq=lq)

    right = sinsr.student(diffusion, network, {"lq": lq})
    inverse = [
        distillation_terms(student, **states, final_timestep=3).inverse
        for student in (naive, right)
    ]
    assert (inverse[0] / inverse[1] - 1).abs() > 1e-3


def test_per_image(states: dict[str, Tensor]) -> None:
    diffusion, network = Diffusion(), Network()
    lq = states.pop("lq")
    student = sinsr.student(diffusion, network, {"lq": lq})
    terms = distillation_terms(student, **states, final_timestep=3, reduction="none")
    expected = sinsr_terms(diffusion, network, {**states, "lq": lq})
    for found, value in zip(terms[:3], expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
    total = HFDiffLoss(reduction="none")(terms.sr, states["gt"], terms)
    hf = MGHFLoss("n", reduction="none")(terms.sr, states["gt"])
    torch.testing.assert_close(total, sum(expected) + 0.2 * hf, rtol=1e-6, atol=0)


def test_a_network_without_a_condition() -> None:
    class Unconditioned(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x + t.view(-1, 1, 1, 1)

    student = resshift.student(Diffusion(), Unconditioned())
    x = torch.zeros(2, 3, 4, 4)
    assert torch.equal(student(x, x, 3), x + 3)
