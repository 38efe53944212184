"""HF-Diff: the divergence, the distillation terms and the whole objective."""

from __future__ import annotations

import math

import contract
import draws
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mghf_fast import HFDiffLoss, MGHFLoss, functional
from mghf_fast.losses import distillation_terms


def test_divergence_definition() -> None:
    p, q = draws.randn(2, 4, 7, dtype=torch.float64)
    a, b = p.softmax(1), q.softmax(1)
    m = (a + b) / 2
    expected = 0.5 * ((a * (a / m).log()).sum(1) + (b * (b / m).log()).sum(1))
    torch.testing.assert_close(functional.js_divergence_loss(p, q), expected.mean())


def test_divergence_bounds_and_gradients() -> None:
    p = draws.randn(3, 5, 16)
    assert functional.js_divergence_loss(p, p).item() == pytest.approx(0, abs=1e-6)
    far = torch.zeros(1, 2)
    far[0, 0] = 1e4
    assert functional.js_divergence_loss(far, -far).item() == pytest.approx(math.log(2))
    leaves = [draws.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(functional.js_divergence_loss, leaves)
    assert functional.js_divergence_loss(p.half(), p.half()).dtype == torch.float32
    contract.check_compiled(functional.js_divergence_loss, draws.randn(2, 4), draws.randn(2, 4))


def test_divergence_bad_input() -> None:
    p = draws.randn(2, 4)
    with pytest.raises(ValueError, match="p and q must have the same shape"):
        functional.js_divergence_loss(p, p[:, :3])
    with pytest.raises(ValueError, match=r"p must have shape \(B, D\), got \(2,\)"):
        functional.js_divergence_loss(p[:, 0], p[:, 0])


class Student(nn.Module):
    """A one-step student that depends on state, condition and timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor, timestep: int) -> Tensor:
        return self.conv(x) * (1 + timestep) + y


def test_distillation_terms() -> None:
    student = Student()
    noisy, condition, teacher, gt = draws.randn(4, 2, 3, 16, 16)
    terms = distillation_terms(student, noisy, condition, teacher, gt, 15)
    assert torch.equal(terms.distill, F.mse_loss(student(noisy, condition, 15), teacher))
    assert torch.equal(terms.inverse, F.mse_loss(student(teacher, condition, 0), noisy))
    cycled = student(student(gt, condition, 0), condition, 15)
    assert torch.equal(terms.sr, cycled)
    assert torch.equal(terms.consistency, F.mse_loss(cycled, gt))

    # The inner prediction is a constant: only the outer call is differentiated.
    (grad,) = torch.autograd.grad(terms.consistency, student.conv.bias, retain_graph=True)
    expected = (2 * (cycled - gt) * 16 / gt.numel()).sum((0, 2, 3))
    torch.testing.assert_close(grad, expected)


def test_objective() -> None:
    embedder = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(1))
    loss = HFDiffLoss(embedder=embedder)
    student = Student()
    noisy, condition, teacher, gt = draws.rand(4, 2, 3, 16, 16)
    distillation = distillation_terms(student, noisy, condition, teacher, gt, 3)
    terms = loss.terms(distillation.sr, gt, distillation)
    assert set(terms) == {"total", "hf", "js", "distill", "inverse", "consistency"}
    hf = MGHFLoss("n")(distillation.sr, gt)
    js = functional.js_divergence_loss(embedder(distillation.sr), embedder(gt))
    rest = distillation.distill + distillation.inverse + distillation.consistency
    torch.testing.assert_close(terms["total"], 0.2 * hf + 0.15 * js + rest)
    torch.testing.assert_close(
        loss.distil(student, noisy, condition, teacher, gt, 3), terms["total"]
    )
    terms["total"].backward()
    assert student.conv.weight.grad is not None

    plain = HFDiffLoss(eta1=1.0)
    assert set(plain.terms(distillation.sr.detach(), gt)) == {"total", "hf"}
    torch.testing.assert_close(plain(distillation.sr.detach(), gt), hf.detach())


def test_objective_bad_input() -> None:
    with pytest.raises(TypeError, match="embedder must be callable or None, got int"):
        HFDiffLoss(embedder=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eta1 must be finite"):
        HFDiffLoss(eta1=float("nan"))


def test_an_embedder_that_cuts_the_gradient_is_refused() -> None:
    sr, gt = draws.rand(2, 2, 3, 32, 32)
    sr.requires_grad_()

    @torch.no_grad()
    def embedder(image: Tensor) -> Tensor:
        return 2 * image.flatten(1)

    with pytest.raises(ValueError, match="embedder must be differentiable"):
        HFDiffLoss(embedder=embedder)(sr, gt)
    assert HFDiffLoss(embedder=embedder, eta2=0)(sr, gt).requires_grad  # only looked at
    with torch.no_grad():
        HFDiffLoss(embedder=embedder)(sr, gt)


def test_states_of_two_shapes_are_refused() -> None:
    """They would be broadcast."""
    x = draws.rand(2, 3, 8, 8)

    def student(x: Tensor, y: Tensor, timestep: int) -> Tensor:
        return x

    with pytest.raises(ValueError, match="noisy and teacher_output must have the same shape"):
        distillation_terms(student, x, x, x[:1], x, 3)
    with pytest.raises(ValueError, match="noisy and gt must have the same shape"):
        distillation_terms(student, x, x, x, x[:, :, :1], 3)
    with pytest.raises(TypeError, match="gt must be a tensor"):
        distillation_terms(student, x, x, x, None, 3)  # type: ignore[arg-type]
