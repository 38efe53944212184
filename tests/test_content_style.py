"""MGHF-n and the content-style terms: values, gradients, contract."""

from __future__ import annotations

import contract
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mghf_fast import functional, ops
from mghf_fast.reference import content_style as reference


def by_hand(gt: Tensor, sr: Tensor, top_m: int, gram: str) -> list[list[float]]:
    """NumPy, one image and one map at a time, from the definition: alpha 1.1, gamma sqrt 2."""
    rows = []
    for b in range(gt.shape[0]):
        entropy = [functional.channel_entropy(x[b : b + 1], 256)[0].numpy() for x in (gt, sr)]
        importance = ((1 - entropy[0]) + (1 - entropy[1])) / 2
        kept = sorted(range(gt.shape[1]), key=lambda c: (-importance[c], c))[:top_m]
        g, s = gt[b].numpy(), sr[b].numpy()
        height, width = g.shape[1:]
        mse = pearson = style = 0.0
        gw, sw = [], []
        for c in kept:
            weight = (1 + 1.1 * importance[c]) ** 2**0.5
            mse += weight**2 * ((s[c] - g[c]) ** 2).mean() / top_m
            pearson += np.corrcoef(s[c].ravel(), g[c].ravel())[0, 1] / top_m
            gw.append(weight * g[c])
            sw.append(weight * s[c])
        if gram == "map":
            for a, d in zip(gw, sw, strict=True):
                style += ((a @ a.T / width - d @ d.T / width) ** 2).sum() / top_m
        else:
            ga, sa = (np.stack(x).reshape(top_m, -1) for x in (gw, sw))
            norm = top_m * height * width
            style = ((ga @ ga.T / norm - sa @ sa.T / norm) ** 2).sum() / top_m
        rows.append([((s - g) ** 2).mean(), mse, 1 - pearson, style])
    return rows


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    gt = torch.randn(shape, dtype=torch.float32)
    return gt.to(dtype), (gt + 0.3 * torch.randn(shape)).to(dtype)


@pytest.mark.parametrize("gram", ["channel", "map"])
@pytest.mark.parametrize("top_m", [1, 3, 5])
def test_definition(gram: str, top_m: int) -> None:
    gt, sr = pair(2, 5, 7, 9, dtype=torch.float64)
    terms = functional.content_style_terms(gt, sr, top_m=top_m, gram=gram)
    got = torch.stack(list(terms), 1)
    torch.testing.assert_close(got, torch.tensor(by_hand(gt, sr, top_m, gram)).double())


@pytest.mark.parametrize("gram", ["channel", "map"])
def test_reference_gradient(gram: str) -> None:
    gt, sr = pair(2, 6, 5, 4, dtype=torch.float64)
    sr[0, 2] = 0.7  # a constant map
    sr.requires_grad_()
    *terms, kept, weights = reference.content_style(gt, sr, 3, 1.1, 2**0.5, 16, gram)
    upstream = [torch.randn_like(t) for t in terms]
    (expected,) = torch.autograd.grad(terms, sr, upstream)
    got = reference.content_style_backward(*upstream, gt, sr.detach(), kept, weights, gram)
    assert contract.relative_error(got, expected) < 1e-10


@pytest.mark.parametrize("gram", ["channel", "map"])
def test_gradcheck(gram: str) -> None:
    # alpha = 0 and all maps kept: the weights, constants of the gradient, must not move with sr.
    gt, sr = pair(1, 3, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: reference.content_style(gt, x, 3, 0.0, 1.0, 16, gram)[:4], sr.requires_grad_()
    )


@pytest.mark.parametrize("gram", ["channel", "map"])
@pytest.mark.parametrize("shape", [(1, 2, 1, 2), (2, 4, 5, 3), (1, 16, 17, 13), (2, 8, 32, 32)])
def test_values_and_gradients(backend: str, shape: tuple[int, ...], gram: str) -> None:
    gt, sr = pair(*shape)
    top_m = shape[1] // 2

    def exact(sr: Tensor) -> tuple[Tensor, ...]:
        return reference.content_style(gt.double(), sr, top_m, 1.1, 2**0.5, 256, gram)[:4]

    contract.check_against_reference(
        lambda sr: functional.content_style_terms(gt, sr, gram=gram, backend=backend),
        exact,
        [sr],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    contract.check_half_precision(
        lambda gt, sr: functional.content_style_terms(gt, sr, backend=backend),
        lambda gt, sr: reference.content_style(gt, sr, 4, 1.1, 2**0.5, 256, "channel")[:4],
        pair(2, 8, 12, 12),
        dtype,
    )


def test_layouts(backend: str) -> None:
    gt, sr = pair(2, 6, 8, 7)
    for _, strided in contract.image_layouts(sr):
        contract.check_layout(
            lambda sr: functional.content_style_terms(gt, sr, backend=backend), sr, strided
        )


def test_contract(backend: str) -> None:
    gt, sr = pair(2, 4, 6, 5)
    options = (2, 1.1, 1.4, 256, "channel", backend)
    op = ops.content_style.content_style
    contract.check_opcheck(op, gt, sr.clone().requires_grad_(), *options)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (gt, sr)]
    contract.check_opcheck(op, last[0], last[1].requires_grad_(), *options)

    def fn(sr: Tensor) -> tuple[Tensor, ...]:
        return tuple(functional.content_style_terms(gt, sr, backend=backend))

    contract.check_compiled(fn, sr)
    contract.check_deterministic(backend, fn, sr)


def test_second_derivative() -> None:
    gt, sr = pair(1, 2, 3, 3, dtype=torch.float64)
    # The weights are constants of the derivative, so they are kept from moving: one bin decides.
    contract.check_second_derivative(
        lambda sr: functional.content_style_terms(gt, sr, alpha=0.0)[:3], sr
    )


def test_constant_maps_are_finite(backend: str) -> None:
    gt = torch.zeros(1, 4, 8, 8)
    sr = torch.ones(1, 4, 8, 8, requires_grad=True)
    terms = functional.content_style_terms(gt, sr, backend=backend)
    assert terms.correlation.item() == pytest.approx(1.0)  # Pearson 0
    sum(t.sum() for t in terms).backward()
    assert sr.grad is not None and sr.grad.isfinite().all()


def test_equal_pair(backend: str) -> None:
    gt, _ = pair(1, 4, 9, 9)
    terms = functional.content_style_terms(gt, gt.clone(), backend=backend)
    assert terms.naive.item() == terms.mse.item() == 0
    assert abs(terms.correlation.item()) < 1e-5 and terms.gram.item() < 1e-12


def test_equal_histograms_tie_whatever_their_order() -> None:
    levels = torch.arange(24.0) ** 1.3
    x = torch.stack([levels[torch.randperm(24)].view(4, 6) for _ in range(16)])
    x = torch.stack([x[i] if i % 2 else 24**1.3 - x[i] for i in range(16)])[None]  # mirrored counts
    for dtype in (torch.float32, torch.float64):
        kept, _ = reference.importance_weights(
            x[:, 1::2].to(dtype), x[:, 1::2].to(dtype), 8, 1, 1, 7
        )
        assert kept.tolist() == [list(range(8))]


def test_swapped_pairs_tie() -> None:
    """Two maps whose entropies are a, b in gt and b, a in sr are equally important."""
    torch.manual_seed(679)
    gt, sr = torch.randn(1, 5, 6, 6), torch.randn(1, 5, 6, 6)
    for dtype in (torch.float32, torch.float64):
        kept, _ = reference.importance_weights(gt.to(dtype), sr.to(dtype), 2, 1.1, 1.4, 256)
        assert kept.tolist() == [[3, 2]]


def test_ties_go_to_the_lower_index() -> None:
    x = torch.rand(1, 1, 6, 6).expand(1, 8, 6, 6)
    kept, _ = reference.importance_weights(x, x, 4, 1.1, 1.4, 256)
    assert kept.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["gt", "sr"])
def test_non_finite_input_gives_nan(backend: str, bad: float, which: str) -> None:
    gt, sr = pair(2, 4, 6, 6)
    (gt if which == "gt" else sr)[1, 3, 2, 2] = bad
    for term in functional.content_style_terms(gt, sr, top_m=1, backend=backend):
        assert term[0].isfinite() and not term[1].isfinite()


def test_no_gradient_to_gt() -> None:
    gt, sr = pair(1, 4, 6, 6)
    gt.requires_grad_()
    sr.requires_grad_()
    sum(t.sum() for t in functional.content_style_terms(gt, sr)).backward()
    assert gt.grad is None and sr.grad is not None


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(2, 9), st.integers(3, 9)),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_any_shape(shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    top_m = data.draw(st.integers(1, shape[1]))
    # Of different size, or the difference of the Gram matrices would cancel its digits.
    gt, sr = torch.randn(shape), 2 * torch.randn(shape)
    contract.check_against_reference(
        lambda sr: functional.content_style_terms(gt, sr, top_m=top_m),
        lambda sr: reference.content_style(gt.double(), sr, top_m, 1.1, 2**0.5, 256, "channel")[:4],
        [sr],
    )


def test_bad_input() -> None:
    gt, sr = pair(1, 4, 6, 6)
    with pytest.raises(ValueError, match=r"gt and sr must have the same shape, got \(1, 4, 6, 6\)"):
        functional.content_style_terms(gt, sr[:, :, :5])
    with pytest.raises(TypeError, match=r"same dtype, got torch.float64 and torch.float32"):
        functional.content_style_terms(gt.double(), sr)
    with pytest.raises(ValueError, match="same device, got meta and cpu"):
        functional.content_style_terms(gt.to("meta"), sr)
    for top_m in (0, 5):
        with pytest.raises(ValueError, match=f"top_m must be between 1 and 4, got {top_m}"):
            functional.content_style_terms(gt, sr, top_m=top_m)
    with pytest.raises(ValueError, match="gram must be one of 'channel', 'map', got 'both'"):
        functional.content_style_terms(gt, sr, gram="both")
    with pytest.raises(ValueError, match="alpha must be finite, got nan"):
        functional.content_style_terms(gt, sr, alpha=float("nan"))
