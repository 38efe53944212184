"""Runs CUDA kernels on the host in a separate process, which may run under a sanitizer:

    python cuda_host.py MODULE.so CALLS.pickle RESULTS.pickle

Calls are pairs of a name and its arguments: a function of the module, or else an op, which the
library registers in the namespace `mghf_cuda_host`. A tensor is passed as a `Strided`, because
pickled arrays lose their strides; bfloat16 is passed as uint16 with the same bits.
"""

import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch  # loaded first, because the module registers its ops with it
from torch import Tensor


class Strided(NamedTuple):
    """A strided view of a one-dimensional array; strides in elements."""

    memory: "np.ndarray[Any, Any]"
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load(path: str) -> Any:
    """The Python module of a library, whose ops are registered by loading it."""
    spec = importlib.util.spec_from_file_location("mghf_fast_cuda_host", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def given(argument: Any) -> Any:
    if isinstance(argument, Strided):
        memory = torch.from_numpy(argument.memory)
        tensor = memory.as_strided(argument.shape, argument.strides, argument.first)
    elif isinstance(argument, np.ndarray):
        tensor = torch.from_numpy(argument)
    else:
        return argument
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def taken(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(taken, result))
    if not isinstance(result, Tensor):
        return result
    return (result.view(torch.uint16) if result.dtype == torch.bfloat16 else result).numpy()


def call(module: Any, name: str, arguments: tuple[Any, ...]) -> Any:
    if hasattr(module, name):
        return getattr(module, name)(*arguments)
    return taken(getattr(torch.ops.mghf_cuda_host, name)(*map(given, arguments)))


def main(library: str, calls: str, results: str) -> None:
    module = load(library)
    found = [call(module, *each) for each in pickle.loads(Path(calls).read_bytes())]
    Path(results).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    sys.modules["cuda_host"] = sys.modules[__name__]  # the name in the caller's pickled Strided
    main(*sys.argv[1:])
