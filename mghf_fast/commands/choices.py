"""What the library allows, for the options of commands: written here once more, so that ``--help``
waits for no PyTorch. ``tests/test_arrows.py`` holds every line to the library's own."""

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
