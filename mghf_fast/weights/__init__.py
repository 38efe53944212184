"""The trained weights that come with the package, each with its model card beside it.

They are checked against the digests below, so that a truncated or altered file is refused.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SHA256: dict[str, str] = {
    "perceptual-v1": "4ece7276f9f75eb9f2628f66484c95d510b7c08c0d8d5d7e9242e99fe0477637",
    "procedural-v1": "68bbfdd6bd2ba7e795dadb2245642433471f7cfdac3fe5feba0fe64830d058f5",
}
"""Name -> digest of the file, for the feature extractors that a loss accepts by name."""

OTHER_SHA256: dict[str, str] = {
    "perceptual-v1": "4ece7276f9f75eb9f2628f66484c95d510b7c08c0d8d5d7e9242e99fe0477637",
    "demo-start": "87266a3c0456e629c7bda53e8bd8db28e70a96bff70f29787ac1fee63c842154",
}
"""The same for other weights. ``demo-start`` is the super-resolution network that the demo
fine-tunes; ``python -m benchmarks.studies.start_network --ship`` writes it and this digest."""

_FOLDER = Path(__file__).parent


def path(name: str) -> Path:
    """The path of shipped weights.

    Raises:
        ValueError: no weights of that name ship.
    """
    if name not in SHA256 and name not in OTHER_SHA256:
        raise ValueError(f"name must be one of {', '.join(SHA256) or 'none'}, got {name!r}")
    return _FOLDER / f"{name}.safetensors"


def read(name: str) -> bytes:
    """The content of shipped weights, checked against its digest.

    Raises:
        ValueError: no weights of that name ship, or the file is not the one that shipped.
        FileNotFoundError: the file is missing.
    """
    file = path(name)
    if not file.is_file():
        raise FileNotFoundError(f"the weights {name!r} are missing from this installation: {file}")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != {**SHA256, **OTHER_SHA256}[name]:
        raise ValueError(
            f"the weights {name!r} are not the ones that shipped (their SHA-256 differs): {file} "
            "was truncated or altered; reinstall mghf_fast"
        )
    return content


def card(name: str) -> dict[str, Any]:
    """The model card of shipped weights: data, command, steps, accuracy, date, digest."""
    found: dict[str, Any] = json.loads(path(name).with_suffix(".json").read_text())
    return found
