"""Checkpoints, written atomically and read without running code.

A checkpoint is written beside the old one, flushed to the disk and then renamed over it, so that a
complete checkpoint is left whenever the process or the machine dies. It holds only tensors, numbers
and text, and is read with ``weights_only``.
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
"""The values of settings that a checkpoint from before 2026-11-29 lacks: there were no others."""


def write(path: Path, content: bytes) -> None:
    """Writes a file atomically (:func:`mghf_fast.commands.files.write_whole`).

    Raises:
        PretrainError: the system refuses (for example, the disk is full); an earlier file of that
            name is then untouched, and no temporary file is left.
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
        PretrainError: not a complete checkpoint, or one with another configuration.
    """
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises many types
        raise PretrainError(f"{path} is not a whole checkpoint") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise PretrainError(f"{path} is no checkpoint of this version's format")
    there = {**UNSAID, **json.loads(state["configuration"])}
    here = json.loads(json.dumps(configuration))
    if different := list(differences(there, here)):
        told = "; ".join(f"{name} is {a} there and {b} here" for name, a, b in different)
        raise PretrainError(f"{path} is a checkpoint of another configuration: {told}")
    return state
