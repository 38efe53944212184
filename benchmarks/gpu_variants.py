"""Pairs of ways to compute the same thing, each measured twice in turn (A B A B), so that a drift
of the clock is not mistaken for a difference.

A pair is {"name", "op", "shape": [batch, size], "a": WAY, "b": WAY}, and may have "part" ("step" by
default; "gradient" is the step without its forward), "dtype" ("float32"), "form" ("mghf_fast") and
"kernels" (true lists the longest kernels of both ways). A way may have "backend" ("cuda"),
"environment" ({"MGHF_SWITCH": "1"}), "precision" ("tf32") and "older", the ops of `OLDER` whose
older CUDA kernels are to run; with that key all others of `OLDER` run their newer ones.
`--variants FILE` adds a JSON list of pairs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mghf_fast import backends, native
from mghf_fast.precision import PRECISIONS

from .cases import Case, Form, Shape

Pair = dict[str, Any]
Way = Mapping[str, Any]

PAIRS: list[Pair] = [
    {"name": f"{op}, {dtype}", "op": op, "shape": [1, size], "dtype": dtype,
     "a": {"backend": "cuda"}, "b": {"backend": "triton"}}
    for op, size, dtype in (
        ("coupling", 512, "float32"), ("coupling", 512, "bfloat16"),
        ("monce", 512, "float32"), ("monce", 1024, "float32"), ("monce", 256, "float32"),
        ("sinkhorn", 512, "float32"), ("sinkhorn", 512, "bfloat16"),
        ("content_style", 512, "float32"), ("patches", 512, "float32"), ("gram", 512, "float32"),
        ("entropy", 512, "float32"),
    )
]  # fmt: skip

OLDER = ("coupling", "monce", "patches", "content_style")
"""Ops with newer and older CUDA kernels, as `csrc/cuda/variants.h` has them."""

NEWER_KERNELS = (
    ("coupling", "forward", "mghf_fast NCHW", 512),
    ("coupling", "gradient", "mghf_fast NCHW", 512),
    ("patches", "forward", "mghf_fast NCHW", 512),
    ("patches", "gradient", "mghf_fast NCHW", 512),
    ("monce", "forward", "mghf_fast", 512),
    ("monce", "gradient", "mghf_fast", 512),
    ("content_style", "gradient", "mghf_fast NCHW", 512),
    ("mghf_n", "step", "mghf_fast", 512),
    ("mghf_c", "step", "mghf_fast", 512),
    ("monce", "forward", "mghf_fast", 1024),
    ("monce", "gradient", "mghf_fast", 1024),
    ("mghf_c", "step", "mghf_fast", 1024),
)
"""(op, part, form, size) in which newer kernels are compared with older ones: a line for each. At
512 x 512, the paper's size, that is done in every precision."""
SMALL_MAPS = ((32, 64), (16, 128))
"""[batch, size] of crops that people train with, whose maps of 4 and 25 patches `monce` solves by a
warp each. Compared in float32 only."""
GRADED_ALONE = ("gram",)
"""Ops with a precision and one kind of CUDA kernels, compared with float32's."""


def newer_pairs() -> list[Pair]:
    """Newer against older kernels, by precision, float32 first; then precisions of ops that have
    one kind of kernels. In float32 their kernels are listed too: the mix of `coupling` is one of
    them."""
    pairs: list[Pair] = []
    compared = [(op, part, form, (1, size)) for op, part, form, size in NEWER_KERNELS]
    compared += [
        ("monce", part, "mghf_fast", shape)
        for shape in SMALL_MAPS
        for part in ("forward", "gradient")
    ]
    for precision, (op, part, form, shape) in itertools.product(PRECISIONS, compared):
        if shape != (1, 512) and precision != "float32":
            continue
        way = {"backend": "cuda", "precision": precision}
        older = list(OLDER) if op not in OLDER else [op]
        pairs.append(
            {"name": f"{op} {part}, {precision}", "op": op, "part": part, "form": form,
             "shape": [*shape], "kernels": precision == "float32",
             "a": way | {"older": []}, "b": way | {"older": older}}
        )  # fmt: skip
    for op, precision in itertools.product(GRADED_ALONE, PRECISIONS[1:]):
        way = {"backend": "cuda"}
        pairs.append(
            {"name": f"{op}, {precision}", "op": op, "form": "mghf_fast NCHW", "shape": [1, 512],
             "a": way | {"precision": precision}, "b": way | {"precision": "float32"}}
        )  # fmt: skip
    return pairs


ROUNDS = 2
FAR = 0.2
"""Relative distance of two results beyond what a precision explains: bfloat16 moves activations
across their kinks."""
KEPT = ("failure", "difference", "kernels")
KEYS = {"name", "op", "shape", "part", "dtype", "form", "kernels", "a", "b"}
WAY_KEYS = ("backend", "environment", "precision", "older")


def checked(pairs: Any, ops: Iterable[str]) -> list[Pair]:
    """The pairs of a file; raises ValueError if it is wrong."""
    if not isinstance(pairs, list):
        raise ValueError(f"--variants must hold a list of pairs, got {type(pairs).__name__}")
    for pair in pairs:
        missing = {"name", "op", "shape", "a", "b"} - set(pair)
        if missing or set(pair) - KEYS:
            wrong = ", ".join(sorted(missing or set(pair) - KEYS))
            raise ValueError(f"a pair of --variants must have the keys {sorted(KEYS)}: see {wrong}")
        if pair["op"] not in ops:
            raise ValueError(f"op must be one of {', '.join(sorted(ops))}, got {pair['op']!r}")
        for way in (pair["a"], pair["b"]):
            if unknown := set(way) - set(WAY_KEYS):
                raise ValueError(f"a way may have {', '.join(WAY_KEYS)}, got {sorted(unknown)}")
            if unknown := set(way.get("older", ())) - set(OLDER):
                raise ValueError(
                    f"older must list some of {', '.join(OLDER)}, got {sorted(unknown)}"
                )
    return pairs


def environments(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The different environments of pairs, each of which needs a process; the empty one first."""
    texts = {json.dumps(pair[s].get("environment", {}), sort_keys=True)
             for pair, s in itertools.product(pairs, "ab")}  # fmt: skip
    return [json.loads(text) for text in sorted(texts, key=lambda text: (len(text), text))]


def ways_of(
    pairs: Sequence[Mapping[str, Any]], environment: Mapping[str, str]
) -> list[tuple[int, str]]:
    """(pair, "a" or "b") that need this environment, in the order of measurement."""
    return [
        (index, side)
        for index, pair in enumerate(pairs)
        for side in "ab"
        if pair[side].get("environment", {}) == environment
    ]


def case_of(pair: Mapping[str, Any], case: Case, way: Way) -> tuple[Case, str]:
    """The case with the form of one way of the pair, and that form's name."""
    from .gpu_parts import with_backend

    form = case.forms[pair.get("form", "mghf_fast")]
    if "precision" in way:
        form = dataclasses.replace(form, make=_graded(form, way["precision"]))
    form = with_backend(way.get("backend", "auto"), form)
    dtype = pair.get("dtype", "float32")
    form = dataclasses.replace(form, dtype=dtype, inputs=getattr(torch, dtype))
    return dataclasses.replace(case, forms={"variant": form}), "variant"


def _graded(form: Form, precision: str) -> Callable[[], Any]:
    graded = form.graded
    if graded is None:
        raise ValueError(f"precision is {precision!r}, but this op has none")
    return lambda: graded(precision)


def use_older(ops: Iterable[str]) -> None:
    """From now on these ops of `OLDER` run their older CUDA kernels, and the others their newer
    ones, on the current device."""
    if (reason := backends.unavailable_reasons().get("cuda")) is not None:
        raise RuntimeError(reason)  # the switch is in the library, which this has loaded
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    for op in OLDER:
        if not native.use_older_cuda_kernels(op, device, op in ops):
            raise ValueError(f"the CUDA library has no older kernels of {op}")


@contextlib.contextmanager
def kernels_of(way: Way) -> Iterator[None]:
    """The newer or older CUDA kernels that a way asks for; afterwards all newer ones."""
    if "older" not in way:
        yield
        return
    use_older(way["older"])
    try:
        yield
    finally:
        use_older(())


def shape_of(pair: Mapping[str, Any]) -> Shape:
    return Shape(*pair["shape"])


def joined(rows: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The measurements, {"pair", "way", "part"}, joined into one row per pair: the medians of each
    way in the order in which they were taken, and its kernels."""
    found = []
    for index, pair in enumerate(pairs):
        row = dict(pair)
        for way in "ab":
            parts = [r["part"] for r in rows if (r["pair"], r["way"]) == (index, way)]
            row[way] = pair[way] | {
                "median_s": [p["median_s"] for p in parts if "median_s" in p],
                **{key: p[key] for p in parts for key in KEPT if key in p},
            }
        if row["a"]["median_s"] or row["b"]["median_s"] or "failure" in row["a"] | row["b"]:
            found.append(row)
    return found


def failing(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The ops whose newer kernels failed, or gave another result than the older ones did."""
    return sorted(
        {
            row["op"]
            for row in rows
            if row["op"] in OLDER
            and row["a"].get("older") == []
            and ("failure" in row["a"] or not row["b"].get("difference", 0) <= FAR)
        }
    )


def read(path: Path | None, ops: Iterable[str]) -> list[Pair]:
    """The built-in pairs of two backends, and those of a file."""
    return PAIRS + ([] if path is None else checked(json.loads(path.read_text()), ops))
