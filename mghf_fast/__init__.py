"""mghf_fast: fused perceptual losses for image super-resolution (MGHF, HF-Diff, DECLoss).

Public names are imported at their first use, so that the command line can print its help without
PyTorch. A program that only runs a graph exported from these losses needs none of them: it imports
:mod:`mghf_fast.ops`, which registers the operators.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .source_tree import BARE_SOURCE_TREE, is_bare_source_tree

if TYPE_CHECKING:
    from . import functional, losses, nn
    from .backends import available_backends, use_backend
    from .losses import (
        ContentStyleLoss,
        DECLoss,
        HFDiffLoss,
        LocalInformationLoss,
        MGHFLoss,
    )
    from .nn import DetailFeatureExtractor

if is_bare_source_tree():
    warnings.warn(BARE_SOURCE_TREE, RuntimeWarning, stacklevel=2)

_MODULES = ("backends", "functional", "losses", "native", "nn", "ops", "weights")
_HOMES = {
    "ContentStyleLoss": "losses",
    "DECLoss": "losses",
    "DetailFeatureExtractor": "nn",
    "HFDiffLoss": "losses",
    "LocalInformationLoss": "losses",
    "MGHFLoss": "losses",
    "available_backends": "backends",
    "use_backend": "backends",
}

__all__ = [
    "ContentStyleLoss",
    "DECLoss",
    "DetailFeatureExtractor",
    "HFDiffLoss",
    "LocalInformationLoss",
    "MGHFLoss",
    "__version__",
    "available_backends",
    "functional",
    "losses",
    "nn",
    "use_backend",
]


if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f".{name}", __name__)
        if name in _HOMES:
            value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
            globals()[name] = value  # later look-ups bypass this function
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    special = {name for name in globals() if name.startswith("__")}
    return sorted({*special, *_MODULES, *_HOMES})
