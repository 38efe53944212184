"""The parts of `make gpu`, their order, and how long each may take: `--dry-run` prints it.

The most important parts come first: whether results are right, the newer kernels against the older
ones, the time of "auto" at the shapes of training, the tests. Other libraries and eager PyTorch do
not change from run to run: they are only measured with --baselines, which leaves out `UNLESS`, and
otherwise taken from a committed result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A part that may take at most ``seconds``."""

    name: str
    seconds: float
    what: str


PLAN = (
    Part("ceilings", 10, "bandwidth, rates of products, what a launch costs"),
    Part("values", 13, "every op against the reference in float32"),
    Part("newer", 90, "newer CUDA kernels against older ones and by precision, each twice in turn"),
    Part("profile", 25, "kernels of both losses by microseconds; iterations made, by map"),
    Part("mghf_c", 20, "a step as auto has it: launched and as a graph"),
    Part("mghf_n", 12, "the same"),
    Part("own", 25, "every op as auto has it, likewise"),
    Part("flash", 35, "transport beside the package flash-sinkhorn, if it is installed"),
    Part("races", 40, "Sinkhorn's tests of the CUDA kernels under racecheck"),
    Part("tests-cuda", 45, "tests of the CUDA kernels and of the GPU"),
    Part("tests-reference", 30, "tests of the reference"),
    Part("variants", 50, "CUDA C++ against Triton, and --variants FILE, each twice in turn"),
    Part("counters", 40, "ncu of the longest kernels, where it may read counters"),
    Part("sanitizer", 40, "memcheck and racecheck of every op at a tiny size"),
    Part("tests-triton", 60, "tests of the Triton kernels"),
)  # fmt: skip
BASELINES = (
    Part("mghf_c-others", 40, "eager PyTorch, VGG-16 in its best form, LPIPS"),
    Part("mghf_n-others", 10, "eager PyTorch"),
    Part("ops-others", 30, "eager PyTorch, other Sinkhorns"),
    Part("table5", 15, "Table 5 of the paper"),
    Part("mghf_c-compile", 35, "VGG-16, LPIPS and the reference by torch.compile"),
    Part("ops-compile", 15, "torch.compile"),
    Part("mghf_n-compile", 15, "torch.compile"),
)  # fmt: skip
UNLESS = ("races", "sanitizer", "tests-triton")
"""Parts that --baselines leaves out."""
QUICK = (
    Part("ceilings", 10, "bandwidth, rates of products, what a launch costs"),
    Part("profile", 20, "kernels of both losses by microseconds"),
    Part("mghf_c", 15, "a step as auto has it"),
    Part("mghf_n", 10, "the same"),
    Part("own", 15, "every op as auto has it"),
    Part("values", 10, "every op against the reference in float32"),
    Part("tests-quick", 25, "some tests"),
)  # fmt: skip
PARTS = {part.name: part for part in (*QUICK, *PLAN, *BASELINES)}

ALL_TIME, ALL_TIME_BASELINES, ALL_TIME_QUICK = 540.0, 570.0, 105.0
LEAST = 5.0  # seconds; with less time left no part is begun
SAVING = 1.0  # seconds to start a part and to save its result


def wanted(quick: bool, baselines: bool, only: Sequence[str] | None = None) -> list[Part]:
    if only is not None:
        return [PARTS[name] for name in only]
    if quick:
        return list(QUICK)
    if baselines:
        return [part for part in PLAN if part.name not in UNLESS] + list(BASELINES)
    return list(PLAN)


def all_time(quick: bool, baselines: bool) -> float:
    return ALL_TIME_QUICK if quick else ALL_TIME_BASELINES if baselines else ALL_TIME


def described(parts: Sequence[Part], limit: float) -> str:
    """The plan as text: the latest start of each part, and how long it may take."""
    lines, begin = [], 0.0
    for part in parts:
        lines.append(f"{begin:4.0f} s  {part.seconds:3.0f} s  {part.name:15} {part.what}")
        begin += part.seconds
    over = "" if begin <= limit else "; what is over that is cut short or left out"
    return "\n".join([*lines, f"{begin:.0f} s at most, of {limit:.0f} s{over}"])
