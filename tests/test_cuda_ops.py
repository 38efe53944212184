"""The CUDA ops' refusals, each a sentence that names the argument: the checks of csrc/cuda/ops,
whose host build takes tensors on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import draws
import emulated
import pytest
import torch
import torch.nn.functional as F
from cuda_host import load
from torch import Tensor

from mghf_fast import native

pytestmark = emulated.needs_modules

X = torch.zeros(2, 4, 6, 6)
PLANE = torch.zeros(4, 6, 6)
DOUBLE = X.double()
MATRICES = torch.zeros(2, 5, 5)


def ops() -> Any:
    return torch.ops.mghf_cuda_host


def coupling(x: Tensor = X, weights: int = 176, **changed: Any) -> Any:
    """A block of 4 channels on an image of 4 channels: 4 (4 + 1) + 3 (4 2^2 + 18 2) weights."""
    options = {"channels": 4, "kernel": 1, "activation": "relu6", "clamp": 0.0} | changed
    return ops().coupling(x, torch.zeros(weights), *options.values())


def coupling_backward(grad: Tensor) -> Any:
    return ops().coupling_backward(grad, X, torch.zeros(176), 4, 1, "relu6", 0.0, False)


def coupling_packed(**changed: Any) -> Any:
    weights = torch.zeros(176)
    packed = ops().coupling_pack(X, weights, 4, 1)
    given = {"x": X, "weights": weights, "packed": packed} | changed
    return ops().coupling_packed(*given.values(), 4, 1, "relu6", 0.0, True)


def coupling_packed_backward(grad: Tensor = X, **changed: Tensor) -> Any:
    weights = torch.zeros(176)
    packed, (_, state) = ops().coupling_pack(X, weights, 4, 1), coupling_packed()
    given = {"packed": packed, "state": state} | changed
    options = (4, 1, "relu6", 0.0)
    return ops().coupling_packed_backward(grad, X, weights, *given.values(), *options)


def content_style(gt: Tensor = X, sr: Tensor = X, top_m: int = 2, bins: int = 16) -> Any:
    return ops().content_style(gt, sr, top_m, 1.0, 1.0, bins)


def content_style_backward(place: int, instead: Tensor) -> Any:
    given = [torch.ones(2)] * 4 + [X, X, *content_style()[4:]]
    given[place] = instead
    return ops().content_style_backward(*given)


def patches(x: Tensor = X, size: int = 3, stride: int = 1, hidden: int = 5, **changed: Any) -> Any:
    weights = {
        "weight1": torch.zeros(hidden, 9),
        "bias1": torch.zeros(hidden),
        "weight2": torch.zeros(7, hidden),
        "bias2": torch.zeros(7),
    } | changed
    return ops().patches(x, *weights.values(), size, stride)


def patches_packed(packed: Tensor) -> Any:
    parameters = (torch.zeros(5, 9), torch.zeros(5), torch.zeros(7, 5), torch.zeros(7))
    return ops().patches_packed(X, *parameters, packed, 3, 1)


def patches_backward(**changed: Tensor) -> Any:
    embedding, state = patches()
    given = {"grad": torch.zeros_like(embedding), "embedding": embedding, "state": state} | changed
    return ops().patches_backward(*given.values(), X, torch.zeros(5, 9), torch.zeros(7, 5), 3, 1)


def sinkhorn(similarity: Tensor = MATRICES, **changed: Any) -> Any:
    options = {"cost": "hard", "epsilon": 1.0, "iterations": 5, "tolerance": None} | changed
    return ops().sinkhorn(similarity, *options.values())


def sinkhorn_backward(grad: Tensor) -> Any:
    return ops().sinkhorn_backward(grad, MATRICES, "hard", 1.0, 5, None)


MONCE = {
    "temperature": 0.07,
    "epsilon": 1.0,
    "iterations": 5,
    "negative_weight": 1.0,
    "cost": "hard",
    "plan_gradient": "exact",
}


def monce(query: Tensor = MATRICES, key: Tensor = MATRICES, kept: int = 0, **changed: Any) -> Any:
    return ops().monce(query, key, *(MONCE | changed).values(), kept)


def monce_backward(grad: Tensor, state: Tensor) -> Any:
    return ops().monce_backward(grad, MATRICES, MATRICES, state, *MONCE.values())


PATCHES = torch.zeros(6, 5)
DEC = {
    "threshold_db": 34.0,
    "positive_temperature": 0.5,
    "negative_temperature": 1.5,
    "temperature": "inside",
    "similarity": "rmse",
    "max_value": 1.0,
    "norm_floor": 0.1,
}


def dec(sr: Tensor = PATCHES, gt: Tensor = PATCHES, **changed: Any) -> Any:
    return ops().dec(sr, gt, *(DEC | changed).values())


def dec_backward(grad: Tensor, statistics: Tensor) -> Any:
    return ops().dec_backward(grad, PATCHES, PATCHES, statistics, *DEC.values())


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: ops().entropy(PLANE, 16), r"x has shape \(4, 6, 6\); allowed is \(B, C, H, W\)"),
    (lambda: ops().entropy(DOUBLE, 16), "x is none of float32, float16 and bfloat16"),
    (lambda: ops().entropy(X, 1), "bins is 1; allowed are 2 to 16777215"),
    (lambda: ops().entropy(X, 1 << 24), "bins is 16777216; allowed are 2 to 16777215"),
    (lambda: ops().gram(PLANE, 1.0), r"x has shape \(4, 6, 6\)"),
    (
        lambda: ops().gram_backward(torch.zeros(2, 4, 5), X, 1.0),
        r"grad has shape \(2, 4, 5\); allowed is \(2, 4, 4\)",
    ),
    (lambda: ops().gram_backward(torch.zeros(2, 4, 4).half(), X, 1.0), "grad is not float32"),
    (
        lambda: ops().gram(X, 1.0, "half"),
        "precision is 'half'; allowed are 'float32', 'tf32', 'bfloat16'",
    ),
    (lambda: coupling(PLANE), r"x has shape \(4, 6, 6\)"),
    (lambda: coupling(channels=5), "channels is 5; allowed is an even number of 2 to 256"),
    (lambda: coupling(channels=258), "channels is 258; allowed is an even number of 2 to 256"),
    (lambda: coupling(kernel=2), "kernel is 2; allowed are 1 and 3"),
    (lambda: coupling(clamp=-1.0), "clamp is -1; allowed is 0 for none or a positive number"),
    (lambda: coupling(activation="relu"), "activation is 'relu'; allowed are 'relu6', 'softplus'"),
    (lambda: coupling(weights=3), r"weights has shape \(3\); allowed is a contiguous \(176\)"),
    (
        lambda: ops().coupling_inverse(X, torch.zeros(300), 6, "relu6", 0.0),
        r"y has shape \(2, 4, 6, 6\); allowed are 6 channels",
    ),
    (lambda: coupling_backward(X.half()), "grad has another type than x"),
    (lambda: coupling_backward(X[:, :2]), r"grad has shape \(2, 2, 6, 6\); allowed is x's"),
    (lambda: coupling_packed(packed=PLANE), "packed is not uint8"),
    (
        lambda: coupling_packed(packed=torch.zeros(16, dtype=torch.uint8)),
        r"packed has shape \(16\); allowed is a contiguous \(\d+\), from coupling_pack",
    ),
    (lambda: coupling_packed(x=X.half()), r"packed has shape .*, from coupling_pack for images"),
    (lambda: coupling_packed_backward(X.half()), "grad has another type than x"),
    (lambda: coupling_packed_backward(state=PLANE), "state is not a contiguous tensor of uint8"),
    (
        lambda: coupling_packed_backward(state=torch.zeros(2, 6, 6, 5, dtype=torch.uint8)),
        r"state has shape \(2, 6, 6, 5\); allowed is \(2, 6, 6, 304\)",
    ),
    (lambda: content_style(X[:1]), r"gt has shape \(1, 4, 6, 6\); allowed is sr's, \(2, 4, 6, 6\)"),
    (lambda: content_style(X.half()), "gt and sr are not of one type"),
    (lambda: content_style(top_m=5), "top_m is 5; allowed is 0 to 4"),
    (lambda: content_style(top_m=-1), "top_m is -1; allowed is 0 to 4"),
    (lambda: content_style(bins=1), "bins is 1"),
    (lambda: content_style_backward(1, torch.ones(3)), r"grad has shape \(3\); allowed is \(2\)"),
    (lambda: content_style_backward(6, torch.zeros(2, 2)), "kept is not int64"),
    (lambda: content_style_backward(6, torch.zeros(2, 9).long()), r"kept has shape \(2, 9\)"),
    (lambda: content_style_backward(7, torch.zeros(2, 3)), r"weights has shape \(2, 3\)"),
    (lambda: content_style_backward(8, torch.zeros(2, 2)), r"moments has shape \(2, 2\)"),
    (lambda: content_style_backward(9, torch.zeros(2, 2, 3)), r"difference has shape \(2, 2, 3\)"),
    (lambda: patches(size=7), "patch_size is 7; allowed is 1 to the height and width of x, 6 x 6"),
    (lambda: patches(stride=0), "stride is 0; allowed is at least 1"),
    (lambda: patches(weight1=torch.zeros(5, 8)), r"weight1 has shape \(5, 8\), which does not fit"),
    (lambda: patches(weight2=torch.zeros(5, 7).T), "weight2 is not contiguous"),
    (lambda: patches_packed(PLANE), "packed is not uint8"),
    (
        lambda: patches_packed(torch.zeros(16, dtype=torch.uint8)),
        r"packed has shape \(16\); allowed is a contiguous \(\d+\), from patches_pack",
    ),
    (
        lambda: ops().patches_pack(torch.zeros(5, 9), torch.zeros(7, 5), 0, 1),
        "patch_size is 0; allowed is 1 to 4096",
    ),
    (
        lambda: ops().patches_pack(torch.zeros(5, 9), torch.zeros(7, 5), 3, 0),
        "stride is 0; allowed is at least 1",
    ),
    (lambda: patches(bias1=torch.zeros(4)), r"bias1 has shape \(4\), which does not fit"),
    (lambda: patches(bias2=torch.zeros(7).half()), "bias2 is not float32"),
    (lambda: patches_backward(grad=torch.zeros(8, 16, 6)), r"grad has shape \(8, 16, 6\)"),
    (
        lambda: patches_backward(embedding=torch.zeros(8, 16, 6)),
        "embedding is not what the forward",
    ),
    (lambda: patches_backward(state=torch.zeros(16, 2, 8)), "state is not what the forward"),
    (lambda: sinkhorn(PLANE[:, :5]), r"similarity has shape \(4, 5, 6\); allowed is \(B, N, N\)"),
    (lambda: sinkhorn(MATRICES.double()), "similarity is none of float32, float16 and bfloat16"),
    (lambda: sinkhorn(cost="cheap"), "cost is 'cheap'; allowed are 'hard', 'easy', 'exp'"),
    (lambda: sinkhorn(epsilon=0.0), "epsilon is 0; allowed is a finite number above 0"),
    (lambda: sinkhorn(iterations=0), "iterations is 0; allowed is 1 to 1000000"),
    (lambda: sinkhorn(tolerance=-1.0), "tolerance is -1; allowed is None or a number of at least"),
    (lambda: sinkhorn_backward(MATRICES[:1]), r"grad has shape \(1, 5, 5\); allowed is similarity"),
    (lambda: monce(X), r"query has shape \(2, 4, 6, 6\); allowed are 3 dimensions"),
    (lambda: monce(key=MATRICES[:1]), r"key has shape \(1, 5, 5\); allowed is query's"),
    (lambda: monce(key=MATRICES.half()), "key is of another type than query"),
    (lambda: monce(temperature=0.0), "temperature is 0; allowed is a finite number above 0"),
    (lambda: monce(negative_weight=-1.0), "negative_weight is -1; allowed is a finite number"),
    (lambda: monce(plan_gradient="none"), "plan_gradient is 'none'; allowed are 'exact', 'detach'"),
    (lambda: monce(kept=6), "kept is 6; allowed is 0 to 5"),
    (
        lambda: monce_backward(torch.zeros(2, 4), torch.zeros(2, 1, 5).int()),
        r"grad has shape \(2, 4\); allowed are the first two dimensions of query",
    ),
    (
        lambda: monce_backward(torch.zeros(2, 5), torch.zeros(2, 2, 5).int()),
        r"state has shape \(2, 2, 5\); allowed is the forward's, \(maps, 1 \+ 4 kept",
    ),
    (lambda: dec(PLANE), r"sr has shape \(4, 6, 6\); allowed are 2 dimensions"),
    (lambda: dec(gt=PATCHES[:, :4]), r"gt has shape \(6, 4\); allowed is sr's, \(6, 5\)"),
    (lambda: dec(gt=PATCHES.double()), "gt is none of float32, float16 and bfloat16"),
    (
        lambda: dec(negative_temperature=0.0),
        "negative_temperature is 0; allowed is a finite number",
    ),
    (lambda: dec(temperature="above"), "temperature is 'above'; allowed are 'inside', 'outside'"),
    (lambda: dec(similarity="ssim"), "similarity is 'ssim'; allowed are 'rmse', 'l2'"),
    (lambda: dec(threshold_db=float("inf")), "threshold_db is inf; allowed is a finite number"),
    (lambda: dec(max_value=-1.0), "max_value is -1; allowed is a finite number above 0"),
    (lambda: dec(norm_floor=0.0), "norm_floor is 0; allowed is a finite number above 0"),
    (lambda: dec_backward(torch.ones(1), torch.ones(2, 6)), r"grad has shape \(1\)"),
    (
        lambda: dec_backward(torch.ones(()), torch.ones(2, 5)),
        r"statistics has shape \(2, 5\); allowed is \(2, 6\)",
    ),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refusals(number: int) -> None:
    call, message = REFUSED[number]
    with pytest.raises(RuntimeError, match=message):
        call()


def test_nothing_is_computed_of_nothing() -> None:
    assert ops().gram(X[:, :0], 1.0).shape == (2, 0, 0)
    assert torch.equal(ops().gram(X[..., :0], 1.0), torch.zeros(2, 4, 4))
    assert ops().sinkhorn(MATRICES[:0], "hard", 1.0, 5, None).shape == (0, 5, 5)
    losses, state = ops().monce(MATRICES[:0], MATRICES[:0], *MONCE.values(), 0)
    assert losses.shape == (0, 5) and state.shape == (0, 1, 5)
    loss, statistics = dec(PATCHES[:0], PATCHES[:0])
    assert loss == 0 and statistics.shape == (2, 0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (2, 40, 12, 16), (2, 150, 6, 8)])
def test_the_gradient_takes_the_place_of_gt(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    both = draws.randn(2 * shape[0], *shape[1:]).contiguous(memory_format=layout)
    gt, sr = both[: shape[0]], both[shape[0] :]
    statistics = ops().content_style(gt, sr, (shape[1] + 1) // 2, 1.1, 1.4, 16)[4:]
    grads = draws.rand(4, 1).expand(4, shape[0]).unbind()
    expected = ops().content_style_backward(*grads, gt, sr, *statistics)
    before = sr.clone()
    assert ops().content_style_backward_into_(gt, *grads, gt, sr, *statistics) is None
    assert torch.equal(gt, expected) and torch.equal(sr, before) and expected.norm() > 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_patches_of_some_maps_of_a_batch(layout: torch.memory_format) -> None:
    x = draws.randn(3, 5, 9, 10).contiguous(memory_format=layout)
    weights = [draws.randn(40, 16), draws.randn(40), draws.randn(4, 40), draws.randn(4)]
    embedding, state = ops().patches(x, *weights, 4, 2)
    own, own_state = ops().patches(x[:2], *weights, 4, 2)
    assert torch.equal(embedding[:10], own) and torch.equal(state[:, :, :10], own_state)
    grad, sizes = draws.randn_like(own), (x[:2], weights[0], weights[2], 4, 2)
    expected = ops().patches_backward(grad, own, own_state, *sizes)
    got = ops().patches_backward(grad, embedding[:10], state[:, :, :10], *sizes)
    assert torch.equal(got, expected) and expected.norm() > 0


def test_monce_differentiates_in_two_halves_where_its_history_is_large() -> None:
    """So many iterations are not made, but the workspace has room for them."""
    query, key = (F.normalize(draws.randn(5, 6, 3), dim=2) for _ in range(2))
    grad = draws.randn(5, 6)
    options = (MONCE | {"epsilon": 10.0, "iterations": 100_000}).values()

    made = []

    def gradient(maps: slice) -> Tensor:
        _, state = ops().monce(query[maps], key[maps], *options, 6)
        made.append(state[:, 0, 0])
        found: Tensor = ops().monce_backward(grad[maps], query[maps], key[maps], state, *options)
        return found

    host = load(str(emulated.module("plain")))
    host.use_older("monce", True)  # the newer ones keep no such history
    try:
        for count, launches in ((5, 3), (1, 2)):  # with the forward's
            host.count(True)
            gradient(slice(count))
            assert host.counted()[0] == launches
            host.count(False)
        one_by_one = torch.cat([gradient(slice(i, i + 1)) for i in range(5)])
        assert torch.equal(gradient(slice(5)), one_by_one)
    finally:
        host.count(False)
        host.use_older("monce", False)
    assert one_by_one.abs().amin((1, 2)).min() > 0
    assert (made[-1] > 0).all()  # so that the state is used


def test_a_device_may_use_older_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    library = emulated.module("plain")
    host = load(str(library))
    monkeypatch.setattr(native, "cuda_library", lambda: library)
    # As in csrc/cuda/variants.h.
    for number, op in enumerate(("coupling", "monce", "patches", "content_style")):
        assert host.newest(number)
        assert native.use_older_cuda_kernels(op, 1, True) and host.newest(number)
        assert native.use_older_cuda_kernels(op, 0, True) and not host.newest(number)
        assert native.use_older_cuda_kernels(op, 0, False) and host.newest(number)
        native.use_older_cuda_kernels(op, 1, False)
    assert not native.use_older_cuda_kernels("gram", 0, True)
