"""The minimum that an op must move and multiply, and its time at the measured ceilings.

Values: every input is read once and every result written once, in the forward and again in the
backward, because that is a separate operator. Weights are too small to count. An op that needs
several sweeps over a stack of features larger than the caches (a histogram needs the range first)
cannot reach this, so "x times its floor" measures the op, not its kernels, each of which has its
own floor above it in kernels/.

Products: multiply-adds of matrix products and dense convolutions, including those that the gradient
recomputes; symmetric matrices count half. Their rate is the fastest that has the precision: see
`WAYS`. Others: the remaining multiply-adds of the formulas. Only one Sinkhorn iteration counts,
because iterations that change nothing may be skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mghf_fast.commands.table5.workloads import CHANNELS, PATCH_SIZE

from .cases import Shape

HALF = CHANNELS // 2
KEPT = CHANNELS // 2
SUBNETS = 3
HIDDEN, EMBEDDING = 128, 64
DEC_PATCH = 8
IMAGE = 3  # channels

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Ceiling and number of products, by the precision that one product of float32 factors shall have.
# Three products of TF32 or of half precision, of each factor and its remainder, are as good as
# float32's. Half precision has TF32's 11 significant bits (a power of two keeps its range), and the
# rate of bfloat16.
WAYS: Mapping[str, Mapping[str, int]] = {
    "float32": {"float32": 1, "tf32": 3, "bfloat16": 3},
    "tf32": {"tf32": 1, "bfloat16": 1},
    "bfloat16": {"bfloat16": 1},
}


class Work(NamedTuple):
    """Values moved, multiply-adds of products, multiply-adds of others."""

    values: float
    products: float = 0
    others: float = 0


def _pixels(shape: Shape) -> int:
    return shape.batch * shape.size**2


def _features(shape: Shape) -> int:
    """Values of a stack of feature maps."""
    return CHANNELS * _pixels(shape)


def _matrix(shape: Shape) -> int:
    """Entries of the N x N matrices of all maps."""
    return shape.batch * CHANNELS * shape.patches**2


def _embeddings(shape: Shape) -> int:
    """Values of the embeddings of all patches of all maps."""
    return shape.batch * CHANNELS * shape.patches * EMBEDDING


# Per pixel, of the three sub-networks: expand and project, and the depthwise layers between them.
EXPAND = PROJECT = SUBNETS * HALF * 2 * HALF
DEPTHWISE = SUBNETS * 9 * 2 * HALF


def _block(shape: Shape, inputs: int, mix: int) -> tuple[Work, Work]:
    """An invertible block of ``inputs`` channels whose mix takes ``mix`` multiply-adds a pixel. The
    gradient of the input takes the transposed products alone, because the forward can keep what
    they need; that memory does not count."""
    pixels = _pixels(shape)
    products, depthwise = (mix + EXPAND + PROJECT) * pixels, DEPTHWISE * pixels
    read = inputs * pixels
    return (
        Work(read + _features(shape), products, depthwise),
        Work(2 * read + _features(shape), products, depthwise),
    )


def coupling(shape: Shape) -> tuple[Work, Work]:
    return _block(shape, CHANNELS, CHANNELS**2)


def extractor(shape: Shape) -> tuple[Work, Work]:
    """The block with the 3x3 stem folded into its mix."""
    return _block(shape, IMAGE, 9 * IMAGE * CHANNELS)


def gram(shape: Shape) -> tuple[Work, Work]:
    pixels, matrices = _pixels(shape), shape.batch * CHANNELS**2
    return (
        Work(_features(shape) + matrices, CHANNELS * (CHANNELS + 1) // 2 * pixels),
        Work(2 * _features(shape) + matrices, CHANNELS**2 * pixels),
    )


def entropy(shape: Shape) -> tuple[Work, Work]:
    """A value's bin is a multiply-add; there is no gradient."""
    return Work(_features(shape), 0, _features(shape)), Work(0)


def content_style(shape: Shape) -> tuple[Work, Work]:
    """Forward: two bins and S^2, G^2, S G of every pair of values, and one product of the kept maps
    for the difference of their Gram matrices. Backward: two coefficients per value, and Gram's
    product."""
    features, products = _features(shape), KEPT**2 * _pixels(shape)
    return Work(2 * features, products, 5 * features), Work(3 * features, products, 2 * features)


def naive(shape: Shape) -> tuple[Work, Work]:
    """The mean squared difference of features."""
    return Work(2 * _features(shape), 0, _features(shape)), Work(3 * _features(shape))


def patches(shape: Shape) -> tuple[Work, Work]:
    rows = shape.batch * CHANNELS * shape.patches
    first, second = rows * PATCH_SIZE**2 * HIDDEN, rows * HIDDEN * EMBEDDING
    embeddings = rows * EMBEDDING
    return (
        Work(_features(shape) + embeddings, first + second),
        Work(_features(shape) + 2 * embeddings, first + second),
    )


def sinkhorn(shape: Shape) -> tuple[Work, Work]:
    entries = _matrix(shape)
    return Work(2 * entries, 0, 2 * entries), Work(3 * entries, 0, 2 * entries)


def monce(shape: Shape) -> tuple[Work, Work]:
    """The similarities are cheaper to recompute than to keep, so the gradient recomputes them."""
    entries, embeddings = _matrix(shape), _embeddings(shape)
    product = entries * EMBEDDING
    return (
        Work(2 * embeddings, product, 3 * entries),
        Work(3 * embeddings, 2 * product, 3 * entries),
    )


def dec(shape: Shape) -> tuple[Work, Work]:
    """P^2 D multiply-adds for G S^T and half of that each for S S^T and G G^T; the gradient repeats
    them and takes two more products."""
    depth = IMAGE * DEC_PATCH**2
    count = _pixels(shape) // DEC_PATCH**2
    product = count**2 * depth
    return (
        Work(2 * count * depth, 2 * product, 2 * count**2),
        Work(3 * count * depth, 4 * product, 2 * count**2),
    )


OPS: Mapping[str, Callable[[Shape], tuple[Work, Work]]] = {
    "coupling": coupling,
    "content_style": content_style,
    "dec": dec,
    "entropy": entropy,
    "gram": gram,
    "monce": monce,
    "patches": patches,
    "sinkhorn": sinkhorn,
}


def works(op: str, shape: Shape, part: str) -> list[Work]:
    """The operators that run one after the other in a part of a row. For a whole loss: the features
    of both images, the terms and their gradients, and SR's backward through the extractor."""
    if op in OPS:
        forward, backward = OPS[op](shape)
        if part == "gradient":
            return [backward]
        return [forward] if part == "forward" or op == "entropy" else [forward, backward]
    features, image_gradient = extractor(shape)
    steps = [features, features, image_gradient]
    if op == "mghf_n":
        return [*steps, *naive(shape)]
    projection, feature_gradient = patches(shape)
    return [
        *steps, *content_style(shape), projection, projection, feature_gradient, *monce(shape)
    ]  # fmt: skip


class Times(NamedTuple):
    """Seconds at the ceiling of memory bandwidth, at those of arithmetic, and the floor."""

    bytes: float
    arithmetic: float
    floor: float


def times(
    work: Work, dtype: str, ceilings: Mapping[str, float], precision: str = "float32"
) -> Times:
    """Memory, matrix units and the rest can all be busy at once; the slowest is the floor.
    ``precision`` is that of products of float32 factors; those of half precision take one."""
    ways = WAYS[precision if dtype == "float32" else "bfloat16"]
    rate = max(ceilings[f"{unit}_tflop_per_s"] / count for unit, count in ways.items())
    moved = work.values * BYTES[dtype] / (ceilings["copy_tb_per_s"] * 1e12)
    products = 2 * work.products / (rate * 1e12)
    others = 2 * work.others / (ceilings["float32_tflop_per_s"] * 1e12)
    arithmetic = max(products, others)
    return Times(moved, arithmetic, max(moved, arithmetic))


def of_part(
    op: str, shape: Shape, part: str, dtype: str, precision: str, ceilings: Mapping[str, float]
) -> Times:
    """The times of a part's operators, added up."""
    found = [times(w, dtype, ceilings, precision) for w in works(op, shape, part)]
    return Times(*(sum(column) for column in zip(*found, strict=True)))


def annotate(row: dict[str, Any], ceilings: Mapping[str, float]) -> None:
    """Adds to every timed part of a row of our kernels its floor in seconds, the multiple of the
    floor that it took, and its percentages of the measured ceilings."""
    if row["kind"] not in ("ours", "forced") or not ceilings:
        return
    batch, _, size, _ = map(int, row["shape"].split("x"))
    precision = row.get("precision", "float32")
    for name, part in row["parts"].items():
        if name not in ("forward", "step") or not part.get("median_s"):
            continue
        shape = Shape(batch, size)
        moved, arithmetic, floor = of_part(
            row["op"], shape, name, row["dtype"], precision, ceilings
        )
        seconds = part["median_s"]
        part["floor_s"] = float(f"{floor:.3g}")
        part["times_floor"] = float(f"{seconds / floor:.3g}")
        part["bandwidth_percent"] = round(100 * moved / seconds, 1)
        part["arithmetic_percent"] = round(100 * arithmetic / seconds, 1)


def annotate_pair(pair: Mapping[str, Any], ceilings: Mapping[str, float]) -> None:
    """Adds to both ways of a pair (gpu_variants.py) that were timed their floor in seconds."""
    dtype, op = pair.get("dtype", "float32"), pair["op"]
    for way in (pair["a"], pair["b"]):
        if ceilings and way["median_s"]:
            part = pair.get("part", "forward" if op == "entropy" else "step")
            precision = way.get("precision", "float32")
            found = of_part(op, Shape(*pair["shape"]), part, dtype, precision, ceilings)
            way["floor_s"] = float(f"{found.floor:.3g}")
