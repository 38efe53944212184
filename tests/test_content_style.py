"""MGHF-n and the content-style terms: values, gradients, contract."""

from __future__ import annotations

from collections.abc import Iterator

import contract
import draws
import interpreter
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import CAPABILITIES, in_parent, run_file_under
from torch import Tensor

from mghf_fast import available_backends, functional, ops
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
    gt = draws.randn(shape, dtype=torch.float32)
    return gt.to(dtype), (gt + 0.3 * draws.randn(shape)).to(dtype)


@pytest.mark.parametrize("gram", ["channel", "map"])
@pytest.mark.parametrize("top_m", [1, 3, 5])
def test_definition(gram: str, top_m: int) -> None:
    gt, sr = pair(2, 5, 7, 9, dtype=torch.float64)
    terms = functional.content_style_terms(gt=gt, sr=sr, top_m=top_m, gram=gram)
    got = torch.stack(list(terms), 1)
    torch.testing.assert_close(got, torch.tensor(by_hand(gt, sr, top_m, gram)).double())


@pytest.mark.parametrize("gram", ["channel", "map"])
def test_reference_gradient(gram: str) -> None:
    gt, sr = pair(2, 6, 5, 4, dtype=torch.float64)
    sr[0, 2] = 0.7  # a constant map
    sr.requires_grad_()
    *terms, kept, weights, _, _ = reference.content_style(gt, sr, 3, 1.1, 2**0.5, 16, gram)
    upstream = [draws.randn_like(t) for t in terms]
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
@pytest.mark.parametrize("shape", [(1, 2, 1, 3), (2, 4, 5, 3), (1, 16, 17, 13), (2, 8, 32, 32)])
def test_values_and_gradients(backend: str, shape: tuple[int, ...], gram: str) -> None:
    if gram == "map" and backend != "reference":
        backend = "auto"  # which falls back
    gt, sr = pair(*shape)
    top_m = shape[1] // 2

    def exact(sr: Tensor) -> tuple[Tensor, ...]:
        return reference.content_style(gt.double(), sr, top_m, 1.1, 2**0.5, 256, gram)[:4]

    contract.check_against_reference(
        lambda sr: functional.content_style_terms(gt=gt, sr=sr, gram=gram, backend=backend),
        exact,
        [sr],
        rounding=2e-7,  # of the 1 in 1 - rho, which dominates for equal maps
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    gt, sr = pair(2, 8, 12, 12, dtype=dtype)
    contract.check_half_precision(
        lambda sr: functional.content_style_terms(gt=gt, sr=sr, backend=backend),
        lambda sr: reference.content_style(gt.to(sr.dtype), sr, 4, 1.1, 2**0.5, 256, "channel")[:4],
        [sr],
        dtype,
    )


@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    gt, sr = pair(2, 6, 8, 7, dtype=dtype)

    def fn(sr: Tensor) -> tuple[Tensor, ...]:
        return functional.content_style_terms(gt=gt, sr=sr, backend=backend)

    for _, strided in contract.image_layouts(sr):
        contract.check_layout(fn, sr, strided)
    for _, strided in contract.expanded(sr):
        contract.check_layout(fn, strided.contiguous(), strided)


def test_contract(backend: str) -> None:
    gt, sr = pair(2, 4, 6, 5)
    options = (2, 1.1, 1.4, 256, "channel", backend)
    op = ops.content_style.content_style
    contract.check_opcheck(op, gt, sr.clone().requires_grad_(), *options)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (gt, sr)]
    contract.check_opcheck(op, last[0], last[1].requires_grad_(), *options)

    def fn(sr: Tensor) -> tuple[Tensor, ...]:
        return tuple(functional.content_style_terms(gt=gt, sr=sr, backend=backend))

    contract.check_compiled(fn, sr)
    contract.check_deterministic(backend, fn, sr)


def test_second_derivative() -> None:
    gt, sr = pair(1, 2, 3, 3, dtype=torch.float64)
    # The weights are constants of the derivative; with one bin they do not change.
    contract.check_second_derivative(
        lambda sr: functional.content_style_terms(gt=gt, sr=sr, alpha=0.0)[:3], sr
    )


def test_constant_maps_are_finite(backend: str) -> None:
    gt = torch.zeros(1, 4, 8, 8)
    sr = torch.ones(1, 4, 8, 8, requires_grad=True)
    terms = functional.content_style_terms(gt=gt, sr=sr, backend=backend)
    assert terms.correlation.item() == pytest.approx(1.0)  # Pearson 0
    sum(t.sum() for t in terms).backward()
    assert sr.grad is not None and sr.grad.isfinite().all()


def test_equal_pair(backend: str) -> None:
    gt, _ = pair(1, 4, 9, 9)
    terms = functional.content_style_terms(gt=gt, sr=gt.clone(), backend=backend)
    assert terms.naive.item() == terms.mse.item() == 0
    assert abs(terms.correlation.item()) < 1e-5 and terms.gram.item() < 1e-12


def test_equal_histograms_tie_whatever_their_order() -> None:
    levels = torch.arange(24.0) ** 1.3
    x = torch.stack([levels[draws.randperm(24)].view(4, 6) for _ in range(16)])
    x = torch.stack([x[i] if i % 2 else 24**1.3 - x[i] for i in range(16)])[None]  # mirrored counts
    for dtype in (torch.float32, torch.float64):
        kept, _ = reference.importance_weights(
            x[:, 1::2].to(dtype), x[:, 1::2].to(dtype), 8, 1, 1, 7
        )
        assert kept.tolist() == [list(range(8))]


def test_swapped_pairs_tie() -> None:
    """Two maps whose entropies are a, b in gt and b, a in sr are equally important."""
    torch.manual_seed(679)
    gt, sr = draws.randn(1, 5, 6, 6), draws.randn(1, 5, 6, 6)
    for dtype in (torch.float32, torch.float64):
        kept, _ = reference.importance_weights(gt.to(dtype), sr.to(dtype), 2, 1.1, 1.4, 256)
        assert kept.tolist() == [[3, 2]]


def test_ties_go_to_the_lower_index() -> None:
    x = draws.rand(1, 1, 6, 6).expand(1, 8, 6, 6)
    kept, _ = reference.importance_weights(x, x, 4, 1.1, 1.4, 256)
    assert kept.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["gt", "sr"])
def test_non_finite_input_gives_nan(backend: str, bad: float, which: str) -> None:
    gt, sr = pair(2, 4, 6, 6)
    (gt if which == "gt" else sr)[1, 3, 2, 2] = bad
    for term in functional.content_style_terms(gt=gt, sr=sr, top_m=1, backend=backend):
        assert term[0].isfinite() and not term[1].isfinite()


# ---- kernels ----

Options = tuple[int, float, float, int, str]


def check_pair(backend: str, gt: Tensor, sr: Tensor, top_m: int, bins: int = 256) -> None:
    """Terms, selection, weights and each term's gradient against the float64 reference."""
    op = ops.content_style
    options: Options = (top_m, 1.1, 2**0.5, bins, "channel")
    *terms, kept, weights, moments, difference = op.content_style(gt, sr, *options, backend)
    exact = reference.content_style(gt.double(), sr.double(), *options)
    assert torch.equal(kept, exact[4])
    for got, want in zip((*terms, weights, difference), (*exact[:4], *exact[5::2]), strict=True):
        assert contract.relative_error(got, want) <= contract.VALUE_TOLERANCE
    for term in range(4):
        upstream = [draws.randn(gt.shape[0]) * (i == term) for i in range(4)]
        got = op.content_style_backward(
            *upstream, gt, sr, kept, weights, moments, difference, "channel", backend
        )
        want = reference.content_style_backward(
            *(u.double() for u in upstream), gt.double(), sr.double(), *exact[4:6], "channel"
        )
        assert got.dtype == sr.dtype and got.shape == sr.shape
        rounding = contract.relative_error(want.to(sr.dtype), want)
        assert contract.relative_error(got, want) <= contract.GRADIENT_TOLERANCE + 2 * rounding
        if sr.is_contiguous(memory_format=torch.channels_last) and not sr.is_contiguous():
            assert got.is_contiguous(memory_format=torch.channels_last)


def layouts(gt: Tensor, sr: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield gt, sr
    for _, strided in contract.image_layouts(sr):
        yield gt, strided
        yield strided, gt
    yield tuple(x.contiguous(memory_format=torch.channels_last) for x in (gt, sr))


@pytest.mark.parametrize(
    ("shape", "top_m"),
    [
        ((1, 16, 1, 9), 16),
        ((2, 17, 9, 1), 3),
        ((1, 112, 7, 13), 65),
        ((3, 1, 67, 65), 1),
        ((1, 35, 48, 50), 17),
        ((1, 5, 130, 191), 2),
    ],
)
def test_sizes_that_fill_no_tile(backend: str, shape: tuple[int, ...], top_m: int) -> None:
    if backend == "reference":
        pytest.skip("it has no tiles")
    shape = interpreter.fitted(backend, shape, (1, 66, 48, 50))
    gt, sr = draws.randn(shape), 2 * draws.randn(shape)
    pairs = [pair for dtype in contract.DTYPES for pair in layouts(gt.to(dtype), sr.to(dtype))]
    for plain_or_strided in pairs[:: 3 if interpreter.interprets(backend) else 1]:
        check_pair(backend, *plain_or_strided, top_m)
    check_pair(backend, gt, sr, top_m, 5000)
    check_pair(backend, *(x.float() for x in pairs[-1]), top_m, 5000)


@pytest.mark.parametrize("kernels", ["triton", "cpu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_means_and_pairs_that_are_alike(kernels: str, layout: torch.memory_format) -> None:
    """Maps for which sums of squares and differences of Gram matrices would lose digits."""
    if kernels not in available_backends():
        pytest.skip(f"backend {kernels!r} does not run here")
    shape = interpreter.fitted(kernels, (2, 20, 40, 41), (1, 20, 20, 21))
    gt = draws.randn(shape)
    noise = draws.randn_like(gt)
    for sr in (gt + noise + 30, noise + 30 - gt, gt + 1e-3 * noise, 1e-3 * (gt + noise) + 2):
        check_pair(
            kernels, gt.contiguous(memory_format=layout), sr.contiguous(memory_format=layout), 9
        )
    gt += 100 * draws.randn(*shape[:2], 1, 1)
    check_pair(kernels, gt, (gt + 0.1 * noise).contiguous(memory_format=layout), 9)


def test_a_nan_does_not_spread_to_maps_that_are_not_kept(backend: str) -> None:
    gt, sr = pair(1, 4, 6, 6)
    sr[0, 1, 2, 2] = sr[0, 3, 4, 5] = torch.nan
    sr.requires_grad_()
    terms = functional.content_style_terms(gt=gt, sr=sr, top_m=1, backend=backend)  # keeps map 1
    sum(t.sum() for t in terms).backward()
    assert sr.grad is not None
    assert sr.grad[0, 1].isnan().all() and sr.grad[0, [0, 2]].isfinite().all()
    assert sr.grad[0, 3, 4, 5].isnan() and sr.grad[0, 3].isnan().sum() == 1


def test_two_pixels(backend: str) -> None:
    """Maps of two pixels have correlation 1 or -1, and no gradient."""
    gt, sr = pair(1, 6, 1, 2)
    sr.requires_grad_()
    terms = functional.content_style_terms(gt=gt, sr=sr, top_m=6, backend=backend)
    assert 3 * terms.correlation.item() == pytest.approx(
        ((gt.diff() * sr.diff()) < 0).sum().item(), abs=1e-5
    )
    terms.correlation.sum().backward()
    # Rounding changes a deviation from the mean by 6e-8 of the value, and the slope is its inverse.
    a, b = (x.detach().abs().amax(3) / x.detach().diff().abs()[..., 0] for x in (gt, sr))
    allowed = 1e-7 * (a + b) / sr.detach().diff().abs()[..., 0]
    assert sr.grad is not None and (sr.grad.abs().amax(3) <= allowed).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_constant_map_has_no_correlation(backend: str, layout: torch.memory_format) -> None:
    gt, sr = (x.contiguous(memory_format=layout) for x in pair(1, 16, 30, 31))
    gt[:, :4] = 0.3
    sr[:, 2:6] = 0.7
    sr.requires_grad_()
    terms = functional.content_style_terms(gt=gt, sr=sr, top_m=6, backend=backend)
    assert terms.correlation.item() == pytest.approx(1.0, abs=1e-6)
    terms.correlation.sum().backward()
    assert sr.grad is not None and sr.grad[:, :2].abs().max() < 1e-6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_threads_do_not_change_a_bit(backend: str, layout: torch.memory_format) -> None:
    shape = interpreter.fitted(backend, (2, 20, 130, 190), (1, 9, 23, 30))
    gt, sr = (x.contiguous(memory_format=layout) for x in pair(*shape))
    contract.check_deterministic(
        backend, lambda sr: functional.content_style_terms(gt=gt, sr=sr, backend=backend), sr
    )


def test_statistics_of_the_backends_agree(backend: str) -> None:
    gt, sr = pair(2, 8, 12, 13)
    options: Options = (5, 1.1, 2**0.5, 64, "channel")
    got = ops.content_style.content_style(gt, sr, *options, backend)[4:]
    for value, want in zip(got, reference.content_style(gt, sr, *options)[4:], strict=True):
        torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("cpu" not in available_backends(), reason="no compiled CPU kernels here")
def test_gram_of_single_maps_is_the_references() -> None:
    gt, sr = pair(1, 4, 6, 6)
    with pytest.raises(RuntimeError, match="'cpu' cannot run content_style: .*gram='channel' only"):
        functional.content_style_terms(gt=gt, sr=sr, gram="map", backend="cpu")
    for got, want in zip(
        functional.content_style_terms(gt=gt, sr=sr, gram="map"),
        functional.content_style_terms(gt=gt, sr=sr, gram="map", backend="reference"),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.skipif("cpu" not in available_backends(), reason="no compiled CPU kernels here")
@pytest.mark.parametrize(("index", "message"), [(4, "index 4; allowed is 0 to 3"), (0, "twice")])
def test_kept_maps_that_cannot_be_are_refused(index: int, message: str) -> None:
    gt, sr = pair(1, 4, 6, 6)
    statistics = ops.content_style.content_style(gt, sr, 2, 1.1, 1.4, 16, "channel", "cpu")[4:]
    kept = torch.tensor([[0, index]])
    with pytest.raises(RuntimeError, match=message):
        ops.content_style.content_style_backward(
            *torch.ones(4, 1), gt, sr, kept, *statistics[1:], "channel", "cpu"
        )


@in_parent
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_under_each_instruction_set(capability: str) -> None:
    run_file_under(capability, __file__, "-k", "cpu or alike")


@pytest.mark.parametrize("dtype", contract.DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (2, 70, 9, 12), (2, 150, 6, 7)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_takes_the_place_of_gt(
    backend: str, layout: torch.memory_format, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Bit by bit the gradient that has memory of its own, also with both in one stack, as the loss
    has them."""
    both = torch.cat(pair(*shape)).to(dtype).contiguous(memory_format=layout)
    gt, sr = both[: shape[0]], both[shape[0] :]
    run = ops.OPS["content_style"].choose(backend, gt, sr, gram="channel")
    *_, kept, weights, moments, difference = run.forward(
        gt, sr, (shape[1] + 1) // 2, 1.1, 2**0.5, 256, "channel"
    )
    grads = draws.rand(4).unsqueeze(1).expand(4, shape[0]).unbind()  # strides of 0
    saved = (*grads, gt, sr, kept, weights, moments, difference, "channel")
    expected, sr_before = run.backward(*saved), sr.clone()
    got = run.backward(*saved, into=gt)
    assert torch.equal(got, expected)
    assert torch.equal(sr, sr_before)
    if got.data_ptr() == gt.data_ptr():
        assert torch.equal(gt, expected)
    else:
        assert torch.equal(got, run.backward(*saved))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 7, 9), (2, 33, 40, 31)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_naive_term(backend: str, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    shape = interpreter.fitted(backend, shape, (2, 33, 12, 31))
    gt, sr = (x.contiguous(memory_format=layout) for x in pair(*shape))
    contract.check_against_reference(
        lambda sr: functional.naive_term(gt=gt, sr=sr, backend=backend),
        lambda sr: (sr - gt.double()).square().mean((1, 2, 3)),
        [sr],
    )
    terms = functional.content_style_terms(gt=gt, sr=sr, backend=backend)
    alone = functional.naive_term(gt=gt, sr=sr, backend=backend)
    torch.testing.assert_close(alone, terms.naive, rtol=1e-6, atol=0)
    op = ops.content_style.content_style
    contract.check_opcheck(op, gt, sr.clone().requires_grad_(), 0, 1.0, 1.0, 2, "channel", backend)


@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_layouts_of_the_naive_term(backend: str, dtype: torch.dtype) -> None:
    gt, sr = pair(2, 5, 7, 9, dtype=dtype)

    def fn(sr: Tensor) -> Tensor:
        return functional.naive_term(gt=gt.to(sr.dtype), sr=sr, backend=backend)

    for _, strided in (*contract.image_layouts(sr), *contract.expanded(sr)):
        contract.check_layout(fn, strided.contiguous(), strided)
    for _, strided in contract.image_layouts(gt):
        got = functional.naive_term(gt=strided, sr=sr, backend=backend)
        assert contract.relative_error(got, fn(sr)) <= 1e-6
    contract.check_half_precision(
        fn, lambda sr: (sr - gt.to(sr.dtype)).square().mean((1, 2, 3)), [sr], dtype
    )


def test_naive_term_of_what_is_not_finite(backend: str) -> None:
    gt, sr = pair(2, 4, 6, 6)
    sr[1, 2, 3, 3] = torch.nan
    naive = functional.naive_term(gt=gt, sr=sr, backend=backend)
    assert naive[0].isfinite() and naive[1].isnan()


def test_no_gradient_to_gt() -> None:
    gt, sr = pair(1, 4, 6, 6)
    gt.requires_grad_()
    sr.requires_grad_()
    sum(t.sum() for t in functional.content_style_terms(gt=gt, sr=sr)).backward()
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
    # Each map of sr has twice the norm of gt's, because the difference of equal Gram matrices would
    # cancel all digits, and maps of a few pixels can have the same norm by chance.
    gt, sr = draws.randn(shape), draws.randn(shape)
    sr *= 2 * gt.norm(dim=(2, 3), keepdim=True) / sr.norm(dim=(2, 3), keepdim=True)
    contract.check_against_reference(
        lambda sr: functional.content_style_terms(gt=gt, sr=sr, top_m=top_m),
        lambda sr: reference.content_style(gt.double(), sr, top_m, 1.1, 2**0.5, 256, "channel")[:4],
        [sr],
    )


def test_bad_input() -> None:
    gt, sr = pair(1, 4, 6, 6)
    with pytest.raises(ValueError, match=r"gt and sr must have the same shape, got \(1, 4, 6, 6\)"):
        functional.content_style_terms(gt=gt, sr=sr[:, :, :5])
    with pytest.raises(ValueError, match="same device, got meta and cpu"):
        functional.content_style_terms(gt=gt.to("meta"), sr=sr)
    for top_m in (0, 5):
        with pytest.raises(ValueError, match=f"top_m must be between 1 and 4, got {top_m}"):
            functional.content_style_terms(gt=gt, sr=sr, top_m=top_m)
    with pytest.raises(ValueError, match="gram must be one of 'channel', 'map', got 'both'"):
        functional.content_style_terms(gt=gt, sr=sr, gram="both")
    with pytest.raises(ValueError, match="alpha must be finite, got nan"):
        functional.content_style_terms(gt=gt, sr=sr, alpha=float("nan"))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_map_with_a_nan_is_kept_first(backend: str, layout: torch.memory_format) -> None:
    gt, sr = torch.zeros(2, 1, 4, 16, 16)
    gt[0, :, 0, 0] = sr[0, :, 0, 0] = 1  # entropies near 0: important
    sr[0, 2] = torch.linspace(0, 1, 256).view(16, 16)
    sr[0, 2, 3, 4] = torch.nan
    gt, sr = (t.contiguous(memory_format=layout) for t in (gt, sr))
    assert functional.content_style_terms(gt=gt, sr=sr, top_m=1, backend=backend).mse.isnan().all()


def test_correlation_just_above_the_variance_floor(backend: str) -> None:
    gt = draws.randn(1, 2, 9, 9)
    sr = 3e-4 * (gt + draws.randn_like(gt))
    expected = functional.content_style_terms(gt=gt.double(), sr=sr.double()).correlation
    got = functional.content_style_terms(gt=gt, sr=sr, backend=backend).correlation
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
