"""The CUDA kernels of `entropy` on the host, against the float64 reference."""

from __future__ import annotations

from pathlib import Path

import draws
import pytest
import torch
from emulated import KINDS, needs_modules, results, strided
from torch import Tensor

from mghf_fast.reference.entropy import channel_entropy

pytestmark = needs_modules


def images() -> list[tuple[Tensor, int]]:
    """Every type and layout, odd sizes, more channels than a warp has lanes, more bins than a block
    counts in its shared memory, constant maps, NaN and infinities."""
    torch.manual_seed(0)
    x = draws.randn(2, 5, 7, 9)
    x[0, 1] = 3.0
    broken = draws.randn(1, 4, 5, 5)
    broken[0, 0, 2, 2], broken[0, 1, 0, 0], broken[0, 2, 4, 4] = torch.nan, torch.inf, -torch.inf
    many = draws.randn(1, 37, 4, 5).to(memory_format=torch.channels_last)
    return [
        *[(x.to(dtype), 16) for dtype in (torch.float32, torch.float16, torch.bfloat16)],
        (x.to(memory_format=torch.channels_last), 16),
        (x[:, ::2, 1:, ::2], 256),
        (x.transpose(2, 3), 3),
        (draws.randn(1, 2, 200, 100), 32),  # two runs
        (many, 8),
        (many.half(), 300),
        (draws.randn(1, 1, 6, 6), 10000),
        (broken, 16),
        (broken.to(memory_format=torch.channels_last), 16),
        (torch.full((1, 1, 1, 1), 2.0), 2),
        (torch.tensor([6e-8, -6e-8, 65504.0, 1e-5]).half().view(1, 1, 2, 2), 4),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_entropy(kind: str, tmp_path: Path) -> None:
    problems = images() if kind == "plain" else images()[3:8] + images()[9:11]
    calls = [("entropy", (strided(x), bins)) for x, bins in problems]
    for (x, bins), found in zip(problems, results(kind, calls, tmp_path), strict=True):
        expected = channel_entropy(x.double(), bins).float()
        got = torch.from_numpy(found)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-7, equal_nan=True)
        assert (got[expected == 0] == 0).all()
