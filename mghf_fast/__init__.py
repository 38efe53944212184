"""mghf_fast: fused perceptual losses for image super-resolution (MGHF, HF-Diff, DECLoss)."""

import warnings

from . import functional, losses, native, nn
from .backends import available_backends, use_backend
from .losses import (
    ContentStyleLoss,
    DECLoss,
    HFDiffLoss,
    LocalInformationLoss,
    MGHFLoss,
)
from .nn import DetailFeatureExtractor

__version__ = "0.1.0"

if native.is_bare_source_tree():
    warnings.warn(native.BARE_SOURCE_TREE, RuntimeWarning, stacklevel=2)

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
