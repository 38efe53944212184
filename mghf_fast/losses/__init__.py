"""Losses as modules."""

from .content_style import ContentStyleLoss
from .dec import DECLoss
from .distillation import DistillationTerms, Student, distillation_terms
from .hf_diff import HFDiffLoss
from .local_information import LocalInformationLoss
from .mghf import MGHFLoss
from .settings import PRESETS, Preset

__all__ = [
    "PRESETS",
    "ContentStyleLoss",
    "DECLoss",
    "DistillationTerms",
    "HFDiffLoss",
    "LocalInformationLoss",
    "MGHFLoss",
    "Preset",
    "Student",
    "distillation_terms",
]
