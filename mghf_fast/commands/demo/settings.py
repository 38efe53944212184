"""The settings of a demo run, and their checks."""

from __future__ import annotations

import shlex
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SCALE = 4
"""Super-resolution factor."""

PRETRAIN_STEPS = 1200
FINE_TUNE_STEPS = 300
SMALLEST_SIDE = 96
"""Pictures with a shorter side than this (pixels) are not used."""


class DemoError(ValueError):
    """The demo cannot continue; the message is one line for the user."""


@dataclass(frozen=True)
class DemoSettings:
    """The settings of one run.

    Args:
        out: directory for the results, made if missing.
        images: directory of the user's pictures, searched recursively; None for the bundled ones.
        steps: fine-tuning steps of each training, at least 1.
        seed: seed of everything random, 0 to 2**63 - 1.
        threads: CPU threads for PyTorch; None does not change them.
        from_scratch: first train a start network on L1 instead of using the shipped one.
        pretrain_steps: steps of that training, at least 1; only used with ``from_scratch``.
        batch: crops per step.
        patch: side of a ground-truth crop in pixels, a multiple of 4, at least 56: LIP needs more
            than one 32 x 32 patch in it.
        checkpoints: how often each fine-tuning measures the held-out photographs.
    """

    out: Path = field(default_factory=lambda: Path("demo_output"))
    images: Path | None = None
    steps: int = FINE_TUNE_STEPS
    seed: int = 0
    threads: int | None = None
    from_scratch: bool = False
    pretrain_steps: int = PRETRAIN_STEPS
    batch: int = 4
    patch: int = SMALLEST_SIDE
    checkpoints: int = 6

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("seed", 0), ("pretrain_steps", 1), ("batch", 1)):
            value = getattr(self, name)
            if value < least:
                raise DemoError(f"{name} is {value}; allowed are whole numbers from {least} up")
        if self.seed >= 2**63:
            raise DemoError(f"seed is {self.seed}; allowed are numbers below 2**63")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise DemoError(f"threads is {self.threads}; allowed are 1 to 1024")
        if self.patch % SCALE or not 56 <= self.patch <= SMALLEST_SIDE:
            raise DemoError(
                f"patch is {self.patch}; allowed are multiples of {SCALE}, 56 to {SMALLEST_SIDE}"
            )

    def command(self, *more: str) -> str:
        """The command line that repeats this run, with ``more`` words of it."""
        words = ["mghf-fast", "demo", "--steps", str(self.steps), "--seed", str(self.seed), *more]
        if self.from_scratch:
            words.append("--from-scratch")
        if self.images is not None:
            words += ["--images", str(self.images)]
        if self.threads is not None:
            words += ["--threads", str(self.threads)]
        return shlex.join([*words, "--out", str(self.out)])


def random_source(seed: int, *purpose: str | int) -> np.random.Generator:
    """A separate generator for each purpose: a new use of randomness never changes another."""
    words = [p if isinstance(p, int) else zlib.crc32(p.encode("utf-8", "replace")) for p in purpose]
    return np.random.default_rng([seed, *words])
