"""The prediction's arithmetic, and how well it reproduces what was measured."""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path

import pytest

from benchmarks import counting, predict, recording
from benchmarks.counting import Code, Counts, Launch, Row, Sources
from benchmarks.machine_code import Resources, programs
from benchmarks.predict import Fitted, Measurement
from benchmarks.walk import Place, Walker, WalkError

COUNTS = Counts(
    name="mix",
    blocks=132,
    blocks_of_cluster=1,
    warps=4,
    blocks_of_sm=2,
    issued=1000,
    units={"fp32": 300, "integer": 100, "shuffle": 5},
    tensor_cycles=0,
    bytes={"global load": 128, "shared load": 1280},
    near=5000,
    far=7000,
    reached=80,
    unknown=0,
)


def changed(**fields: object) -> Counts:
    return dataclasses.replace(COUNTS, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "cycles"),
    [
        ({}, 1000),  # of each quarter of a multiprocessor, which has one of the four warps
        ({"warps": 8}, 2000),
        ({"tensor_cycles": 1500}, 1500),
        ({"units": {"special": 200}}, 1600),
        ({"bytes": {"shared load": 128 * 500}}, 4 * (500 + 5)),
        ({"bytes": {"shared atomic": 128 * 500}}, 4 * (4 * 500 + 5)),
    ],
)
def test_the_busiest_unit(fields: dict[str, object], cycles: float) -> None:
    assert predict.busiest(changed(**fields), 1) == cycles
    assert predict.busiest(changed(**fields), 2) == 2 * cycles


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (1, 1)),
        ({"blocks": 5}, (1, 1)),
        ({"blocks": 133}, (1, 2)),
        ({"blocks": 265}, (2, 2)),
        ({"blocks": 1320}, (5.5, 2)),
        ({"blocks": 512, "blocks_of_cluster": 4, "blocks_of_sm": 1}, (4.5, 1)),  # 32 clusters
        ({"blocks": 128, "blocks_of_cluster": 4, "blocks_of_sm": 1}, (1, 1)),
    ],
)
def test_rounds(fields: dict[str, object], expected: tuple[float, float]) -> None:
    assert predict.rounds(changed(**fields)) == expected


def test_the_time_of_a_launch() -> None:
    clock, start = predict.CLOCK, predict.LAUNCH_SECONDS
    far, cold = Fitted(0.5, 0), Fitted(0, 100)
    assert predict.seconds(COUNTS, far) == pytest.approx(start + (6000 + 1000) / clock)
    assert predict.seconds(COUNTS, cold) == pytest.approx(start + (5000 + 1000 + 1000) / clock)
    moving = changed(bytes={"global load": 10**6, "global store": 10**6})
    expected = start + 2e6 * 4 * 132 / predict.BANDWIDTH
    assert predict.seconds(moving, Fitted(0, 0)) == pytest.approx(expected)
    row = Row([COUNTS, moving], pytorch=3)
    assert predict.total(row, far) == pytest.approx(
        predict.seconds(COUNTS, far) + predict.seconds(moving, far) + 3 * start
    )


def test_a_fit_finds_the_numbers_and_leaves_rows_out() -> None:
    truth = Fitted(0.25, 500)
    counts = [changed(near=1000 * k, far=1000 * (k + k % 3), reached=400 * k) for k in range(1, 9)]
    rows = [
        Measurement(f"{op} {k} row", Row([each]), predict.seconds(each, truth))
        for op in ("first", "second")
        for k, each in enumerate(counts)
    ]
    found = predict.calibrate(rows)
    assert found.fitted == truth and found.error < 1e-9
    wrong = [*rows, Measurement("third 0 row", rows[0].row, 2 * rows[0].seconds)]
    found = predict.calibrate(wrong)
    assert found.apart_by_op["third 0 row"] == pytest.approx(0.5)
    assert found.apart["third 0 row"] == pytest.approx(0.5)
    assert 0.5 <= found.within["third 0 row"] < 0.6


def test_an_interval() -> None:
    low, high = predict.interval(2.0, math.log(1.5))
    assert low * high == pytest.approx(4) and high / 2 == pytest.approx(1.5**1.645)


def test_the_measurements_are_reproduced_within_a_factor_of_two() -> None:
    """One standard deviation of rows of an op to which nothing was fitted."""
    rows = predict.measurements(counting.load(predict.MEASURED))
    assert len(rows) == 25 and len({m.name.split()[0] for m in rows}) == 4
    found = predict.calibrate(rows)
    assert predict.spread(found.within.values()) < math.log(1.4)
    assert predict.spread(found.apart.values()) < math.log(1.45)
    assert found.error < math.log(1.6)


def test_the_table_and_the_launches(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main([]) == 0
    text = capsys.readouterr().out
    assert "predicted, no GPU has run it" in text and "coupling 512 float32 forward" in text
    steps = [name for name, _ in recording.names_of_steps()]
    assert len(steps) == 24
    assert all(f"\n{step} " in text for step in steps)
    assert predict.main(["--kernels", steps[0]]) == 0
    assert "mix" in capsys.readouterr().out
    assert predict.main(["--kernels", "mghf_x"]) == 2
    error = capsys.readouterr().err
    assert "'mghf_x'" in error and steps[0] in error


def test_counting_without_a_host_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "tool", lambda name: Path(name))
    assert predict.main(["--count", "--host-modules", str(tmp_path)]) == 2
    assert "make cuda-host" in capsys.readouterr().err
    monkeypatch.setattr(recording, "tool", lambda name: None)
    assert predict.main(["--count"]) == 2
    assert "nvcc" in capsys.readouterr().err


def test_equal_launches_are_written_once(tmp_path: Path) -> None:
    rows = {"a": Row([COUNTS, changed(blocks=7), COUNTS]), "b": Row([COUNTS], pytorch=4)}
    file = tmp_path / "counts.json"
    counting.write(file, rows, "0123")
    assert counting.load(file) == rows and counting.sources_of(file) == "0123"
    assert file.read_text().count('"mix"') == 2


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (255, 128, 71808, 2),
        (168, 128, 0, 3),
        (32, 256, 0, 8),
        (16, 32, 0, 32),
        (240, 256, 230880, 1),
    ],
)
def test_blocks_of_a_multiprocessor(registers: int, threads: int, shared: int, blocks: int) -> None:
    assert counting.blocks_of_sm(Resources(registers, 0), threads, shared) == blocks


def test_cycles_of_tensor_cores() -> None:
    counts = {"HGMMA.64x128x16.F32": 2.0, "HMMA.1688.F32.TF32": 10.0, "FFMA": 99.0}
    assert counting.tensor_cycles(counts) == 2 * 64 + 10 * 6.4


def test_names() -> None:
    space = "_ZN4mghf4cuda40_GLOBAL__N__ca7e4b93_8_monce_cu_b7840fd5"
    assert counting.short_name(f"{space}8contrastILi14ELb1EEEvNS0_7ProblemE") == "contrast"
    assert counting.short_name("_ZN4mghf4cuda12_GLOBAL__N_13mixIffEEvi") == "mix"
    assert counting.short_name("_ZN4mghf4cuda16products_of_runsIfEEvi") == "products_of_runs"


TEXT = """
.text._ZN4mghf4cuda12_GLOBAL__N_17planned:
//## File "/x/csrc/cuda/planned.h", line 1
        /*0000*/                   MOV R0, RZ ;
        /*0010*/                   ULDC UR4, c[0x0][0x210] ;
.L_x_0:
        /*0020*/                   HMMA.1688.F32.TF32 R4, R8, R2, R4 ;
        /*0030*/                   FSETP.GT.AND P1, PT, R4, R5, PT ;
//## File "/x/csrc/cuda/planned.h", line 2
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0060*/                   ISETP.LT.AND P0, PT, R0, UR4, PT ;
//## File "/x/csrc/cuda/planned.h", line 1
        /*0070*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0080*/                   EXIT ;
"""
SOURCE = """for (int t = 1; t <= p.iterations; ++t) {
  if (progress.hopeless) return;
"""


def test_counts_of_a_launch(tmp_path: Path) -> None:
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (folder / "planned.h").write_text(SOURCE)
    code = Code()
    found = list(programs(TEXT))
    code.add(found, {found[0].name: Resources(200, 0)})
    launch = Launch(found[0].name, 500, 1, 256, 1 << 10, (50).to_bytes(4, "little"))
    rule = Sources(tmp_path).rule(iterations=3)
    counts = code.count(launch, rule)
    assert (counts.name, counts.blocks, counts.warps, counts.blocks_of_sm) == ("planned", 500, 8, 1)
    assert counts.units["tensor"] == 3 and counts.tensor_cycles == round(3 * 6.4)
    assert counts.unknown == 3 and counts.reached == 9
    assert counts.issued == 2 + 3 * 6 + 1 == counts.near == counts.far
    with pytest.raises(KeyError):
        code.count(dataclasses.replace(launch, name="other"))
    endless = TEXT.replace("IADD3 R0, R0, 0x1", "IADD3 R0, R0, 0x0")
    (other,) = programs(endless)
    with pytest.raises(WalkError):
        Walker(other).walk(
            Place(0, 0, 32, 1, launch.parameters),
            lambda program, jump, known, times: bool(known),
            most=10_000,
        )


DECIDED = """
.text.kernel:
        /*0000*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*0010*/                   FSETP.GT.AND P0, PT, R2, RZ, PT ;
.L_x_0:
        /*0020*/                   FADD R3, R3, R2 ;
//## File "/x/csrc/cuda/planned.h", line {line}
        /*0030*/               @P0 BRA `(.L_x_{label}) ;
        /*0040*/               @P0 EXIT ;
//## File "/x/csrc/cuda/planned.h", line 6
        /*0050*/                   FMUL R3, R3, R2 ;
.L_x_1:
        /*0060*/                   EXIT ;
"""
LINES = (
    "if (progress.hopeless) return;",
    "for (int k = 0; half < rows && k < 8; ++k) {",
    "if (!is_last(counter, blocks)) return;",
    "if (anything(x)) more();",
    "for (int t = 1; t <= made; ++t) {",
    "",
)


@pytest.mark.parametrize(
    ("line", "label", "instructions"),
    [
        (1, 1, 7),  # stays: neither jumps nor ends
        (2, 1, 7),  # enters
        (3, 1, 5),  # skips
        (3, 0, 5),  # ends, as all blocks but one do
        (4, 1, 5),  # skips what may be skipped
        (4, 0, 7),  # leaves the loop
        (5, 0, 7 + 2 * (counting.ITERATIONS - 1)),
    ],
)
def test_rules(tmp_path: Path, line: int, label: int, instructions: int) -> None:
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (folder / "planned.h").write_text("\n".join(LINES))
    (program,) = programs(DECIDED.format(line=line, label=label))
    found = Walker(program).walk(Place(0, 0, 32, 1, b""), Sources(tmp_path).rule())
    assert found.counts.total() == instructions


PASSES = (
    "while (!state.failed) {",
    "if (state.pass == kLast) return;",
    "if (kBackward && state.pass == Pass::weigh) {",
    "if (state.pass == Pass::recur) {",
)
PASSING = """
.text.kernel:
.L_x_0:
//## File "/x/csrc/cuda/planned.h", line 1
        /*0000*/                   LDS.U8 R1, [R0+0x40] ;
//## File "/x/csrc/cuda/planned.h", line 4
        /*0010*/                   LDS.64 R6, [R0+0x30] ;
        /*0020*/                   HMMA.1688.F32.TF32 R4, R8, R2, R4 ;
//## File "/x/csrc/cuda/planned.h", line 2
        /*0030*/                   LDS R5, [R0+0x34] ;
        /*0040*/                   ISETP.EQ.AND P1, PT, R5, {last}, PT ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   BRA `(.L_x_0) ;
.L_x_2:
//## File "/x/csrc/cuda/planned.h", line {line}
        /*0070*/                   EXIT ;
"""


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    ("backward", "last", "products"),
    [
        (False, 1, counting.ITERATIONS + 1),  # ends with the losses
        (True, 3, counting.ITERATIONS + 2),  # the weights, steps backwards, the gradient
    ],
)
def test_passes_whose_number_another_thread_knows(
    tmp_path: Path, backward: bool, last: int, products: int, called: bool
) -> None:
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    lines = [each.replace("state", "state()") if called else each for each in PASSES]
    (folder / "planned.h").write_text("\n".join(lines))
    (program,) = programs(PASSING.format(last=hex(last), line=3 if backward else 1))
    sources = Sources(tmp_path)
    assert sources.supplied(program) == {0: (1, "next pass"), 1: (7, "pass"), 3: (5, "pass")}
    assert sources.goes_backward(program) == backward
    code = Code(sources)
    code.add([program], {"kernel": Resources(100, 0)})
    counts = code.count(Launch("kernel", 128, 1, 512, 0, b""), sources.rule())
    assert counts.units["tensor"] == products and counts.unknown == 0


def test_maps_come_one_after_the_other() -> None:
    """Those of a block, or of a cluster."""
    losses = [0] * counting.ITERATIONS + [1]
    for blocks_of_cluster, first, second in ((1, 5, 105), (4, 1, 26)):
        place = Place(0, 5, 32, 100, b"", blocks_of_cluster)
        passes = counting.Passes(place, backward=False)
        for number in (first, second):
            for each in losses:
                assert passes("next pass") == 0 and passes("pass") == each
            assert passes("map") == number
        assert passes("cluster") == first and passes("rank") == 5 % blocks_of_cluster
        assert passes("failed") == 0 and passes("steps") == 4


def test_changed_sources_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (folder / "a.cu").write_text("one")
    before = counting.digest(tmp_path)
    (folder / "a.cu").write_text("two")
    assert counting.digest(tmp_path) != before
    monkeypatch.setattr(predict, "digest", lambda: "another")
    assert predict.main([]) == 0
    assert "sources have changed" in capsys.readouterr().out
    monkeypatch.setattr(predict, "digest", lambda: counting.sources_of(predict.TODAY))
    assert predict.main([]) == 0
    assert "sources have changed" not in capsys.readouterr().out


def test_the_pages_have_todays_predictions() -> None:
    """The table of NOTES.md, and the sentence of docs/benchmarks.md."""
    rows = predict.load(predict.TODAY)
    calibration = predict.calibrate(predict.measurements(predict.load(predict.MEASURED)))

    def milliseconds(step: str) -> tuple[float, float, float]:
        predicted = 1e3 * predict.total(rows[step], calibration.fitted)
        return predicted, *predict.interval(predicted, calibration.error)

    def digits(x: float) -> str:
        return f"{x:.2f}" if x < 9.995 else f"{x:.1f}"

    notes = (predict.FOLDER / "NOTES.md").read_text()
    shapes = ("1x3x512x512", "1x3x1024x1024", "16x3x256x256", "32x3x64x64")
    for loss in ("n", "c"):
        for extractor in ("paper", "perceptual-v1"):
            steps = [f"mghf_{loss} {extractor} {shape}" for shape in shapes]
            cells = ["{} ({} to {})".format(*map(digits, milliseconds(step))) for step in steps]
            assert f"| MGHF-{loss}, {extractor} | {' | '.join(cells)} |" in notes
    page = " ".join((predict.FOLDER.parent / "docs" / "benchmarks.md").read_text().split())
    n, c = (f"mghf_{loss} paper {shapes[0]}" for loss in "nc")
    for text, step in (
        ("{:.2g} ms for an MGHF-n step (90 % between {:.2g} and {:.2g})", n),
        ("{:.2g} ms for MGHF-c ({:.2g} to {:.2g})", c),
    ):
        assert text.format(*milliseconds(step)) in page
    less = [milliseconds(f"{step} tf32")[0] for step in (n, c)]
    assert "{:.2g} and {:.2g} in TF32".format(*less) in page
    large = f"mghf_c paper {shapes[1]}"
    assert "an MGHF-c step is {:.2g} ms ({:.2g} to {:.2g})".format(*milliseconds(large)) in page


def test_launches_that_differ_by_addresses_alone() -> None:
    from benchmarks.recording import without_addresses

    def parameters(address: int, size: int, factor: float) -> bytes:
        return struct.pack("<QQidxx", address, 0, size, factor)

    first = without_addresses(parameters(0x7F12_3456_7890, 441, 0.5))
    assert first == without_addresses(parameters(0x55AB_0000_1000, 441, 0.5))
    assert first != without_addresses(parameters(0x7F12_3456_7890, 100, 0.5))
    assert first != without_addresses(parameters(0, 441, 0.5))
    assert first != without_addresses(parameters(0x7F12_3456_7890, 441, 0.25))
