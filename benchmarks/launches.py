"""What a step needs of a GPU, counted without one: launches of kernels and of PyTorch, and memory.

    python -m benchmarks.launches [--backend triton] [--shape 1x3x512x512] [--write]

A whole step, forward and backward, runs on tensors of the device "meta", which have shapes and no
memory. Triton's launches are recorded instead of being compiled, as in `tools/cases.py`; those of
the CUDA kernels are counted by their host build (`make cuda-host`), which then runs nothing. Each
operation of PyTorch that computes counts as one launch, which may be wrong by a few. Memory is
that of all live tensors and of an op's workspace, without the two images. The number of maps that
Triton's `monce` takes at a time depends on the GPU's memory; one of 32 GiB or more is assumed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mghf_fast import backends, native
from mghf_fast.commands.table5.workloads import paper_extractor
from mghf_fast.losses import MGHFLoss, step
from mghf_fast.ops import Op

SHAPES = ((1, 3, 512, 512), (1, 3, 1024, 1024), (16, 3, 256, 256), (32, 3, 64, 64))
EXTRACTORS = ("perceptual-v1", "paper")
VARIANTS = ("n", "c")
ARCHITECTURE = 90
MIB = 1 << 20


NO_LAUNCH = ("empty", "new_empty", "detach", "_unsafe_view")
"""Beginnings of operations that return tensors without computing."""


@dataclass
class Counts:
    """The needs of a step. ``kernels``: launches of this project's kernels by op."""

    kernels: dict[str, int]
    pytorch: int = 0
    peak_bytes: int = 0

    @property
    def launches(self) -> int:
        return self.pytorch + sum(self.kernels.values())


class _Counter(TorchDispatchMode):
    """Counts operations and the memory of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts({})
        self.op = ""
        self._alive = 0
        self._known: set[int] = set()

    def begin(self) -> None:
        """Counts from here on; what is alive stays."""
        self.counts, self._alive = Counts({}), 0

    def named(self, op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, with its launches counted as those of ``op``."""

        def call(*arguments: Any, **options: Any) -> Any:
            before, self.op = self.op, op
            result = function(*arguments, **options)
            self.op = before
            return result

        return call

    def note(self, launches: int = 1) -> None:
        self.counts.kernels[self.op] = self.counts.kernels.get(self.op, 0) + launches

    def need(self, more: int) -> None:
        """Counts ``more`` bytes of memory besides all tensors, for the duration of an op."""
        self.counts.peak_bytes = max(self.counts.peak_bytes, self._alive + more)

    def keep(self, result: Any) -> None:
        for tensor in torch.utils._pytree.tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._known:
                continue
            self._known.add(key)
            self._alive += size
            weakref.finalize(storage, self._forget, key, size)
            self.need(0)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._alive -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        result = func(*args, **(kwargs or {}))
        if name.startswith("mghf_cuda_host::"):  # whose launches are counted one by one
            self.keep(result)
            return result
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not views and not name.split("::")[1].startswith(NO_LAUNCH):
            self.counts.pytorch += 1
        self.keep(result)
        return result


class _CudaOps:
    """The host build of the CUDA ops, for tensors without memory."""

    def __init__(self, module: Any, counter: _Counter) -> None:
        self._module, self._counter = module, counter

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self._module.count(True)
            result = getattr(torch.ops.mghf_cuda_host, name)(*arguments)
            launches, workspace = self._module.counted()
            self._module.count(False)
            self._counter.note(launches)
            self._counter.need(workspace)
            return result

        return call


def host_module(folder: Path) -> Any:
    """The host build of the CUDA kernels, or None. Loading it registers its ops."""
    found = list(folder.glob("plain/mghf_fast_cuda_host*.so"))
    if not found:
        return None
    spec = importlib.util.spec_from_file_location("mghf_fast_cuda_host", found[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _no_autocast(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def _backend(name: str, counter: _Counter, module: Any) -> Iterator[None]:
    """Makes the backend accept tensors of the device "meta"."""

    def named(op: Op, found: Any) -> Any:
        functions = {
            field: counter.named(op.name + suffix, getattr(found, field))
            for field, suffix in (
                ("forward", ""),
                ("backward", "_backward"),
                ("add_backward", "_backward"),
            )
        }
        if found.frozen is not None:
            functions["frozen"] = lambda: named(op, found.frozen())
        return dataclasses.replace(found, **functions)

    def choose(op: Op, backend: str, *tensors: Tensor, **options: Any) -> Any:
        return named(op, op.implementation(name))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Op, "choose", choose))
        # As in a call that is neither traced nor transformed.
        stack.enter_context(mock.patch.object(step, "applies", lambda sr, gt: True))
        # torch.autocast does not know the device "meta".
        stack.enter_context(mock.patch.object(torch, "autocast", _no_autocast))
        off = mock.patch.object(torch, "is_autocast_enabled", lambda device: False)
        stack.enter_context(off)
        stack.enter_context(mock.patch.object(backends, "unavailable_reasons", dict))
        if name == "cuda":
            ops = _CudaOps(module, counter)
            stack.enter_context(mock.patch.object(native, "cuda_ops", lambda: ops))
        else:
            import triton
            from triton import knobs

            from mghf_fast.kernels.monce import MOST_BUFFER
            from tools.cases import NoDevice

            def note(**_: Any) -> bool:
                counter.note()
                return True  # no need to compile

            buffer = mock.patch("mghf_fast.kernels.monce._buffer", lambda device: MOST_BUFFER)
            stack.enter_context(buffer)
            triton.runtime.driver.set_active(NoDevice(ARCHITECTURE))
            stack.enter_context(mock.patch.object(knobs.runtime, "jit_cache_hook", note))
        yield


def count(
    variant: str,
    shape: tuple[int, ...],
    extractor: str,
    backend: str,
    module: Any = None,
    precision: str = "float32",
    images: torch.dtype = torch.float32,
) -> Counts:
    """A step of a loss that has made one before.

    Args:
        variant: ``"n"`` or ``"c"``, of MGHF.
        shape: of the images, (B, 3, H, W).
        extractor: ``"perceptual-v1"``, which ships, or ``"paper"``: 128 channels, full resolution.
        backend: ``"triton"``, or ``"cuda"``, which needs ``module``, the host build.
        precision: of the loss.
        images: their type and the loss's.
    """
    chosen = paper_extractor() if extractor == "paper" else extractor
    loss = MGHFLoss(variant, extractor=chosen, precision=precision).to("meta", images)
    sr = torch.empty(shape, dtype=images, device="meta", requires_grad=True)
    gt = torch.empty(shape, dtype=images, device="meta")
    counter = _Counter()
    with _backend(backend, counter, module), counter:
        loss(sr, gt).backward()  # plans what later steps do
        sr.grad = None
        counter.begin()
        loss(sr, gt).backward()
    return counter.counts


MOST_LAUNCHES = 40
"""Maximum number of launches of a step, at any shape, on every backend."""
MOST_BYTES = 450 * MIB
"""Most memory besides the images, at 512 x 512, on every backend."""
TABLE = Path(__file__).with_suffix(".json")


def complaints(name: str, counts: Counts, bounds: dict[str, list[int]]) -> list[str]:
    """Sentences on what a step needs beyond the committed table or beyond the limits."""
    found = []
    mebibytes = math.ceil(counts.peak_bytes / MIB)
    if name not in bounds:
        found.append(f"{name}: {TABLE.name} does not have it; --write rewrites the file")
    else:
        launches, most = bounds[name]
        if counts.launches > launches:
            found.append(f"{name}: {counts.launches} launches, {launches} before")
        if mebibytes > most:
            found.append(f"{name}: {mebibytes} MiB, {most} before")
    if counts.launches > MOST_LAUNCHES:
        found.append(f"{name}: {counts.launches} launches, at most {MOST_LAUNCHES} are allowed")
    if " 1x3x512x512" in name and counts.peak_bytes > MOST_BYTES:
        found.append(f"{name}: {mebibytes} MiB, at most {MOST_BYTES // MIB} are allowed")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches")
    both = ("cuda", "triton")
    parser.add_argument("--backend", nargs="+", choices=both, default=both, help="of all ops")
    sizes = ["x".join(map(str, shape)) for shape in SHAPES]
    parser.add_argument("--shape", nargs="+", choices=sizes, default=sizes, help="of the images")
    parser.add_argument(
        "--host-modules",
        type=Path,
        default=Path("build/cuda-host"),
        help="folder of the CUDA kernels' host build, for the backend cuda",
    )
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name}")
    options = parser.parse_args(arguments)
    if "cuda" in options.backend and (module := host_module(options.host_modules)) is None:
        print(
            f"--host-modules is {options.host_modules}, which has no host build of the CUDA "
            "kernels; `make cuda-host` makes it, and --backend triton needs none",
            file=sys.stderr,
        )
        return 2
    bounds: dict[str, list[int]] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    wrong: list[str] = []
    print(f"{'backend, loss, extractor, images':42}{'kernels':>8}{'PyTorch':>8}{'MiB':>6}")
    for backend, variant, extractor, size in itertools.product(
        options.backend, VARIANTS, EXTRACTORS, options.shape
    ):
        shape = tuple(map(int, size.split("x")))
        counts = count(variant, shape, extractor, backend, module if backend == "cuda" else None)
        name = f"{backend} mghf_{variant} {extractor} {size}"
        of_ops = " ".join(f"{op} {n}" for op, n in sorted(counts.kernels.items()))
        mebibytes = math.ceil(counts.peak_bytes / MIB)
        own = counts.launches - counts.pytorch
        print(f"{name:42}{own:8}{counts.pytorch:8}{mebibytes:6}  {of_ops}")
        if options.write:
            bounds[name] = [counts.launches, mebibytes]
        wrong += complaints(name, counts, bounds)
    if options.write:
        lines = [f'  "{name}": {json.dumps(bounds[name])}' for name in sorted(bounds)]
        TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for text in wrong:
        print(text, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
