"""The library's allowed values, for the options of commands: repeated here so that ``--help`` need
not import PyTorch. ``tests/test_arrows.py`` compares every line with the library's own."""

from __future__ import annotations

VARIANTS = ("c", "n")
PRESETS = ("balanced", "2026", "2025")
DEFAULT_PRESET = "balanced"
DEFAULT_EXTRACTOR = "perceptual-v1"

STEMS = ("conv", "residual", "squeeze")
SQUEEZES = (2, 4, 8)
SUBNETS = ("bottleneck", "conv2")
ACTIVATIONS = ("relu6", "softplus", "leaky_relu")
STARTS = ("curved", "linear")
