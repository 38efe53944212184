"""Shows what the loss computes: feature maps, their entropies and weights, where each term comes
from, and the transport plan between patches, as a picture or page (``mghf-fast visualize``).

It needs Pillow (``pip install "mghf_fast[visualize]"``); importing this package does not.
"""
