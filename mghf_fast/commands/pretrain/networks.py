"""The super-resolution networks whose outputs are compared with the truth: ``--networks``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ... import weights
from ..demo.network import CompactEDSR
from .settings import SHIPPED_NETWORK, PretrainError


def _content(name: str) -> bytes:
    try:
        if name == SHIPPED_NETWORK:
            return weights.read(name)
        return Path(name).read_bytes()
    except OSError as error:
        raise PretrainError(
            f"--networks {name} cannot be read: {error.strerror or error}"
        ) from error


def digests(names: tuple[str, ...]) -> list[str]:
    """SHA-256 of each file of ``--networks``.

    Raises:
        PretrainError: one cannot be read.
    """
    return [hashlib.sha256(_content(name)).hexdigest() for name in names]


def load(names: tuple[str, ...]) -> list[CompactEDSR]:
    """The networks of ``--networks``, frozen, on the CPU.

    Raises:
        PretrainError: a file cannot be read, is not a complete safetensors file, or holds another
            network's weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    networks = []
    for name in names:
        network = CompactEDSR(torch.Generator())
        try:
            network.load_state_dict(parse(_content(name)))
        except SafetensorError as error:
            raise PretrainError(f"--networks {name} is not a whole safetensors file") from error
        except RuntimeError as error:
            raise PretrainError(
                f"--networks {name} holds no weights of "
                "mghf_fast.commands.demo.network.CompactEDSR, whose outputs are wanted"
            ) from error
        network.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        networks.append(network)
    return networks
