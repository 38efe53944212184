"""Histogram entropy: values, special maps, contract."""

from __future__ import annotations

import contract
import draws
import interpreter
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import CAPABILITIES, in_parent, run_file_under

from mghf_fast import functional, ops
from mghf_fast.reference import entropy as reference


def by_hand(x: torch.Tensor, bins: int) -> torch.Tensor:
    """NumPy, one map at a time, with the bin of a value as defined: in float32."""
    result = np.zeros(x.shape[:2])
    for i in range(x.shape[0]):
        for c in range(x.shape[1]):
            v = x[i, c].cpu().numpy().astype(np.float32).ravel()
            low, high = v.min(), v.max()
            if low == high:
                continue
            index = np.floor((v - low) / (high - low) * np.float32(bins)).astype(int)
            p = np.bincount(np.minimum(index, bins - 1), minlength=bins) / v.size
            p = p[p > 0]
            result[i, c] = -(p * np.log(p)).sum() / np.log(bins)
    return torch.from_numpy(result).to(x.device)


@pytest.mark.parametrize("bins", [2, 7, 256, 1000])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 5), (31, 33)])
def test_values(backend: str, bins: int, size: tuple[int, int]) -> None:
    x = draws.randn(2, 3, *size)
    got = functional.channel_entropy(x, bins, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), by_hand(x, bins), atol=1e-5, rtol=1e-5)
    assert (got >= 0).all() and (got <= 1 + 1e-6).all()


def test_uniform_and_two_valued_maps(backend: str) -> None:
    ramp = torch.arange(256.0).view(1, 1, 16, 16)
    halves = (torch.arange(256) % 2).float().view(1, 1, 16, 16)
    x = torch.cat((ramp, halves, torch.full_like(ramp, 3.5)), 1)
    expected = torch.tensor([[1.0, 1 / 8, 0.0]])  # all bins; 1 bit of 8; constant
    torch.testing.assert_close(functional.channel_entropy(x, 256, backend=backend), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_maps_are_nan_and_others_are_not(backend: str, bad: float) -> None:
    x = draws.rand(2, 3, 8, 8)
    x[1, 2, 4, 4] = bad
    got = functional.channel_entropy(x, backend=backend)
    assert got[1, 2].isnan() and got.isnan().sum() == 1
    everywhere = torch.full((1, 1, 4, 4), bad)
    assert functional.channel_entropy(everywhere, backend=backend).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    x = draws.rand(1, 2, 16, 16).to(dtype)
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 is the reference's")
    got = functional.channel_entropy(x, backend=backend)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), by_hand(x.float(), 256), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", contract.DTYPES)
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    x = draws.randn(2, 3, 6, 5).to(dtype)
    expected = functional.channel_entropy(x, backend=backend)
    for _, strided in contract.image_layouts(x):
        assert torch.equal(functional.channel_entropy(strided, backend=backend), expected)
    for _, strided in contract.expanded(x):
        expected = functional.channel_entropy(strided.contiguous(), backend=backend)
        assert torch.equal(functional.channel_entropy(strided, backend=backend), expected)


def test_contract(backend: str) -> None:
    x = draws.randn(2, 3, 6, 5)
    contract.check_opcheck(ops.entropy.entropy, x, 256, backend)
    compiled = torch.compile(
        lambda x: functional.channel_entropy(x, 16, backend=backend) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(x), functional.channel_entropy(x, 16, backend=backend) * 2)
    contract.check_deterministic(
        backend, lambda x: functional.channel_entropy(x, backend=backend), x, differentiable=False
    )
    assert not functional.channel_entropy(x.requires_grad_(), backend=backend).requires_grad


@settings(max_examples=30, deadline=None)
@given(
    bins=st.integers(2, 300),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    scale=st.floats(1e-6, 1e6),
    shift=st.floats(-1e6, 1e6),
    seed=st.integers(0, 10**6),
)
def test_any_map(bins: int, height: int, width: int, scale: float, shift: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = (scale * draws.randn(1, 2, height, width) + shift).float()
    got = reference.channel_entropy(x, bins)
    torch.testing.assert_close(got.double(), by_hand(x, bins), atol=1e-5, rtol=1e-5)


# ---- how the kernels divide the maps ----


@pytest.mark.parametrize("bins", [2, 256, 5000])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 1, 1),
        (2, 17, 9, 1),
        (1, 40, 5, 13),
        (2, 128, 3, 43),
        (1, 1, 67, 65),
        (1, 2, 150, 333),
    ],
)
def test_sizes_that_fill_no_tile(backend: str, shape: tuple[int, ...], bins: int) -> None:
    # Interpreted kernels are slow for many maps and bins; 33 maps are more than one tile.
    many = bins > 1000 and interpreter.is_slow(backend)
    x = draws.randn(interpreter.fitted(backend, shape, (1 if many else 2, 33, 150, 333)))
    dtypes = contract.DTYPES if bins > 2 and not many else (torch.float32, torch.bfloat16)
    for values in map(x.to, dtypes):
        expected = reference.channel_entropy(values, bins)
        for _, strided in (("contiguous", values), *contract.image_layouts(values)):
            got = functional.channel_entropy(strided, bins, backend=backend)
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_values_on_the_edges_of_bins(backend: str) -> None:
    """Counts equal the reference's, so entropies agree to the last bit of float32."""
    bins = 7
    edges = (torch.arange(8.0) / bins).repeat(32).view(1, 1, 16, 16)
    around = torch.nextafter(edges, draws.randn_like(edges))
    x = torch.cat((edges, around, 3e-39 * edges, 1e30 * around, around - 1000), 1)
    for maps in (x, x.repeat(1, 4, 1, 1).contiguous(memory_format=torch.channels_last)):
        got = functional.channel_entropy(maps, bins, backend=backend)
        torch.testing.assert_close(got, reference.channel_entropy(maps, bins), atol=1e-7, rtol=1e-7)


def test_a_range_beyond_float32_is_nan(backend: str) -> None:
    x = draws.rand(1, 16, 4, 4)
    x[0, 3, 0, :2] = torch.tensor([-3e38, 3e38])
    for maps in (x, x.contiguous(memory_format=torch.channels_last)):
        got = functional.channel_entropy(maps, backend=backend)
        assert got[0, 3].isnan() and got.isnan().sum() == 1


def test_threads_do_not_change_a_bit(backend: str) -> None:
    shape = interpreter.fitted(backend, (2, 20, 130, 190), (1, 9, 130, 70))
    x = draws.randn(shape).contiguous(memory_format=torch.channels_last)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results += [functional.channel_entropy(v, backend=backend) for v in (x, x.contiguous())]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


@in_parent
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_under_each_instruction_set(capability: str) -> None:
    run_file_under(capability, __file__, "-k", "cpu")


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="bins must be between 2 and 16777216, got 1"):
        functional.channel_entropy(draws.rand(1, 1, 2, 2), 1)
    with pytest.raises(TypeError, match=r"bins must be an integer, got 2\.0"):
        functional.channel_entropy(draws.rand(1, 1, 2, 2), 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must have shape \(B, C, H, W\), got \(2, 2\)"):
        functional.channel_entropy(draws.rand(2, 2))
    with pytest.raises(ValueError, match="x must not be empty"):
        functional.channel_entropy(draws.rand(1, 1, 0, 2))


@pytest.mark.parametrize("size", [(9, 9), (13, 17), (1, 67)])
def test_constant_maps_that_fill_no_vector(backend: str, size: tuple[int, int]) -> None:
    x = torch.full((1, 2, *size), 0.3)
    assert (functional.channel_entropy(x, backend=backend) == 0).all()
