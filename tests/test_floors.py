"""Counts of an op's memory traffic and multiply-adds, against counts by hand and in Table 5."""

from __future__ import annotations

import pytest

from benchmarks import floors
from benchmarks.cases import Shape
from benchmarks.floors import Work
from mghf_fast.commands.table5 import cost
from mghf_fast.precision import PRECISIONS

TINY = Shape(1, 64)  # 128 maps of 4096 pixels, four patches of each; 64 patches of DECLoss
CEILINGS = {
    "copy_tb_per_s": 4.0,
    "bfloat16_tflop_per_s": 800.0,
    "tf32_tflop_per_s": 300.0,
    "float32_tflop_per_s": 50.0,
}

# 128 x 4096 values are 524,288.
BY_HAND = {
    # Per pixel: 128 x 128, and 64 x 128 six times; 9 x 128 three times. The gradient: the same,
    # transposed.
    "coupling": (
        Work(1_048_576, 65_536 * 4096, 3456 * 4096),
        Work(1_572_864, 65_536 * 4096, 3456 * 4096),
    ),
    # The matrix has 16,384 entries, of which 128 x 129 / 2 differ.
    "gram": (Work(540_672, 8256 * 4096), Work(1_064_960, 16_384 * 4096)),
    "entropy": (Work(524_288, 0, 524_288), Work(0)),
    # 64 x 64 products per pixel.
    "content_style": (
        Work(1_048_576, 16_777_216, 2_621_440),
        Work(1_572_864, 16_777_216, 1_048_576),
    ),
    # 512 rows of 1024 -> 128 -> 64: 67,108,864 and 4,194,304; the embeddings are 32,768.
    "patches": (Work(557_056, 71_303_168), Work(589_824, 71_303_168)),
    # 128 matrices of 4 x 4.
    "sinkhorn": (Work(4096, 0, 4096), Work(6144, 0, 4096)),
    # 2048 similarities of 64 products.
    "monce": (Work(65_536, 131_072, 6144), Work(98_304, 262_144, 6144)),
    # 64 x 64 pairs of 192 values: 786,432.
    "dec": (Work(24_576, 1_572_864, 8192), Work(36_864, 3_145_728, 8192)),
}


@pytest.mark.parametrize("op", floors.OPS)
def test_counts_by_hand(op: str) -> None:
    assert floors.OPS[op](TINY) == BY_HAND[op]


def test_counts_grow_with_the_batch() -> None:
    for op, count in floors.OPS.items():
        for work, one in zip(count(Shape(3, 64)), count(TINY), strict=True):
            factors = {a / b for a, b in zip(work, one, strict=True) if b}
            assert factors <= ({3, 9} if op == "dec" else {3}), op  # its pairs cover all images


def test_the_extractor_is_that_of_table_5() -> None:
    """Table 5 counts both images, forward only."""
    setting = cost.Setting(height=64, width=64)
    for count, expected in (
        (floors.coupling, cost.invertible_block(setting)),
        (floors.extractor, cost.extractor(setting, with_stem=True)),
    ):
        forward, _ = count(TINY)
        assert 2 * (forward.products + forward.others) == expected.macs
    lip = cost.lip_parts(setting, similarity_products=1)
    assert 2 * floors.patches(TINY)[0].products == lip["projection"]
    assert floors.monce(TINY)[0].products == lip["similarity"]


def test_the_slowest_unit_is_the_floor() -> None:
    work = Work(values=1e9, products=1e12, others=1e9)
    # 4 GB at 4 TB/s; three products of halves of 2 flop each at 800 TFLOP/s; 2 Gflop at 50 TFLOP/s.
    assert floors.times(work, "float32", CEILINGS) == pytest.approx((1e-3, 7.5e-3, 7.5e-3))
    assert floors.times(work, "bfloat16", CEILINGS) == pytest.approx((5e-4, 2.5e-3, 2.5e-3))
    others = floors.times(work._replace(products=0, others=1e12), "float32", CEILINGS)
    assert others == pytest.approx((1e-3, 4e-2, 4e-2))
    moved = floors.times(work._replace(products=1), "float32", CEILINGS)
    assert moved == pytest.approx((1e-3, 4e-5, 1e-3))


@pytest.mark.parametrize(
    ("rates", "seconds"),
    [
        # 1e12 products of 2 flop, at rates of float32, TF32 and bfloat16 in TFLOP/s.
        ((50.0, 300.0, 800.0), {"float32": 7.5e-3, "tf32": 2.5e-3, "bfloat16": 2.5e-3}),
        ((50.0, 300.0, 200.0), {"float32": 2e-2, "tf32": 2 / 300, "bfloat16": 1e-2}),
        ((150.0, 300.0, 200.0), {"float32": 2 / 150, "tf32": 2 / 300, "bfloat16": 1e-2}),
    ],
)
def test_products_by_precision(
    rates: tuple[float, float, float], seconds: dict[str, float]
) -> None:
    """The fastest unit whose products have the precision; half precision takes one product."""
    units = ("float32", "tf32", "bfloat16")
    ceilings = {f"{unit}_tflop_per_s": rate for unit, rate in zip(units, rates, strict=True)}
    ceilings["copy_tb_per_s"] = 4.0
    work = Work(values=0, products=1e12)
    assert floors.WAYS.keys() == {*PRECISIONS}
    for precision, expected in seconds.items():
        found = floors.times(work, "float32", ceilings, precision)
        assert found.floor == pytest.approx(expected), precision
        half = floors.times(work, "bfloat16", ceilings, precision)
        assert half.floor == pytest.approx(2 / rates[2])


def test_rows_and_pairs_get_the_floor_of_their_precision() -> None:
    part = {"median_s": 1.0}
    facts = {"op": "gram", "kind": "ours", "dtype": "float32", "shape": "1x3x512x512"}
    rows = [facts | {"parts": {"step": dict(part)}, "precision": p} for p in PRECISIONS]
    slow = CEILINGS | {"copy_tb_per_s": 1e3}  # so that products decide
    for row in rows:
        floors.annotate(row, slow)
    exact, tf32, bfloat16 = (row["parts"]["step"]["floor_s"] for row in rows)
    assert exact == pytest.approx(3 * tf32, rel=1e-2) and tf32 == bfloat16
    ways = [{"precision": p, "median_s": [1.0]} for p in ("float32", "tf32")]
    pair = {"op": "gram", "shape": [1, 512], "a": ways[0], "b": ways[1]}
    floors.annotate_pair(pair, slow)
    assert [way["floor_s"] for way in ways] == [exact, tf32]
    floors.annotate_pair(pair | {"part": "gradient"}, slow)
    assert ways[0]["floor_s"] < exact
    failed = {"median_s": [], "failure": "no"}
    floors.annotate_pair(pair | {"b": failed}, slow)
    assert "floor_s" not in failed


def test_a_whole_step_is_its_operators() -> None:
    features, gradient = floors.extractor(TINY)
    naive = floors.works("mghf_n", TINY, "step")
    assert naive == [features, features, gradient, *floors.naive(TINY)]
    terms = floors.works("mghf_c", TINY, "step")[3:]
    projection, back = floors.patches(TINY)
    assert sorted(terms) == sorted(
        [*floors.content_style(TINY), *floors.monce(TINY), projection, projection, back]
    )
    assert floors.works("gram", TINY, "forward") == [floors.gram(TINY)[0]]
    assert floors.works("gram", TINY, "step") == [*floors.gram(TINY)]
    assert floors.works("gram", TINY, "gradient") == [floors.gram(TINY)[1]]


def test_rows_of_ours_get_their_floor() -> None:
    row = {
        "op": "sinkhorn", "shape": "1x3x512x512", "kind": "ours", "dtype": "float32",
        "parts": {"forward": {"median_s": 4e-4}, "step": {"failure": "out of memory"}},
    }  # fmt: skip
    floors.annotate(row, {})
    assert "floor_s" not in row["parts"]["forward"]
    floors.annotate(row, CEILINGS)
    # 2 x 128 x 441 x 441 values of 4 bytes take 49.8 us, as many multiply-adds 2.0 us (predicted).
    assert row["parts"] == {
        "forward": {
            "median_s": 4e-4, "floor_s": 4.98e-5, "times_floor": 8.03,
            "bandwidth_percent": 12.4, "arithmetic_percent": 0.5,
        },
        "step": {"failure": "out of memory"},
    }  # fmt: skip
    eager = {
        "op": "gram",
        "shape": "1x3x64x64",
        "kind": "eager",
        "parts": {"step": {"median_s": 1}},
    }
    floors.annotate(eager, CEILINGS)
    assert eager["parts"] == {"step": {"median_s": 1}}
