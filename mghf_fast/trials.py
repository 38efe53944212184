"""Trials: a kernel without a committed result for a kind of GPU is checked at its first use there.

The trial runs small problems of the op and compares results and gradients with the reference's.
``"auto"`` avoids a kernel that differs or fails on that device, and one warning says what differed;
a backend requested by name is not tried. Where an op has newer and older kernels, a device on which
the newer ones fail uses the older ones, if these pass. Passed trials are kept in the user's cache
(:mod:`mghf_fast.cache`), so that a kernel is tried once per GPU, driver and version.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cache, native, problems
from ._warnings import warn_caller

logger = logging.getLogger("mghf_fast")

HOPPER = ((9, 0),)
PROVEN: Mapping[tuple[str, str], tuple[tuple[int, int], ...]] = {}
"""(backend, op) -> compute capabilities whose committed result (benchmarks/results) was made by the
current kernels. ``tests/test_trials.py`` compares the sources with those that were run."""

TRIED = ("cuda", "triton")
DEVICES = ("cuda",)
"""Types of devices on which kernels are tried."""
RESULT, GRADIENT, HALF = 1e-4, 1e-3, 2e-2
"""Largest allowed relative L2 errors of a result and of a gradient in float32, and of either in
half precision: far above rounding, far below any fault."""
LESS_PRECISE: Mapping[str, float] = {"tf32": 5e-2, "bfloat16": 1e-1}
"""Likewise where products are in less than float32, as they are for "auto" unless PyTorch's TF32 is
off. Rounding moves activations across their kinks: gradients differ by up to 3e-2."""


class Outcome(NamedTuple):
    """Relative L2 errors of a trial's result and, if any, gradient; and the failure in words, or
    None."""

    errors: tuple[float, ...]
    failure: str | None


def on_trial(backend: str, op: str, capability: tuple[int, int]) -> bool:
    return capability not in PROVEN.get((backend, op), ())


def _error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return math.inf
    difference = (got.double() - expected.double()).norm() / expected.double().norm()
    found = float(difference)
    return found if math.isfinite(found) else math.inf


def _errors(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, precision: str
) -> tuple[float, ...]:
    """The errors of the op's result and gradients, each the largest of its problems."""
    found = []
    for problem in problems.for_trial(op):
        given = problem.to(device, dtype)
        # Those of half precision differ by their own rounding.
        of_weights = dtype == torch.float32 and precision == "float32"
        got = given.results(backend, of_weights, precision if problem.graded else None)
        expected = given.to(device, given.exact).results("reference", of_weights)
        found.append([_error(g, e) for g, e in zip(got, expected, strict=True)])
    return tuple(map(max, zip(*found, strict=True)))


def _difference(errors: Sequence[float], result: float, gradient: float) -> str | None:
    """What differs by more than is allowed, or None."""
    for number, error in enumerate(errors):
        what = ("result", "gradient")[number] if number < 2 else "gradient of a weight"
        allowed = result if number == 0 else gradient
        if error > allowed:
            return f"its {what} differs from the reference's by {error:.1e} ({allowed:.0e})"
    return None


def try_kernel(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> Outcome:
    """Runs the op's problems on a backend and on the reference, with every precision of products
    that the op has, but in float64 with one. The errors returned are those of float32's. Never
    raises."""
    exact = dtype in (torch.float32, torch.float64)
    try:
        errors = _errors(op, backend, device, dtype, "float32")
        allowed = (RESULT, GRADIENT) if exact else (HALF, HALF)
        if (told := _difference(errors, *allowed)) is not None:
            return Outcome(errors, told)
        if dtype != torch.float64 and problems.small(op).graded:
            for precision, most in LESS_PRECISE.items():
                found = _errors(op, backend, device, dtype, precision)
                if (told := _difference(found, most, most)) is not None:
                    return Outcome(errors, f"with products in {precision} {told}")
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Outcome((), f"{type(error).__name__}: {first[:200]}")
    return Outcome(errors, None)


def _apart(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> Outcome:
    """:func:`try_kernel` in a new thread, so that the caller's state of autograd, autocast and
    streams does not affect it."""
    found: list[Outcome] = []

    def work() -> None:
        if device.type == "cuda":
            with torch.cuda.device(device):
                found.append(try_kernel(op, backend, device, dtype))
        else:
            found.append(try_kernel(op, backend, device, dtype))

    thread = threading.Thread(target=work, name="mghf_fast trial")
    thread.start()
    thread.join()
    return found[0] if found else Outcome((), "the trial did not end")


_known: dict[tuple[str, str, torch.device, torch.dtype], str | None] = {}
_lock = threading.RLock()


def _label(op: str, backend: str, dtype: torch.dtype) -> str:
    return f"{backend} {op} {str(dtype).removeprefix('torch.')}"


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def refusal(op: str, backend: str, tensor: Tensor) -> str | None:
    """Why a backend must not run this op on this tensor's device, or None; tries the kernel at its
    first use there."""
    key = (op, backend, tensor.device, tensor.dtype)
    if key in _known:
        return _known[key]
    if tensor.device.type not in DEVICES or op not in problems.PROBLEMS:
        return None
    if not on_trial(backend, op, _capability(tensor.device)):
        _known[key] = None
        return None
    if _capturing():  # a trial waits for the GPU, which a capture forbids
        return "it has not been tried here yet: run a step before capturing a CUDA graph"
    with _lock:
        if key not in _known:
            _known[key] = _decide(op, backend, tensor.device, tensor.dtype)
    return _known[key]


def _family(op: str) -> str:
    """The op whose kernels it is that run ``op``."""
    return op.removesuffix("_inverse")


def _use_older(op: str, backend: str, device: torch.device) -> bool:
    """Lets the device use the op's older kernels from now on; False if there are none."""
    if backend != "cuda":
        return False
    try:
        return native.use_older_cuda_kernels(_family(op), device.index or 0, True)
    except (OSError, AttributeError) as error:  # a library from elsewhere
        logger.debug("no older kernels of %s: %s", op, error)
        return False


def _warn(text: str, device: torch.device, failure: str) -> None:
    warn_caller(
        f"mghf_fast {text} on {cache.identity(device)}: {failure}. Please report it; "
        "`mghf-fast tune --clear` lets it be tried again",
        RuntimeWarning,
    )


def _row(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the trial gave: ``errors``, ``failure`` in words or None, and, if the older kernels were
    tried because the newer ones failed and the older ones passed, that failure as ``older``."""
    outcome, older = _apart(op, backend, device, dtype), None
    if outcome.failure is not None and _use_older(op, backend, device):
        again = _apart(op, backend, device, dtype)
        if again.failure is None:
            outcome, older = again, outcome.failure
    row = {"errors": [float(f"{e:.2g}") for e in outcome.errors], "failure": outcome.failure}
    return row if older is None else row | {"older": older}


def _forget_family(op: str, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Forgets that kernels of the op passed, which are others now; the rest of ``rows``."""
    global forgotten
    forgotten += 1
    for key in [key for key in _known if _family(key[0]) == _family(op)]:
        del _known[key]
    return {label: row for label, row in rows.items() if _family(label.split()[1]) != _family(op)}


def _decide(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    label = _label(op, backend, dtype)
    rows: dict[str, Any] = cache.known(device).get("trials", {})
    if label in rows:
        row = rows[label]
        if row.get("older") is not None:
            _use_older(op, backend, device)
    else:
        row = _row(op, backend, device, dtype)
        if row.get("older") is not None:
            rows = _forget_family(op, rows)
        try:
            cache.write(device, "trials", rows | {label: row})
        except OSError as error:
            logger.debug("the trial of %s is not kept: %s", label, error)
    name = str(dtype).removeprefix("torch.")
    failure: str | None = row["failure"]
    if row.get("older") is not None:
        _warn(f"uses the older {backend} kernels of {op}", device, row["older"])
    if failure is None:
        return None
    _warn(f"leaves out the {backend} kernel of {op} for {name}", device, failure)
    return f"it failed its trial on this device: {failure}"


forgotten = 0
"""How often :func:`forget` was called; earlier choices may be out of date."""


def forget() -> None:
    """Forgets this process's trials, but not the cache's."""
    global forgotten
    with _lock:
        forgotten += 1
        _known.clear()


def listed(device: torch.device) -> list[dict[str, Any]]:
    """Every kernel subject to a trial on a device: ``backend``, ``op``, ``state`` ("not tried",
    "passed", of which kernels if not of the newest, or the failure) and the types tried; for
    `mghf-fast doctor`."""
    capability = _capability(device)
    earlier: dict[str, Any] = cache.known(device).get("trials", {})
    rows = []
    for backend in TRIED:
        for op in problems.PROBLEMS:
            if not on_trial(backend, op, capability):
                continue
            tried = {
                label.split()[2]: row
                for label, row in earlier.items()
                if label.split()[:2] == [backend, op]
            }
            failures = [row["failure"] for row in tried.values() if row["failure"] is not None]
            older = [row["older"] for row in tried.values() if row.get("older") is not None]
            passed = (
                f"its older kernels passed, the newer did not: {older[0]}" if older else "passed"
            )
            state = failures[0] if failures else passed if tried else "not tried"
            rows.append({"backend": backend, "op": op, "state": state, "types": [*tried]})
    return rows
