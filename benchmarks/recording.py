"""Records the launches of a step by the CUDA kernels: which, of what sizes, with what parameters;
and counts what they execute (counting.py).

The host build of the kernels (`make cuda-host`) runs nothing while it counts, so that a step on
tensors of the CPU takes no time, and their memory is never touched.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mghf_fast.commands.table5.workloads import paper_extractor
from mghf_fast.losses import MGHFLoss, step

from . import launches
from .counting import ROOT, Code, Counts, Launch, Row, Sources


def _names(library: Path) -> dict[int, str]:
    """Mangled names by offset, those of local functions too."""
    text = subprocess.run(["nm", library], check=True, capture_output=True, text=True).stdout
    fields = (line.split() for line in text.splitlines())
    return {int(f[0], 16): f[2] for f in fields if len(f) == 3}


def _base(library: Path) -> int:
    """Where the library lies in this process."""
    found = [
        int(line.split("-", 1)[0], 16)
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(library))
    ]
    return min(found)


@dataclass
class Recorder:
    """``module``: the host build, of `launches.host_module`."""

    module: Any
    found: list[Launch] = field(default_factory=list)

    def __post_init__(self) -> None:
        library = Path(self.module.__file__).resolve()
        self._names, self._base = _names(library), _base(library)

    def _ops(self, module: Any, counter: Any) -> Any:
        recorder = self

        class Ops:
            def __getattr__(self, name: str) -> Callable[..., Any]:
                def call(*arguments: Any) -> Any:
                    module.count(True)
                    result = getattr(torch.ops.mghf_cuda_host, name)(*arguments)
                    for kernel, parameters, *sizes in module.counted_kernels():
                        blocks, cluster, threads, shared = sizes
                        mangled = recorder._names[kernel - recorder._base]
                        recorder.found.append(
                            Launch(mangled, blocks, cluster, threads, shared, parameters)
                        )
                    module.count(False)
                    return result

                return call

        return Ops()

    def step(
        self,
        variant: str,
        shape: tuple[int, ...],
        extractor: str,
        precision: str = "float32",
        images: torch.dtype = torch.float32,
    ) -> list[Launch]:
        """The launches of a step, forward and backward, of a loss that has made one before.
        Arguments as `launches.count` has them."""
        chosen = paper_extractor() if extractor == "paper" else extractor
        loss = MGHFLoss(variant, extractor=chosen, precision=precision).to(images)
        sr = torch.empty(shape, dtype=images, requires_grad=True)
        gt = torch.empty(shape, dtype=images)
        counter = launches._Counter()
        with (
            mock.patch.object(launches, "_CudaOps", self._ops),
            launches._backend("cuda", counter, self.module),
            # The layout of images, and whether both go together, as on a GPU.
            mock.patch.object(step, "_on_cpu", lambda tensor: False),
            counter,
        ):
            loss(sr, gt).backward()
            sr.grad = None
            self.found.clear()
            loss(sr, gt).backward()
        return list(self.found)


def tool(name: str) -> Path | None:
    """nvcc or nvdisasm: in PATH, as `make cuda` installs it, or Triton's."""
    if found := shutil.which(name):
        return Path(found)
    fetched = sorted(ROOT.glob(f"build/toolkits/*/nvidia/cu*/bin/{name}"))
    if fetched:
        return fetched[-1]
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return path if path.exists() else None


def compiled(nvcc: Path, nvdisasm: Path) -> Code:
    """All kernels of `csrc/cuda`, which takes minutes."""
    code = Code()
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            code.compile(source, Path(folder), nvcc, nvdisasm)
    return code


ADDRESS = re.compile(rb"..[\x55-\x7f]\x00\x00", re.DOTALL)


def without_addresses(parameters: bytes) -> bytes:
    """The same for launches that differ only in where their tensors lie."""
    result = bytearray(parameters)
    for k in range(0, len(result) - 7, 8):
        if ADDRESS.fullmatch(result, k + 3, k + 8):
            result[k : k + 8] = b"\xff" * 8
    return bytes(result)


LESS = {"tf32": ("tf32", torch.float32), "bfloat16": ("bfloat16", torch.bfloat16)}
"""Less precision, and the type of loss and images that goes with it, for the first shape."""


def names_of_steps() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each step that is counted, with the arguments of `Recorder.step`."""
    for variant, extractor, shape in itertools.product(
        launches.VARIANTS, launches.EXTRACTORS, launches.SHAPES
    ):
        name = f"mghf_{variant} {extractor} {'x'.join(map(str, shape))}"
        yield name, (variant, shape, extractor)
        for precision in LESS if shape == launches.SHAPES[0] else ():
            yield f"{name} {precision}", (variant, shape, extractor, *LESS[precision])


def steps(module: Any, code: Code) -> dict[str, Row]:
    """The counts of all launches of the steps that `launches` counts, and of some in less
    precision."""
    recorder, rule = Recorder(module), Sources().rule()
    known: dict[tuple[Any, ...], Counts] = {}
    rows = {}
    for name, arguments in names_of_steps():
        variant, shape, extractor, *grade = arguments
        row = Row([], launches.count(variant, shape, extractor, "cuda", module, *grade).pytorch)
        for each in recorder.step(*arguments):
            key = (each.name, each.blocks, each.shared_bytes, without_addresses(each.parameters))
            if key not in known:
                known[key] = code.count(each, rule)
            row.launches.append(known[key])
        rows[name] = row
    return rows
