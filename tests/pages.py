"""The code on the pages of documentation, for the tests that run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADING_OR_BLOCK = re.compile(r"^#+ ([^\n]+)$|^( *)```([^\n]*)\n(.*?)^\2```", re.M | re.S)

STAND_INS = """
import torch
import torch.nn.functional
import mghf_fast
from mghf_fast import MGHFLoss
torch.manual_seed(0)
device, l1 = torch.device("cpu"), torch.nn.functional.l1_loss
torch.Tensor.cuda = torch.nn.Module.cuda = lambda self: self
sr, gt = torch.rand(2, 2, 3, 64, 64)
sr.requires_grad_()
dino = lambda image: image.flatten(1)
similarity = torch.rand(2, 5, 5)
query, key = torch.nn.functional.normalize(torch.randn(2, 2, 5, 8), dim=3)
net = torch.nn.Conv2d(3, 3, 3, padding=1)
batches = [(torch.rand(2, 3, 64, 64), gt)]
"""
"""The reader's own names in the pages' Python."""


def blocks_of(text: str) -> dict[str, str]:
    """The blocks of code by heading and language: ``{"KAIR: python": code}``, ``"KAIR: plain"`` for
    a block without a language, ``"KAIR: python 2"`` for the second of a language."""
    found: dict[str, str] = {}
    current = "top"
    for heading, indent, language, code in HEADING_OR_BLOCK.findall(text):
        if heading:
            current = heading
            continue
        name = f"{current}: {language or 'plain'}"
        names = (name, *(f"{name} {number}" for number in range(2, 100)))
        code = re.sub(rf"^{indent}", "", code, flags=re.M)
        found[next(n for n in names if n not in found)] = code
    return found


def blocks(page: str) -> dict[str, str]:
    return blocks_of((ROOT / page).read_text())


def python_runs(code: str, then: str = "") -> None:
    """Runs a page's Python in a process of its own, with the reader's names, and then ``then``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{STAND_INS}\n{code}\n{then}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
