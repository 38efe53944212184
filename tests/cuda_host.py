"""Runs CUDA kernels on the host, without PyTorch, which no sanitizer needs to watch:

    python cuda_host.py MODULE.so CALLS.pickle RESULTS.pickle

Calls are pairs of a function of the module and its arguments; a tensor is a `Strided`, for pickled
arrays lose their strides.
"""

import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Strided(NamedTuple):
    """An array within the memory of another, of one dimension; strides in elements."""

    memory: "np.ndarray[Any, Any]"
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> "np.ndarray[Any, Any]":
        bytes_of = [stride * self.memory.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(self.memory[self.first :], self.shape, bytes_of)


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("mghf_fast_cuda_host", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(library: str, calls: str, results: str) -> None:
    module = load(library)
    found = []
    for name, arguments in pickle.loads(Path(calls).read_bytes()):
        given = [a.array() if isinstance(a, Strided) else a for a in arguments]
        found.append(getattr(module, name)(*given))
    Path(results).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    sys.modules["cuda_host"] = sys.modules[__name__]  # as which the caller pickled Strided
    main(*sys.argv[1:])
