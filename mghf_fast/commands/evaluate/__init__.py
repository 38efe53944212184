"""How super-resolved pictures are measured: ``mghf-fast evaluate``, the demo and the studies."""
