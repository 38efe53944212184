"""The table by which "auto" chooses between CUDA and Triton."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from mghf_fast import preferences
from mghf_fast.backends import BACKENDS
from mghf_fast.ops import OPS, _dispatch
from mghf_fast.preferences import Rule, preferred_kernels

RULES = [
    Rule("gram", ("triton", "cuda"), (torch.float16, torch.bfloat16)),
    Rule("gram", ("triton", "cuda"), below=100),
    Rule("gram", ("cuda", "triton")),
]


@pytest.mark.parametrize(
    ("op", "dtype", "size", "expected"),
    [
        ("gram", torch.float32, 99, "triton"),
        ("gram", torch.float32, 100, "cuda"),
        ("gram", torch.bfloat16, 100, "triton"),
        ("dec", torch.float32, 100, preferences.DEFAULT[0]),
    ],
)
def test_the_first_rule_that_fits(op: str, dtype: torch.dtype, size: int, expected: str) -> None:
    assert preferred_kernels(op, dtype, (1, size), RULES)[0] == expected


def test_the_size_of_a_problem() -> None:
    assert preferences.size_of("monce", (128, 441, 64)) == 441
    assert preferences.size_of("sinkhorn", (128, 441, 441)) == 441
    assert preferences.size_of("gram", (1, 128, 5, 7)) == 128 * 35
    # 100 patches of 256 x 256, 441 of the paper's 512 x 512, and 1,764 of 1024 x 1024.
    found = {
        (op, dtype): [preferred_kernels(op, dtype, (128, n, 64))[0] for n in (100, 441, 1764)]
        for op in ("sinkhorn", "monce")
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert found["monce", torch.float32] == found["monce", torch.bfloat16]
    assert found["monce", torch.float32] == ["cuda", "cuda", "cuda"]
    assert found["sinkhorn", torch.float32] == ["cuda", "cuda", "cuda"]
    assert found["sinkhorn", torch.bfloat16] == ["cuda", "triton", "cuda"]


def test_large_maps_of_monce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that exceed a block are streamed; on capability 9.0 those that exceed a cluster."""
    monkeypatch.setattr(preferences, "tuned", lambda device: ())
    for capability, size, expected in (
        ((8, 0), 448, "cuda"),
        ((8, 9), 449, "triton"),
        ((9, 0), 1792, "cuda"),
        ((9, 0), 1793, "triton"),
        ((12, 0), 1792, "triton"),
    ):
        x = SimpleNamespace(device=torch.device("cuda"), is_cuda=True, dtype=torch.float32,
                            shape=(128, size, 64))  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert preferences.in_order("monce", [x], BACKENDS)[0] == expected


def test_rules_for_the_gradients_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """They don't apply to other calls; what was tuned, without weights' gradients, to none of
    theirs."""
    x = torch.zeros(1, 4, 3, 3)
    tuned = (Rule("coupling", ("cuda", "triton")),)
    monkeypatch.setattr(preferences, "tuned", lambda device: tuned)
    assert preferences.in_order("coupling", [x], BACKENDS)[0] == "cuda"
    assert preferences.in_order("coupling", [x], BACKENDS, need_weights=True)[0] == "triton"
    assert preferences.in_order("gram", [x], BACKENDS, need_weights=True)[0] == "cuda"


def test_the_table_is_of_ops_and_their_kernels() -> None:
    for rule in preferences.RULES:
        assert rule.op in OPS
        assert sorted(rule.backends) == ["cuda", "triton"]
        assert rule.least < rule.below


def test_auto_follows_the_table(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Among the backends that can run; the reasons why others cannot are logged."""
    op = _dispatch.Op("gram")
    can = {"cuda": True, "triton": True, "reference": True}
    for backend in can:
        module = SimpleNamespace(forward=None, backward=None)
        module.can_run = lambda *_, b=backend: None if can[b] else f"{b} cannot"
        op.implement(backend, module)
    monkeypatch.setattr(_dispatch, "unavailable_reasons", dict)
    monkeypatch.setattr(_dispatch, "triton_is_interpreted", lambda: False)
    monkeypatch.setattr(preferences, "RULES", RULES)
    small, large = torch.zeros(99), torch.zeros(100)
    assert (op.preferred(small), op.preferred(large)) == ("triton", "cuda")
    can["triton"] = False
    with caplog.at_level(logging.DEBUG, "mghf_fast"):
        assert op.preferred(small) == "cuda"
    assert "triton cannot run gram: triton cannot" in caplog.text
    can["cuda"] = False
    assert op.preferred(small) == op.preferred() == "reference"


def test_every_backend_is_in_order_once() -> None:
    for op in OPS:
        assert sorted(preferences.in_order(op, [torch.zeros(1, 2, 2)], BACKENDS)) == sorted(
            BACKENDS
        )
    assert preferences.in_order("gram", [], BACKENDS) == BACKENDS
