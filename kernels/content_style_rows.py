"""Row numbers of the float64 statistics of a map, which the forward of `content_style` computes."""

from __future__ import annotations

import triton.language as tl

# The backward gets the first MOMENTS rows. Its gradient of the correlation is, per pixel and times
# -n, scale (G - mean G) - slope (S - mean S) = excess (S - mean S) - scale (D - mean D).
MOMENTS = tl.constexpr(6)
SCALE = tl.constexpr(3)
SLOPE = tl.constexpr(4)
EXCESS = tl.constexpr(5)
DISTANCE = tl.constexpr(6)  # 1 - rho
SQUARE = tl.constexpr(7)  # mean D^2
STATISTICS = tl.constexpr(8)
