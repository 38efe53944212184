"""Detects that the package is imported from a checkout that is not installed."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

BARE_SOURCE_TREE = (
    f"mghf_fast comes from a source tree, {str(Path(__file__).parent.parent)!r}, which has no "
    "kernels in place and hides an installed package: start Python in another folder, or install "
    "the tree in place with `pip install -e .`"
)


@functools.cache
def is_bare_source_tree() -> bool:
    """Whether the package was imported from a checkout only because Python was started there: it
    then has neither Triton kernels, which lie outside the package, nor compiled ones. Kernels that
    an editable installation of another checkout offers do not count."""
    found = importlib.util.find_spec("mghf_fast.kernels")
    if found is None or found.origin is None:
        return True
    package = Path(__file__).resolve().parent
    places = (package / "kernels", package.parent / "kernels")
    return Path(found.origin).resolve().parent not in [place.resolve() for place in places]
