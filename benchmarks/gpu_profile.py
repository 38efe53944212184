"""Where a step's time goes on a GPU: microseconds by kernel, Sinkhorn's iterations by map, and the
counters of the longest kernels."""

from __future__ import annotations

import collections
import contextlib
import csv
import importlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mghf_fast.backends import use_backend

from . import cases
from .cases import Case, Shape
from .gpu_processes import run_together

STEPS = 3  # profiled, after as many to warm up
LONGEST = 25  # kernels in a table
NAME = 90  # characters of a kernel's name

# ---- microseconds by kernel ----


def kernel_name(name: str) -> str:
    """A kernel's name without namespaces, return type and arguments, and with as many template
    arguments as there is room for."""
    name = re.sub(r"\(anonymous namespace\)::|\b(?:mghf|cuda|at|native|std)::", "", name)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and at > 0:
            name = name[:at]
            break
    return name if len(name) <= NAME else name[: NAME - 3] + "..."


def kernel_table(step: Callable[[], object], device: str) -> dict[str, Any]:
    """Kernels of a step, the longest first, with microseconds and launches of one step. On a CPU
    they are PyTorch's functions."""
    for _ in range(STEPS):
        step()
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    kernels: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for event in found.events() or []:
        if (event.device_type == DeviceType.CUDA) != on_gpu:
            continue
        took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        entry = kernels[kernel_name(event.name)]
        entry[0] += took / STEPS
        entry[1] += 1 / STEPS
    ordered = sorted(kernels.items(), key=lambda item: -item[1][0])
    return {
        "us": round(sum(us for us, _ in kernels.values()), 1),
        "launches": round(sum(count for _, count in kernels.values()), 1),
        "kernels": [
            {"name": name, "us": round(us, 1), "launches": round(count, 1)}
            for name, (us, count) in ordered[:LONGEST]
        ],
    }


def whole_step(case: Case, shape: Shape) -> Callable[[], object]:
    step: Callable[[], object] = case.step(
        case.forms["mghf_fast"].make(), shape, "mghf_fast", "step"
    )
    return step


def profiles(shapes: Sequence[Shape], write: Callable[[dict[str, Any]], None]) -> None:
    """A table for each loss and shape, and the iterations of MGHF-c's maps."""
    device = torch.get_default_device().type
    for shape in shapes:
        for op in ("mghf_n", "mghf_c"):
            row: dict[str, Any] = {"op": op, "shape": str(shape)}
            try:
                row |= kernel_table(whole_step(cases.CASES[op], shape), device)
            except Exception as error:
                row["failure"] = f"{type(error).__name__}: {error}"[:160]
            write(row)
    for shape in shapes:
        found = iterations(shape)
        write({"op": "sinkhorn iterations", "shape": str(shape)} | found)


# ---- iterations ----


@contextlib.contextmanager
def watched(seen: list[Tensor]) -> Iterator[None]:
    """Collects the counts that the Triton kernels' `solve` returns, (maps, 2): iterations made, and
    the number for which their result is valid."""
    solve = importlib.import_module("mghf_fast.kernels.sinkhorn").solve

    def watch(*arguments: Any, **options: Any) -> Any:
        result = solve(*arguments, **options)
        counts = [x for x in result if isinstance(x, Tensor) and x.shape[1:] == (2,)]
        seen.extend(x.detach().clone() for x in counts if x.dtype == torch.int32)
        return result

    modules = [importlib.import_module(f"mghf_fast.kernels.{m}") for m in ("sinkhorn", "monce")]
    patched = [m for m in modules if getattr(m, "solve", None) is solve]
    for module in patched:
        vars(module)["solve"] = watch
    try:
        yield
    finally:
        for module in patched:
            vars(module)["solve"] = solve


def iterations(shape: Shape) -> dict[str, Any]:
    """How many maps made how many iterations in one step of MGHF-c with Triton's kernels. The CUDA
    kernels do not return their counts."""
    seen: list[Tensor] = []
    try:
        with use_backend("triton"), watched(seen):
            whole_step(cases.CASES["mghf_c"], shape)()
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"[:160]}
    counts = collections.Counter(int(n) for x in seen for n in x[:, 0].tolist())
    return {"maps_by_iterations": {str(n): counts[n] for n in sorted(counts)}}


# ---- counters ----

NCU = "ncu"
METRICS = {
    "gpu__time_duration.sum": "duration",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors, % of peak",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "memory, % of peak",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "cycles that issue, %",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor cores, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps, % of most",
    "launch__registers_per_thread": "registers",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank conflicts",
}
COUNTED = 6  # kernels


def counter_command(program: str, names: Sequence[str], command: Sequence[str]) -> list[str]:
    """The command that runs ncu on the first launches of these kernels."""
    pattern = "|".join(re.escape(re.split(r"[<(]", name)[0]) for name in names)
    options = [
        "--csv", "--page", "raw", "--clock-control", "none", "--metrics", ",".join(METRICS),
        "--kernel-name-base", "function", "--kernel-name", f"regex:^({pattern})$",
        "--launch-count", str(2 * COUNTED),
    ]  # fmt: skip
    return [program, *options, *command]


def read_counters(text: str) -> list[dict[str, Any]]:
    """Rows of ncu's CSV (a column for each metric, after a line of units), one per kernel."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines):
        if not row.get("ID", "").strip():
            continue
        name = kernel_name(row["Kernel Name"])
        values = {said: row[key] for key, said in METRICS.items() if row.get(key)}
        found.setdefault(name, {"kernel": name} | values)
    return list(found.values())


def longest(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kernels that take longest in MGHF-c's first table."""
    for table in tables:
        if table["op"] == "mghf_c" and "kernels" in table:
            return [kernel["name"] for kernel in table["kernels"]][:COUNTED]
    return []


def run_counters(
    tables: Sequence[Mapping[str, Any]], command: Sequence[str], folder: Path, limit: float
) -> tuple[str, list[dict[str, Any]]]:
    """Counters of the longest kernels of the profile, or why there are none. That is not a failure,
    because on many machines only an administrator may read them."""
    if (program := shutil.which(NCU)) is None:
        return "ok", [{"kernel": NCU, "failure": "is not installed"}]
    if not (names := longest(tables)):
        return "ok", [{"kernel": NCU, "failure": "no profile says which kernels"}]
    ended = run_together({"counters": counter_command(program, names, command)}, folder, limit)
    text = (folder / "counters.log").read_text(errors="replace")
    if "ERR_NVGPUCTRPERM" in text:
        return "ok", [{"kernel": NCU, "failure": "may not read this machine's counters"}]
    rows = read_counters(text)
    return ended["counters"], rows or [{"kernel": NCU, "failure": "no counters were read"}]
