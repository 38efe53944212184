"""Checkpoints: whole or not there, and never a program.

A checkpoint is written beside the old one, brought to the disk and then renamed over it, so that
whenever the process or the machine dies, one whole checkpoint is left. It holds tensors, numbers
and text only, and is read with ``weights_only``, which runs no code.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

from ..files import write_whole
from .distributed import differences
from .settings import PretrainError

FORMAT = 1
NAME = "checkpoint.pt"
UNSAID = {"objective": "classes", "init": "linear"}
"""What a checkpoint means by leaving it out: before 0.2 there was nothing else."""


def write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all (:func:`mghf_fast.commands.files.write_whole`).

    Raises:
        PretrainError: the system refuses (a full disk, for one); the earlier file of that name is
            then untouched, and nothing else is left behind.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        kept = " (the earlier one is whole)" if path.exists() else ""
        raise PretrainError(f"{path} cannot be written: {error.strerror}{kept}") from error


def encode(configuration: dict[str, Any], state: dict[str, Any]) -> bytes:
    """A checkpoint's bytes."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "configuration": json.dumps(configuration), **state}, buffer)
    return buffer.getvalue()


def decode(content: bytes, path: Path, configuration: dict[str, Any]) -> dict[str, Any]:
    """The state in a checkpoint's bytes, which came from ``path``.

    Raises:
        PretrainError: it is no checkpoint, not a whole one, or one of another configuration.
    """
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of a broken file, nearly anything
        raise PretrainError(f"{path} is not a whole checkpoint") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise PretrainError(f"{path} is no checkpoint of this version's format")
    there = {**UNSAID, **json.loads(state["configuration"])}
    here = json.loads(json.dumps(configuration))
    if different := list(differences(there, here)):
        told = "; ".join(f"{name} is {a} there and {b} here" for name, a, b in different)
        raise PretrainError(f"{path} is a checkpoint of another configuration: {told}")
    return state
