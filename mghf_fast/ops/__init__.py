"""The contract of every op: operators, shapes, gradients, autocast rule and choice of backend.

Importing this package registers all of them with `torch.library` under `mghf_fast::`.
"""

from . import content_style, coupling, dec, entropy, gram, monce, patches, sinkhorn
from ._dispatch import Op

OPS: dict[str, Op] = {
    module.OP.name: module.OP
    for module in (coupling, entropy, gram, content_style, patches, sinkhorn, monce, dec)
}
"""Every op by name."""

__all__ = ["OPS", "Op"]
