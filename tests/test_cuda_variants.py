"""The emulated CUDA kernels in the comparison of newer with older ones that `make gpu` makes."""

from __future__ import annotations

import pytest
from emulated import needs_modules
from gpu_runs import measured

from benchmarks import gpu_parts, gpu_variants
from mghf_fast import native

pytestmark = needs_modules


@pytest.mark.parametrize(("op", "part"), [n[:2] for n in gpu_variants.NEWER_KERNELS[:7]])
def test_plain_newer_and_older_kernels_agree(
    op: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through everything but the clock."""
    monkeypatch.setattr(gpu_parts, "SLOW", 0.0)
    switched: list[tuple[str, bool]] = []
    switch = native.use_older_cuda_kernels

    def watch(op: str, device: int, older: bool) -> bool:
        switched.append((op, older))
        return switch(op, device, older)

    monkeypatch.setattr(native, "use_older_cuda_kernels", watch)
    size = {"coupling": 8, "patches": 32, "monce": 64, "content_style": 8}[op]
    (pair,) = (
        p | {"shape": [1, size], "kernels": False}
        for p in gpu_variants.newer_pairs()
        if (p["op"], p.get("part"), p["a"]["precision"]) == (op, part, "float32")
        and p["shape"] == [1, 512]
    )
    rows = measured([pair], monkeypatch, patience=3600.0)
    assert [r["part"].get("failure") for r in rows] == [None, None]
    assert rows[1]["part"]["difference"] <= 2e-5
    assert [name for name, older in switched if older] == [op]
    assert switched[-len(gpu_variants.OLDER) :] == [(name, False) for name in gpu_variants.OLDER]
