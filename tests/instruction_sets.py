"""Runs a test file again in a process that is limited to one instruction set of the CPU kernels."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch

from mghf_fast import native

CAPABILITIES = ("default", "avx2", "avx512")
BFLOAT16_CAPABILITIES = ("avx512_bf16", "amx")
"""Instruction sets for which only ops with products of bfloat16 have kernels."""
IN_CHILD = "MGHF_TEST_CAPABILITY_CHILD"

in_parent = pytest.mark.skipif(
    IN_CHILD in os.environ or native.unavailable_reason() is not None,
    reason="a run under one instruction set, or no compiled CPU kernels here",
)

PRINT_CAPABILITY = """
from mghf_fast import native
import torch
assert native.unavailable_reason() is None
print(torch.ops.mghf_native.cpu_capability())
"""


def run_under(capability: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments, the kernels limited to ``capability``."""
    environment = os.environ | {"MGHF_CPU_CAPABILITY": capability, IN_CHILD: "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


@functools.cache
def used_under(capability: str) -> str:
    """The instruction set that a process limited to ``capability`` uses."""
    return run_under(capability, "-c", PRINT_CAPABILITY).stdout.strip()


def run_file_under(capability: str, file: str, *selection: str, bfloat16: bool = False) -> None:
    """Passes if the file's tests pass under ``capability``; skips if the machine lacks it, or if
    this process uses the same kernels anyway: without products of bfloat16 an op has none beyond
    AVX-512."""
    used = used_under(capability)
    if used != capability:
        pytest.skip(f"this machine or build has no {capability}, its best is {used}")
    own = torch.ops.mghf_native.cpu_capability()
    if not bfloat16 and own in BFLOAT16_CAPABILITIES:
        own = "avx512"
    if used == own:
        return
    options = ["-q", "-x", "-p", "no:cacheprovider", *selection]
    result = run_under(capability, "-m", "pytest", *options, file)
    assert result.returncode == 0, result.stdout + result.stderr
