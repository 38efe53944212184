"""Measurements of the user's GPUs, kept in a JSON file in the user's cache folder.

For each combination of GPU, driver, torch, Triton and version of this library it holds the table
that `mghf-fast tune` measured and the kernels that were tried (:mod:`mghf_fast.trials`). A file
that is unreadable or of another format is ignored with one warning; reading never raises.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import _version
from ._warnings import warn_caller
from .backends import triton_version

FORMAT = 1
NAME = "kernels.json"
VARIABLE = "MGHF_CACHE"


def folder() -> Path:
    """``$MGHF_CACHE``, else ``mghf_fast`` in the system's cache folder."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mghf_fast"


def path() -> Path:
    return folder() / NAME


@functools.cache
def identity(device: torch.device) -> str:
    """The GPU, and the versions on which its measurements depend."""
    name = "cpu" if device.type != "cuda" else torch.cuda.get_device_name(device)
    driver = 0
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # private, and not in every build
            driver = int(getattr(torch._C, "_cuda_getDriverVersion")())  # noqa: B009
    return (
        f"{name}, driver {driver}, torch {torch.__version__}, triton {triton_version()}, "
        f"mghf_fast {_version.__version__}"
    )


@functools.cache
def _told(message: str) -> None:
    warn_caller(message, RuntimeWarning)


def read() -> dict[str, Any]:
    """identity -> ``{"tuned": ..., "trials": ...}``; empty without a readable file."""
    file = path()
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this version's is {FORMAT}")
        machines = content["machines"]
        if not all(isinstance(each, dict) for each in (machines, *machines.values())):
            raise ValueError("it holds something else")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _told(
            f"{file} cannot be used ({type(error).__name__}: {error}); what was measured on this "
            "machine's GPUs is ignored: `mghf-fast tune` writes a new file"
        )
        return {}
    return dict(machines)


@functools.cache
def _known(file: Path) -> dict[str, Any]:
    return read()


def known(device: torch.device) -> dict[str, Any]:
    """The file's entry for a device; the file is read once per process."""
    found: dict[str, Any] = _known(path()).get(identity(device), {})
    return found


def write(device: torch.device, part: str, value: Any) -> Path:
    """Stores one part of a device's entry; the file is replaced atomically.

    Raises:
        OSError: the folder or file cannot be written.
    """
    file = path()
    machines = read()
    machines.setdefault(identity(device), {})[part] = value
    _replace(file, machines)
    return file


def _replace(file: Path, machines: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "machines": machines}, indent=1) + "\n"
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=NAME, suffix=".new")
    try:
        with os.fdopen(handle, "w") as new:
            new.write(text)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _known.cache_clear()


def clear() -> Path | None:
    """Deletes the file; returns its path, or None if there was none.

    Raises:
        OSError: it cannot be deleted.
    """
    file = path()
    _known.cache_clear()
    if not file.exists():
        return None
    file.unlink()
    return file
