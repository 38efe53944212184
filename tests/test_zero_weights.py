"""MGHF-c with terms of weight 0: they are not computed, and nothing else changes."""

from __future__ import annotations

import draws
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mghf_fast import ContentStyleLoss, DetailFeatureExtractor, MGHFLoss, functional
from mghf_fast.losses import Preset


def pair(b: int = 2, size: int = 56) -> tuple[Tensor, Tensor]:
    gt = draws.rand(b, 3, size, size)
    return (gt + 0.1 * draws.randn_like(gt)).requires_grad_(), gt


def weighted(gammas: tuple[float, ...], betas: tuple[float, ...] = (1, 1, 1)) -> Preset:
    return Preset(gammas, betas, 1.1, 2**0.5, 24)  # type: ignore[arg-type]


class Launched(TorchDispatchMode):
    """The names of this library's ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "mghf_fast":
            name = func._opname
            # content_style without a kept map computes only MGHF-n.
            self.ops.add("naive" if name == "content_style" and args[2] == 0 else name)
        return func(*args, **(kwargs or {}))


CSC = {"csc", "csc_mse", "csc_correlation", "csc_gram"}
LIP_OPS, STYLE_OPS = {"patches", "monce"}, {"content_style"}


@pytest.mark.parametrize(
    ("preset", "keys", "ops"),
    [
        (weighted((1, 2, 3)), {"naive", *CSC, "lip"}, {*LIP_OPS, *STYLE_OPS}),
        (weighted((1, 2, 0)), {"naive", *CSC}, STYLE_OPS),
        (weighted((1, 0, 3)), {"naive", "lip"}, {*LIP_OPS, "naive"}),
        (weighted((1, 2, 3), (0, 0, 0)), {"naive", "lip"}, {*LIP_OPS, "naive"}),
        (weighted((0, 2, 3), (0, 1, 0)), {"csc", "csc_correlation", "lip"},
         {*LIP_OPS, *STYLE_OPS}),
        (weighted((0, 2, 0), (1, 0, 0)), {"csc", "csc_mse"}, STYLE_OPS),
        (weighted((1, 0, 0)), {"naive"}, {"naive"}),
        (weighted((0, 0, 3)), {"lip"}, LIP_OPS),
        (weighted((0, 0, 0)), set(), set()),
    ],
    ids=lambda value: str((*value.gammas, *value.betas)) if isinstance(value, Preset) else "",
)  # fmt: skip
def test_a_term_without_a_weight_costs_nothing(
    preset: Preset, keys: set[str], ops: set[str]
) -> None:
    extractor = nn.Conv2d(3, 6, 3, padding=1)
    loss = MGHFLoss(preset=preset, extractor=extractor)
    sr, gt = pair()
    with Launched() as launched:
        terms = loss.terms(sr, gt)
        (gradient,) = torch.autograd.grad(terms["total"], sr)
    assert {name for name in launched.ops if "backward" not in name} == ops
    assert set(terms) == {"total", *keys}

    all_of_them = MGHFLoss(preset=weighted((1, 1, 1)), extractor=extractor).terms(sr, gt)
    factors = preset.factors()
    expected = sum(
        (factors[name] * term for name, term in all_of_them.items() if name in factors),
        0 * sr.sum(),
    )
    torch.testing.assert_close(terms["total"], expected)
    for name in keys - {"csc"}:
        torch.testing.assert_close(terms[name], all_of_them[name])
    (wanted,) = torch.autograd.grad(expected, sr)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("gammas", [(0, 0, 1), (0, 0, 0), (0, 1, 0), (1, 0, 1)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_pixel_gives_a_nan_loss_whatever_is_weighted(
    gammas: tuple[float, ...], bad: float
) -> None:
    loss = MGHFLoss(
        preset=weighted(gammas), extractor=DetailFeatureExtractor(3, 8), reduction="none"
    )
    for which in (0, 1):
        both = [x.detach().clone() for x in pair(size=60)]
        both[which][1, 1, 59, 59] = bad  # the only patches end at pixel 56
        losses = loss(*both)
        assert losses[0].isfinite() and losses[1].isnan()


def test_an_extractor_is_not_run_for_nothing() -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    loss = MGHFLoss(preset=weighted((0, 0, 0)), extractor=Refuses())
    sr, gt = pair()
    loss(sr, gt).backward()
    assert sr.grad is not None and not sr.grad.any()


def test_a_term_without_a_weight_has_no_say_even_infinite() -> None:
    terms = functional.ContentStyleTerms(*torch.tensor([[1.0], [2.0], [3.0], [torch.inf]]))
    torch.testing.assert_close(ContentStyleLoss((1, 1, 0)).combine(terms), torch.tensor([5.0]))
    assert ContentStyleLoss((0, 0, 0)).combine(terms).item() == 0
