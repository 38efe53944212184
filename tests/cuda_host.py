"""Runs CUDA kernels on the host in separate processes, which may run under a sanitizer:

    python cuda_host.py MODULE.so

reads lines of three paths with tabs between them, CALLS.pickle, RESULTS.pickle and a file for the
standard error, makes the calls of each line in a process of its own, and prints its exit status.
The processes are forked: PyTorch is imported once.

Calls are pairs of a name and its arguments: a function of the module, or else an op, which the
library registers in the namespace `mghf_cuda_host`. A tensor is passed as a `Strided`, because
pickled arrays lose their strides; bfloat16 is passed as uint16 with the same bits.
"""

import gc
import importlib.util
import os
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


def answer(module: Any, calls: str, results: str) -> None:
    found = [call(module, *each) for each in pickle.loads(Path(calls).read_bytes())]
    Path(results).write_bytes(pickle.dumps(found))


def serve(module: Any) -> None:
    gc.freeze()  # a collection in a child would copy the memory of all objects
    for line in sys.stdin:
        *paths, errors = line.rstrip("\n").split("\t")
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
        answer(module, *paths)
        os._exit(0)  # to take PyTorch apart takes longer than many calls


if __name__ == "__main__":
    sys.modules["cuda_host"] = sys.modules[__name__]  # the name in the caller's pickled Strided
    serve(load(sys.argv[1]))
