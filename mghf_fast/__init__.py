"""mghf_fast: fused perceptual losses for image super-resolution (MGHF, HF-Diff, DECLoss)."""

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

__version__ = "0.1.0"

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
