"""Whether this machine has what `make gpu` needs, in one sentence. It imports nothing of that."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

PYTHON, TORCH, TRITON = (3, 10), (2, 10), (3, 5)


def version_of(*packages: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:2])


def problem(
    python: tuple[int, ...], torch: str | None, triton: str | None, has_gpu: bool
) -> str | None:
    """A sentence on the first requirement that is missing, or ``None``."""
    found = {
        "Python": (".".join(map(str, python)), PYTHON),
        "torch": (torch, TORCH),
        "triton": (triton, TRITON),
    }
    for name, (version, least) in found.items():
        wanted = ".".join(map(str, least))
        if version is None:
            return f"{name} {wanted} or newer is needed, and there is none"
        if numbers(version) < least:
            return f"{name} {wanted} or newer is needed, this is {version}"
    return None if has_gpu else "torch sees no CUDA device here"


def problem_here() -> str | None:
    torch_version = version_of("torch")
    has_gpu = False
    if torch_version is not None:
        import torch

        has_gpu = torch.cuda.is_available()
    triton_version = version_of("triton", "pytorch-triton")
    return problem(tuple(sys.version_info[:2]), torch_version, triton_version, has_gpu)


def commit() -> str:
    """The commit of this package: MGHF_COMMIT, for machines without a repository; or that of git,
    with a plus if files differ from it; or "unknown"."""
    if given := os.environ.get("MGHF_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


if __name__ == "__main__":
    text = None if "--dry-run" in sys.argv else problem_here()
    sys.exit(text and f"make gpu: {text}")
