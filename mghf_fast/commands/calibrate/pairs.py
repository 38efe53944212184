"""The pairs of pictures on which a weight is measured, and crops of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..evaluate.pictures import pair, read


def load(low: Path, high: Path, crop: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """The pairs large enough for a crop, (3, h, w) and (3, H, W) of uint8, and their scale.

    Raises:
        ValueError, OSError: no pairs, no common integer scale, or no pair that fits a crop.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    scale: int | None = None
    for found in pair(low, high, ("LR", "HR")):
        lr, hr = (
            torch.from_numpy(read(path)[0].copy()).permute(2, 0, 1) for path in (found.sr, found.hr)
        )
        here = hr.shape[1] // lr.shape[1]
        if here < 1 or hr.shape[1:] != (here * lr.shape[1], here * lr.shape[2]):
            raise ValueError(
                f"{found.name}: HR must be a whole multiple of LR, got "
                f"{hr.shape[2]} x {hr.shape[1]} for {lr.shape[2]} x {lr.shape[1]}"
            )
        if scale is not None and here != scale:
            raise ValueError(f"every pair must be of one scale; {found.name} is of {here}")
        scale = here
        if min(hr.shape[1:]) >= crop:
            pairs.append((lr, hr))
    assert scale is not None  # pair() gives at least one
    if crop % scale:
        raise ValueError(f"--crop must be a multiple of the scale {scale}, got {crop}")
    if not pairs:
        raise ValueError(f"--crop {crop} fits none of the pictures; take a smaller one")
    return pairs, scale


def draw(
    pairs: list[tuple[Tensor, Tensor]], scale: int, crop: int, batch: int, batches: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of random crops in [0, 1], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    side = crop // scale
    for _ in range(batches):
        lows, highs = [], []
        for _ in range(batch):
            low, high = pairs[below(len(pairs))]
            top, left = (below(size - side + 1) for size in low.shape[1:])
            lows.append(low[:, top : top + side, left : left + side])
            top, left = scale * top, scale * left
            highs.append(high[:, top : top + crop, left : left + crop])
        yield torch.stack(lows) / 255, torch.stack(highs) / 255
