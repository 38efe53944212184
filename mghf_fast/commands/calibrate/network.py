"""The network whose gradients are compared: the user's, the shipped one, or just the pixels."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from ..demo.network import START_NAME, shipped_start
from ..demo.settings import SCALE


class Picture(nn.Module):
    """Trains the picture itself: a parameter, initially zero, is added to the input."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = x + self.change
        return changed


def make_network(call: str | None, scale: int, batch: int, crop: int) -> tuple[str, nn.Module]:
    """The name of the trained parameters for the report, and the network.

    Raises:
        ValueError: ``call`` does not make a network; or it is None and none ships for the scale.
    """
    if call is None:
        if scale == 1:
            return "the pixels of the pictures", Picture(batch, 3, crop, crop)
        if scale != SCALE:
            raise ValueError(
                f"the network that ships is for scale {SCALE}, the pairs are of {scale}: "
                "name yours with --network"
            )
        return f"the parameters of {START_NAME}", shipped_start()
    module, _, name = call.partition(":")
    if not module or not name:
        raise ValueError(f"--network must be MODULE:NAME, got {call!r}")
    sys.path.insert(0, "")  # finds modules in the current folder, as `python -m` does
    try:
        network = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"--network {call}: {error}") from error
    finally:
        sys.path.remove("")
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"--network {call} must give a torch.nn.Module, got {type(network).__name__}"
        )
    return f"the parameters of {call}", network


def load_weights(network: nn.Module, path: Path) -> None:
    """Loads a file's tensors, or those under the trainers' keys ``params_ema`` or ``params``.

    Raises:
        ValueError: the file does not hold weights, or holds another network's.
        OSError: the file cannot be read.
    """
    with path.open("rb"):  # gives a clearer message for a missing file
        pass
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for key in ("params_ema", "params", "state_dict"):
                if isinstance(state, dict) and key in state:
                    state = state[key]
                    break
        network.load_state_dict(state)  # type: ignore[arg-type]
    except Exception as error:  # unpicklers and load_state_dict raise many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--weights {path}: {reason}") from error
