"""Pairs of ways to compute the same thing, each measured twice in turn (A B A B), so that a drift
of the clock is not mistaken for a difference.

A pair is {"name", "op", "shape": [batch, size], "a": WAY, "b": WAY}, and may have "part" ("step" by
default) and "dtype" ("float32"). A way is {"backend": "cuda", "environment": {"MGHF_SWITCH": "1"}},
either of which may be missing. `--variants FILE` adds a JSON list of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .cases import Case, Shape

PAIRS: list[dict[str, Any]] = [
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
ROUNDS = 2
KEYS = {"name", "op", "shape", "part", "dtype", "a", "b"}


def checked(pairs: Any, ops: Iterable[str]) -> list[dict[str, Any]]:
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
            if unknown := set(way) - {"backend", "environment"}:
                raise ValueError(f"a way has backend and environment, got {sorted(unknown)}")
    return pairs


def environments(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The different environments of pairs, each of which needs a process; the empty one first."""
    texts = {json.dumps(pair[s].get("environment", {}), sort_keys=True)
             for pair, s in itertools.product(pairs, "ab")}  # fmt: skip
    return [json.loads(text) for text in sorted(texts, key=lambda text: (len(text), text))]


def case_of(pair: Mapping[str, Any], case: Case, backend: str) -> tuple[Case, str]:
    """The case with the pair's form, and that form's name."""
    from .gpu_parts import with_backend

    form = with_backend(backend, case.forms["mghf_fast"])
    dtype = pair.get("dtype", "float32")
    form = dataclasses.replace(form, dtype=dtype, inputs=getattr(torch, dtype))
    return dataclasses.replace(case, forms={"variant": form}), "variant"


def shape_of(pair: Mapping[str, Any]) -> Shape:
    return Shape(*pair["shape"])


def joined(rows: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The measurements, {"pair", "way", "part"}, joined into one row per pair: the medians of each
    way in the order in which they were taken."""
    found = []
    for index, pair in enumerate(pairs):
        row = dict(pair)
        for way in "ab":
            parts = [r["part"] for r in rows if (r["pair"], r["way"]) == (index, way)]
            row[way] = pair[way] | {
                "median_s": [p["median_s"] for p in parts if "median_s" in p],
                **{key: p[key] for p in parts for key in ("failure",) if key in p},
            }
        if row["a"]["median_s"] or row["b"]["median_s"] or "failure" in row["a"] | row["b"]:
            found.append(row)
    return found


def read(path: Path | None, ops: Iterable[str]) -> list[dict[str, Any]]:
    """The built-in pairs, and those of a file."""
    return PAIRS + ([] if path is None else checked(json.loads(path.read_text()), ops))
