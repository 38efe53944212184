"""Measures super-resolved pictures for ``mghf-fast evaluate``, the demo and the studies."""
