"""DECLoss: values, gradients, thresholds, gathering, contract."""

from __future__ import annotations

import math
import os
from pathlib import Path

import contract
import draws
import interpreter
import pytest
import torch
import torch.multiprocessing as mp
import without_teardown
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import CAPABILITIES, in_parent, run_file_under
from torch import Tensor

from mghf_fast import DECLoss, available_backends, functional, ops
from mghf_fast.ops.vocabulary import SIMILARITIES, TEMPERATURES
from mghf_fast.reference import dec as reference

OPTIONS = (34.0, 0.5, 1.5, "inside", "rmse", 1.0, 1e-8)


def patches(p: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """SR and GT patches, some of the latter nearly equal."""
    gt = draws.rand(p, d, dtype=torch.float64)
    for i in range(2, p, 3):
        gt[i] = gt[i - 1] + 0.01 * draws.randn(d, dtype=torch.float64)
    sr = gt + 0.1 * draws.randn(p, d, dtype=torch.float64)
    return sr.to(dtype), gt.to(dtype)


def images(*shape: int) -> tuple[Tensor, Tensor]:
    gt = draws.rand(shape)
    gt[..., -8:, -8:] = gt[..., :8, :8] + 0.005
    return (gt + 0.1 * draws.randn(shape)), gt


def by_hand(sr: Tensor, gt: Tensor, outside: bool, l2: bool) -> float:
    """One pair at a time, from the definition."""
    p = len(sr)

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    def term(s: float, t: float) -> float:
        return math.exp(s) / t if outside else math.exp(s / t)

    rows = []
    for i in range(p):
        positive = negative = 0.0
        for j in range(p):
            squared = (gt[i] - gt[j]).square()
            distance = float(squared.sum().sqrt() if l2 else squared.mean().sqrt())
            alike = i == j or distance == 0 or -20 * math.log10(distance) >= 34
            t = 0.5 if alike else 1.5
            q = term(cosine(sr[i], sr[j]), t) + 2 * term(cosine(gt[i], sr[j]), t)
            positive, negative = (positive + q, negative) if alike else (positive, negative + q)
        if negative:
            rows.append(math.log(positive / negative))
    return -sum(rows) / len(rows)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_definition(temperature: str, similarity: str) -> None:
    sr, gt = images(2, 3, 16, 24)
    sr, gt = sr.double(), gt.double()
    got = functional.dec_loss(sr, gt, temperature=temperature, similarity=similarity)
    cut = [
        torch.stack(
            [
                x[b, :, i : i + 8, j : j + 8].flatten()
                for b in range(2)
                for i in range(0, 16, 8)
                for j in range(0, 24, 8)
            ]
        )
        for x in (sr, gt)
    ]
    assert got.item() == pytest.approx(by_hand(*cut, temperature == "outside", similarity == "l2"))


def test_positive_pairs_are_decided_exactly() -> None:
    """An offset of a few float32 steps around the threshold, where a matrix product would err."""
    base = draws.rand(1, 192) + 1.0
    limit = 10 ** (-34 / 20)
    for factor, expected in ((0.999, True), (1.001, False)):
        gt = torch.cat((base, base + factor * limit))
        assert reference.positive_pairs(gt, 34.0, "rmse", 1.0)[0, 1].item() is expected
        assert reference.positive_pairs(2 * gt, 34.0, "rmse", 2.0)[0, 1].item() is expected


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_reference_gradient(temperature: str) -> None:
    sr, gt = patches(9, 12, torch.float64)
    sr[4] = 0  # a black patch
    sr.requires_grad_()
    options = (34.0, 0.5, 1.5, temperature, "rmse", 1.0, 0.3)
    loss = reference.dec(sr, gt, *options)
    (expected,) = torch.autograd.grad(loss, sr, torch.tensor(0.7, dtype=torch.float64))
    got = reference.dec_backward(torch.tensor(0.7, dtype=torch.float64), sr.detach(), gt, *options)
    assert contract.relative_error(got, expected) < 1e-10


def test_gradcheck() -> None:
    sr, gt = patches(7, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda x: reference.dec(x, gt, *OPTIONS), sr.requires_grad_())


@pytest.mark.parametrize("shape", [(1, 3, 8, 16), (2, 3, 16, 24), (1, 1, 40, 32), (3, 4, 8, 8)])
def test_values_and_gradients(backend: str, shape: tuple[int, ...]) -> None:
    sr, gt = images(*shape)

    def exact(sr: Tensor) -> Tensor:
        return functional.dec_loss(sr, gt.double(), backend="reference")

    contract.check_against_reference(
        lambda sr: functional.dec_loss(sr, gt, backend=backend), exact, [sr]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    sr, gt = images(1, 3, 16, 24)
    gt = gt.to(dtype)
    contract.check_half_precision(
        lambda sr: functional.dec_loss(sr, gt, backend=backend),
        lambda sr: functional.dec_loss(sr, gt.to(sr.dtype), backend="reference"),
        [sr],
        dtype,
    )


def test_layouts(backend: str) -> None:
    sr, gt = images(2, 3, 16, 24)
    for _, strided in contract.image_layouts(sr):
        contract.check_layout(lambda x: functional.dec_loss(x, gt, backend=backend), sr, strided)


def test_contract(backend: str) -> None:
    sr, gt = patches(9, 12)
    contract.check_opcheck(ops.dec.dec, sr.clone().requires_grad_(), gt, *OPTIONS, backend)
    sr, gt = images(1, 3, 16, 24)
    contract.check_compiled(lambda x: functional.dec_loss(x, gt, backend=backend), sr)
    contract.check_deterministic(backend, lambda x: functional.dec_loss(x, gt, backend=backend), sr)


def test_second_derivative() -> None:
    _, gt = patches(4, 3)
    contract.check_second_derivative(
        lambda x: ops.dec.dec(x, gt.double(), *OPTIONS, "auto")[0], draws.rand(4, 3) + 0.5
    )


def test_no_negatives_gives_zero(backend: str) -> None:
    gt = torch.full((1, 3, 16, 16), 0.5)
    sr = draws.rand(1, 3, 16, 16, requires_grad=True)
    loss = functional.dec_loss(sr, gt, backend=backend)
    loss.backward()
    assert loss.item() == 0 and sr.grad is not None and (sr.grad == 0).all()


def test_rows_without_negatives_are_left_out() -> None:
    """Patches 0, 1, 2, each similar only to the next; so 1 is similar to all."""
    step = 0.015  # rmse below 0.01995 once, above it twice
    gt = torch.stack([torch.full((12,), 0.5 + i * step) for i in range(3)]).double()
    positive = reference.positive_pairs(gt, 34.0, "rmse", 1.0)
    assert positive.tolist() == [[True, True, False], [True, True, True], [False, True, True]]
    sr = draws.rand(3, 12, dtype=torch.float64)
    got = reference.dec(sr, gt, *OPTIONS)
    assert got.item() == pytest.approx(by_hand(sr, gt, False, False))


def test_black_patches_are_finite(backend: str) -> None:
    sr, gt = images(1, 3, 16, 24)
    sr[..., :8, :8] = gt[..., 8:, 8:16] = 0
    sr.requires_grad_()
    loss = functional.dec_loss(sr, gt, backend=backend)
    loss.backward()
    assert loss.isfinite() and sr.grad is not None and sr.grad.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["sr", "gt"])
@pytest.mark.parametrize("flat", [False, True])
def test_non_finite_pixels_give_nan(backend: str, bad: float, which: str, flat: bool) -> None:
    sr, gt = images(1, 3, 16, 24)
    if flat:
        gt = torch.full_like(gt, 0.5)
    (sr if which == "sr" else gt)[0, 1, 9, 9] = bad
    assert functional.dec_loss(sr, gt, backend=backend).isnan()


def test_printed_temperatures_move_no_gradient() -> None:
    sr, gt = images(1, 3, 16, 24)
    grads = []
    for temperatures in ((0.5, 1.5), (1.0, 1.0)):
        leaf = sr.clone().requires_grad_()
        loss = functional.dec_loss(leaf, gt, temperature="outside", temperatures=temperatures)
        grads.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(*grads)


def test_module() -> None:
    sr, gt = images(1, 3, 16, 24)
    loss = DECLoss(weight=0.01, threshold_db=30.0)
    torch.testing.assert_close(loss(sr, gt), 0.01 * functional.dec_loss(sr, gt, threshold_db=30.0))
    with pytest.raises(TypeError, match=r"unknown options \['treshold'\]; allowed are weight"):
        DECLoss(treshold=3)


def test_an_image_has_no_value_of_its_own(backend: str) -> None:
    """The other image's patches are negatives too: twice as many, so a loss larger by log 2."""
    sr, gt = images(2, 3, 16, 24)
    both = functional.dec_loss(sr, gt, backend=backend)
    alone = [functional.dec_loss(sr[i : i + 1], gt[i : i + 1], backend=backend) for i in (0, 1)]
    assert both > torch.stack(alone).mean() + 0.3
    with pytest.raises(TypeError, match=r"unknown options \['reduction'\]; allowed are weight"):
        DECLoss(reduction="none")


def _rank(rank: int, folder: str) -> None:
    """One of two processes, with the first image or with all others."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    sr, gt = torch.load(f"{folder}/pair.pt", weights_only=True)
    own = slice(0, 1) if rank == 0 else slice(1, None)
    leaf = sr[own].requires_grad_()
    loss = functional.dec_loss(leaf, gt[own], gather=True)
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.save((loss.detach(), grad), f"{folder}/{rank}.pt")
    without_teardown.leave()


@pytest.mark.parametrize("batch", [2, 3])
def test_gather_takes_the_batch_over_all_ranks(batch: int, tmp_path: Path) -> None:
    """One rank has one of 3 images, the other two, as in an epoch's last batch."""
    sr, gt = images(batch, 3, 16, 16)
    torch.save((sr, gt), tmp_path / "pair.pt")
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    whole = sr.clone().requires_grad_()
    expected = functional.dec_loss(whole, gt)
    (grad,) = torch.autograd.grad(expected, whole)
    for rank in range(2):
        loss, local = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(loss, expected.detach())
        # The sum over both ranks' losses; DistributedDataParallel's mean divides by 2 again.
        own = slice(0, 1) if rank == 0 else slice(1, None)
        torch.testing.assert_close(local / 2, grad[own])


def test_gather_without_processes_is_the_plain_loss() -> None:
    sr, gt = images(1, 3, 16, 16)
    assert torch.equal(functional.dec_loss(sr, gt, gather=True), functional.dec_loss(sr, gt))


@settings(max_examples=25, deadline=None)
@given(
    p=st.integers(2, 20),
    d=st.integers(3, 30),
    threshold=st.floats(5, 60),
    temperature=st.sampled_from(TEMPERATURES),
    seed=st.integers(0, 10**6),
)
def test_any_patches(p: int, d: int, threshold: float, temperature: str, seed: int) -> None:
    torch.manual_seed(seed)
    sr, gt = patches(p, d)
    options = (threshold, 0.5, 1.5, temperature, "rmse", 1.0, 0.3)
    positive = [reference.positive_pairs(x, threshold, "rmse", 1.0) for x in (gt, gt.double())]
    if not torch.equal(*positive):
        return  # a distance within float32 rounding of the threshold
    contract.check_against_reference(
        lambda x: ops.dec.dec(x, gt, *options, "auto")[0],
        lambda x: reference.dec(x, gt.double(), *options),
        [sr],
        value_tolerance=1e-4,  # the logarithm of a ratio near 1
        gradient_tolerance=1e-3,
    )


# ---- any shape, any tile ----


def loss_on(backend: str, gt: Tensor, *options: object) -> contract.Function:
    return lambda sr: ops.dec.dec(sr, gt, *(options or OPTIONS), backend)[0]


def exact_loss(gt: Tensor, *options: object) -> contract.Function:
    return lambda sr: reference.dec(sr, gt.double(), *(options or OPTIONS))


@pytest.mark.parametrize("p", [1, 63, 65, 200])
@pytest.mark.parametrize("d", [2, 7, 16, 193])
def test_sizes_that_fit_no_tile(backend: str, p: int, d: int) -> None:
    sr, gt = patches(*interpreter.fitted(backend, (p, d), (130, d)))
    p = len(sr)
    if p > 2:
        sr[0] = gt[p - 1] = 0  # a black patch resembles padding most
    contract.check_against_reference(loss_on(backend, gt), exact_loss(gt), [sr])


def test_long_patches(backend: str) -> None:
    sr, gt = patches(65, 300)
    contract.check_against_reference(loss_on(backend, gt), exact_loss(gt), [sr])


def test_many_patches(backend: str) -> None:
    if backend == "reference":
        pytest.skip("it has no tiles, large or small")
    sr, gt = patches(*interpreter.fitted(backend, (2113, 3), (200, 3)))
    contract.check_against_reference(loss_on(backend, gt), exact_loss(gt), [sr])


# A shorter last run of columns, in the forward and in the backward.
@pytest.mark.parametrize(("p", "programs"), [(140, 8), (120, 12)])
def test_runs_of_triton(p: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sr, gt = patches(p, 3)
    if (reason := ops.dec.OP.why_not("triton", sr)) is not None:
        pytest.skip(reason)
    from mghf_fast.kernels import dec as kernels

    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    contract.check_against_reference(loss_on("triton", gt), exact_loss(gt), [sr])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("threshold", [-10.0, 20.0, 200.0])
def test_options(backend: str, temperature: str, similarity: str, threshold: float) -> None:
    sr, gt = patches(70, 20)
    gt[5:30] = gt[5]
    options = (threshold, 0.1, 0.3, temperature, similarity, 2.0, 1.0)
    positive = [reference.positive_pairs(x, threshold, similarity, 2.0) for x in (gt, gt.double())]
    assert torch.equal(*positive)
    contract.check_against_reference(
        loss_on(backend, gt, *options), exact_loss(gt, *options), [sr], value_tolerance=2e-5
    )


def test_pairs_at_the_threshold(backend: str) -> None:
    """Bright patches, whose products lose the digits that decide."""
    p, limit = 80, 10 ** (-34 / 20)
    gt = draws.rand(p, 192, dtype=torch.float64) + 30
    for i, step in enumerate((-1e-1, -1e-2, -1e-3, -1e-4, 1e-4, 1e-3, 1e-2, 1e-1)):
        difference = draws.randn(192, dtype=torch.float64)
        difference *= (1 + step) * limit / difference.square().mean().sqrt()
        gt[9 * i + 1] = gt[9 * i] + difference
    gt = gt.float()
    expected = reference.positive_pairs(gt.double(), 34.0, "rmse", 1.0)
    assert expected.sum() == p + 8
    assert torch.equal(expected, reference.positive_pairs(gt, 34.0, "rmse", 1.0))
    sr = draws.rand(p, 192)
    contract.check_against_reference(loss_on(backend, gt), exact_loss(gt), [sr])


def test_a_pair_on_the_threshold_is_positive(backend: str) -> None:
    """0 dB and L2: the root of a squared distance of 1 + 2^-23 is 1 in float32."""
    gt = torch.tensor([[0.0, 0.0], [1.0, 2.0**-11.5], [-2.0, 0.0]])
    options = (0.0, 0.5, 1.5, "inside", "l2", 1.0, 1e-8)
    assert reference.positive_pairs(gt, 0.0, "l2", 1.0).sum() == 5
    sr = draws.rand(3, 2)
    expected = reference.dec(sr, gt, *options)
    torch.testing.assert_close(loss_on(backend, gt, *options)(sr), expected)


@pytest.mark.parametrize("temperatures", [(0.02, 0.05), (0.013, 5.0), (50.0, 0.03)])
def test_extreme_temperatures(backend: str, temperatures: tuple[float, float]) -> None:
    sr, gt = patches(70, 20)
    options = (34.0, *temperatures, "inside", "rmse", 1.0, 1e-8)
    contract.check_against_reference(
        loss_on(backend, gt, *options), exact_loss(gt, *options), [sr], value_tolerance=2e-5
    )


@pytest.mark.parametrize("temperatures", [(1e-3, 1.0), (1.0, 1e-3), (1e-3, 1e-3), (0.01, 0.01)])
def test_small_temperatures_do_not_overflow(
    backend: str, temperatures: tuple[float, float]
) -> None:
    sr, gt = patches(70, 20)
    sr[3] = 0  # a row whose terms are all far below the largest of the others
    options = (34.0, *temperatures, "inside", "rmse", 1.0, 1e-8)
    if backend != "reference":
        with pytest.raises(RuntimeError, match="could overflow for temperatures below 0.013"):
            loss_on(backend, gt, *options)(sr)
    got = loss_on("auto", gt, *options)
    assert got(sr).isfinite()
    contract.check_against_reference(
        got, exact_loss(gt, *options), [sr], value_tolerance=2e-5, gradient_tolerance=1e-3
    )


@pytest.mark.parametrize("floor", [1e-8, 0.5, 2.0, 100.0])
def test_norm_floors(backend: str, floor: float) -> None:
    """Below, between and above the norms of the patches; one is black."""
    sr, gt = patches(70, 20)
    sr[3] = gt[4] = 0
    sr[5] *= 0.01
    options = (*OPTIONS[:-1], floor)
    contract.check_against_reference(
        loss_on(backend, gt, *options),
        exact_loss(gt, *options),
        [sr],
        value_tolerance=2e-5,
        gradient_tolerance=1e-3,
    )


def test_a_black_patch_does_not_outweigh_the_others(backend: str) -> None:
    sr, gt = images(1, 3, 32, 32)
    gt[..., :8, :8] = 0
    sr[..., :8, :8] = 0.002 * draws.rand(8, 8)

    def gradient(**options: float) -> tuple[float, float]:
        leaf = sr.clone().requires_grad_()
        functional.dec_loss(leaf, gt, backend=backend, **options).backward()
        assert leaf.grad is not None
        return float(leaf.grad[..., :8, :8].abs().mean()), float(leaf.grad[..., 8:].abs().mean())

    black, usual = gradient()
    assert black < 100 * usual
    black, usual = gradient(norm_floor=1e-8)  # the literal reading
    assert black > 300 * usual
    assert functional.dec_loss(sr, gt) == functional.dec_loss(sr, gt, norm_floor=0.02 * 192**0.5)


@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_strided_patches(backend: str, dtype: torch.dtype) -> None:
    sr, gt = patches(70, 20, dtype)
    for (_, s), (_, g) in zip(contract.batch_layouts(sr), contract.batch_layouts(gt), strict=True):
        contract.check_layout(loss_on(backend, gt), sr, s)
        assert contract.relative_error(loss_on(backend, g)(sr), loss_on(backend, gt)(sr)) <= 1e-6
    same = sr[:1].expand(70, 20)
    contract.check_layout(loss_on(backend, gt), same.contiguous(), same)


def test_the_number_of_threads_does_not_change_a_bit(backend: str) -> None:
    if backend == "reference":
        pytest.skip("its matrix products are PyTorch's")
    sr, gt = patches(*interpreter.fitted(backend, (333, 20), (70, 20)))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            loss = loss_on(backend, gt)
            (grad,) = contract.gradients(loss, [sr], [torch.tensor(0.7)])
            results.append((loss(sr), grad))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("which", ["sr", "gt"])
def test_a_nan_gives_the_references_gradient(backend: str, which: str) -> None:
    sr, gt = patches(70, 20)
    (sr if which == "sr" else gt)[33, 7] = torch.nan
    (grad,) = contract.gradients(loss_on(backend, gt), [sr], [torch.ones(())])
    (expected,) = contract.gradients(loss_on("reference", gt), [sr], [torch.ones(())])
    assert torch.equal(grad.isnan(), expected.isnan())


def test_no_patches(backend: str) -> None:
    empty = torch.zeros(0, 12, requires_grad=True)
    loss = ops.dec.dec(empty, empty.detach(), *OPTIONS, backend)[0]
    loss.backward()
    assert loss.item() == 0 and empty.grad is not None and empty.grad.shape == (0, 12)


# ---- instruction sets ----

KERNEL_TESTS = "sizes or options or pairs or floor or threads"


@in_parent
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_under_each_instruction_set(capability: str) -> None:
    run_file_under(capability, __file__, "-k", f"({KERNEL_TESTS}) and not reference")


@pytest.mark.skipif("cpu" not in available_backends(), reason="there are no compiled kernels")
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 4, dtype=torch.float64), "sr is not float32"),
        (1, torch.zeros(3, 5), "gt has shape"),
        (2, math.inf, "threshold_db is inf"),
        (3, 0.0, "positive_temperature is 0"),
        (4, math.nan, "negative_temperature is nan"),
        (5, "within", "temperature is 'within'"),
        (6, "psnr", "similarity is 'psnr'"),
        (7, -1.0, "max_value is -1"),
        (8, 0.0, "norm_floor is 0"),
    ],
)
def test_the_raw_operator_names_bad_arguments(position: int, value: object, message: str) -> None:
    arguments: list[object] = [torch.zeros(3, 4), torch.zeros(3, 4), *OPTIONS]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mghf_native.dec(*arguments)


def test_bad_input() -> None:
    sr, gt = images(1, 3, 16, 16)
    with pytest.raises(ValueError, match="multiple of patch_size = 8 pixels.*got 16 x 15"):
        functional.dec_loss(sr[..., :15], gt[..., :15])
    with pytest.raises(ValueError, match="sr and gt must have the same shape"):
        functional.dec_loss(sr, gt[:, :, :8])
    with pytest.raises(ValueError, match="temperature must be one of 'inside', 'outside'"):
        functional.dec_loss(sr, gt, temperature="none")
    with pytest.raises(ValueError, match="norm_floor must be finite and above 0, got 0"):
        functional.dec_loss(sr, gt, norm_floor=0)
    with pytest.raises(ValueError, match="temperatures must be two numbers"):
        functional.dec_loss(sr, gt, temperatures=(1.0,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="similarity must be one of 'rmse', 'l2'"):
        functional.dec_loss(sr, gt, similarity="psnr")
    with pytest.raises(ValueError, match="max_value must be finite and above 0"):
        functional.dec_loss(sr, gt, max_value=0)


def test_gradient_of_patches_below_the_norms_floor(backend: str) -> None:
    sr, gt = patches(7, 12)
    sr[2] *= 1e-9 / sr[2].norm()
    contract.check_against_reference(loss_on(backend, gt), exact_loss(gt), (sr,))
