"""The process of `make gpu` that measures the ways of pairs (gpu_variants.py), one after the other:

    python -m benchmarks.gpu_ways FILE --pairs PAIRS [--environment JSON] [--begin N]

It appends a line to FILE for each way. A kernel that has not run on a GPU yet may wait for ever, or
leave the device unusable: then the process writes that way's failure and ends, and gpu.py starts
another one for the ways that are left, ``--begin`` the number of those that have their line.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cases, gpu_profile, gpu_variants, results
from .gpu_parts import Clock, Gpu, Host, Write, failure, timed
from .text import part_of

STOPPED = 3  # the exit code of a process that left ways for another one
KERNELS = 8  # listed of a way


@contextlib.contextmanager
def limited(seconds: float, ended: Callable[[], None]) -> Iterator[None]:
    """Calls ``ended`` if what is in this context takes longer."""
    timer = threading.Timer(seconds, ended)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def alive(clock: Clock) -> bool:
    """Whether the device can still be used: some errors stay until the process ends."""
    try:
        clock.synchronize()
    except Exception:
        return False
    return True


def difference(got: Tensor, expected: Tensor) -> float:
    """The relative L2 distance of two results."""
    got, expected = got.double(), expected.double()
    return float(f"{float((got - expected).norm() / expected.norm()):.2g}")


def measure_way(
    clock: Clock, pair: gpu_variants.Pair, side: str, other: Tensor | None = None
) -> tuple[dict[str, Any], Tensor | None]:
    """The facts of a way's row and its result. ``other`` is the result of the pair's first way,
    from which that of the second should differ by rounding only."""
    way, op = pair[side], pair["op"]
    part = pair.get("part", part_of(op))
    try:
        with gpu_variants.kernels_of(way):
            case, form = gpu_variants.case_of(pair, cases.CASES[op], way)
            torch.manual_seed(0)  # for the upstream gradient
            shape = gpu_variants.shape_of(pair)
            step = case.step(case.forms[form].make(), shape, form, part)
            result = step()
            found: Tensor = (result[0] if isinstance(result, tuple) else result).clone()
            facts = results.part_facts(timed(clock, step, ahead=True))
            if other is not None:
                facts["difference"] = difference(found, other)
            if pair.get("kernels"):
                device = torch.get_default_device().type
                facts["kernels"] = gpu_profile.kernel_table(step, device)["kernels"][:KERNELS]
    except Exception as error:
        return {"failure": failure(error)}, None
    return facts, found


def measure_ways(
    clock: Clock,
    pairs: Sequence[gpu_variants.Pair],
    environment: dict[str, str],
    write: Write,
    begin: int = 0,
    patience: float = 60.0,
    leave: Callable[[], None] = lambda: os._exit(STOPPED),
) -> None:
    """Measures the ways that need this environment, in turn, from the number ``begin`` on. One that
    takes longer than ``patience`` seconds is told and the process left; a device that cannot be
    used any longer ends it too."""
    first: tuple[int, Tensor | None] = (-1, None)
    for index, side in gpu_variants.ways_of(pairs, environment)[begin:]:
        row = {"pair": index, "way": side}

        def give_up(row: dict[str, Any]) -> None:
            write(row | {"part": {"failure": f"did not end within {patience:.0f} s"}})
            leave()

        clock.clear()
        other = first[1] if side == "b" and first[0] == index else None
        with limited(patience, functools.partial(give_up, row)):
            facts, found = measure_way(clock, pairs[index], side, other)
        first = (index, found) if side == "a" else (-1, None)
        write(row | {"part": facts})
        if "failure" in facts and not alive(clock):
            leave()
            return


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_ways")
    parser.add_argument("file", type=Path)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--environment", default="{}")
    parser.add_argument("--begin", type=int, default=0)
    parser.add_argument("--patience", type=float, default=60.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, help="in place of all sizes, for tests")
    options = parser.parse_args(arguments)
    torch.set_default_device(options.device)
    clock: Clock = Gpu() if options.device == "cuda" else Host()
    cases.load_all()
    pairs = json.loads(options.pairs.read_text())
    if options.size is not None:
        pairs = [pair | {"shape": [1, options.size]} for pair in pairs]

    def write(row: dict[str, Any]) -> None:
        with options.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    environment = json.loads(options.environment)
    measure_ways(clock, pairs, environment, write, options.begin, options.patience)


if __name__ == "__main__":
    main()
