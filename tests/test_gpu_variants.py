"""Pairs of ways that `make gpu` compares, without a GPU: what is measured, by which processes."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import CASES, OPS, measured

from benchmarks import (
    gpu,
    gpu_parts,
    gpu_processes,
    gpu_setup,
    gpu_tables,
    gpu_variants,
    gpu_ways,
)
from benchmarks.cases import Shape
from mghf_fast import backends, native
from mghf_fast.precision import PRECISIONS

PAIR = {"name": "p", "op": "gram", "shape": [1, 32], "a": {"backend": "reference"},
        "b": {"environment": {"MGHF_SWITCH": "1"}}}  # fmt: skip


# ---- pairs ----


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "must hold a list of pairs, got dict"),
        ([PAIR | {"op": "blur"}], "op must be one of .*, got 'blur'"),
        ([PAIR | {"c": 1}], "must have the keys .*: see c"),
        ([{"name": "p"}], "must have the keys .*: see a, b, op, shape"),
        ([PAIR | {"a": {"env": {}}}], "a way may have backend, environment, .*, got"),
        ([PAIR | {"a": {"older": ["gram"]}}], "older must list some of coupling, .*, got"),
    ],
)
def test_pairs_that_are_wrong(wrong: Any, said: str, tmp_path: Path) -> None:
    (file := tmp_path / "pairs.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=said):
        gpu_variants.read(file, OPS)
    file.write_text(json.dumps([PAIR]))
    assert gpu_variants.read(file, OPS) == [*gpu_variants.PAIRS, PAIR]


def test_newer_kernels_are_compared_with_older_ones_in_every_precision() -> None:
    pairs = gpu_variants.newer_pairs()
    assert gpu_variants.checked(pairs, CASES) == pairs
    with_older = [p for p in pairs if "older" in p["b"]]
    for op, part, form, size in gpu_variants.NEWER_KERNELS:
        assert form in CASES[op].forms
        wanted = (op, part, [1, size])
        found = [p for p in with_older if (p["op"], p["part"], p["shape"]) == wanted]
        precisions = PRECISIONS if size == 512 else PRECISIONS[:1]
        assert [p["a"]["precision"] for p in found] == [*precisions]
        for pair in found:
            older = pair["b"]["older"]
            assert pair["a"] == pair["b"] | {"older": []}
            assert older == ([op] if op in gpu_variants.OLDER else [*gpu_variants.OLDER])
    for shape in gpu_variants.SMALL_MAPS:
        found = [p for p in with_older if p["shape"] == [*shape]]
        assert [(p["op"], p["part"]) for p in found] == [
            ("monce", "forward"), ("monce", "gradient")
        ]  # fmt: skip
        assert {p["a"]["precision"] for p in found} == {"float32"}
    # Whole steps in float32 come before anything in less.
    grades = [p["a"]["precision"] for p in with_older]
    assert grades == sorted(grades, key=PRECISIONS.index)
    rest = [p for p in pairs if p not in with_older]
    assert {p["op"] for p in rest} == {*gpu_variants.GRADED_ALONE}
    assert all(p["b"]["precision"] == "float32" for p in rest)


def test_a_way_has_its_precision() -> None:
    pair = {"op": "mghf_n"}
    case, form = gpu_variants.case_of(pair, CASES["mghf_n"], {"precision": "bfloat16"})
    loss = CASES["mghf_n"].forms["mghf_fast"].graded
    assert loss is not None and loss("bfloat16").precision == "bfloat16"  # type: ignore[attr-defined]
    (gradient,) = case.step(case.forms[form].make(), Shape(1, 32), form, "step")()
    assert gradient.shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="precision is 'tf32', but this op has none"):
        gpu_variants.case_of({"op": "entropy"}, CASES["entropy"], {"precision": "tf32"})


@pytest.mark.parametrize("op", ["gram", "monce"])
def test_a_gradient_alone_is_that_of_the_step(op: str) -> None:
    case = CASES[op]
    found = []
    for part in ("step", "gradient", "gradient"):
        torch.manual_seed(0)
        step = case.step(case.forms["eager"].make(), Shape(1, 64), "eager", part)
        found += [step(), step()]  # whatever it keeps, it can be repeated
    for result in found:
        torch.testing.assert_close(result, found[0])


def facts(seconds: Sequence[float], **more: Any) -> dict[str, Any]:
    return {"median_s": list(seconds), **more}


def test_newer_kernels_that_fail_are_known() -> None:
    pair = {"op": "coupling", "a": facts([1.0], older=[]), "b": facts([2.0], difference=1e-6)}
    assert gpu_variants.failing([pair]) == []
    for a, b in (
        (facts([], older=[], failure="did not end"), {}),
        (facts([1.0], older=[]), facts([1.0], difference=float("nan"))),
        (facts([1.0], older=[]), facts([1.0], difference=0.5)),
    ):
        assert gpu_variants.failing([pair | {"a": a, "b": b}]) == ["coupling"]
    step = pair | {"op": "mghf_n", "a": facts([], older=[], failure="no")}
    assert gpu_variants.failing([step]) == []
    assert gpu_variants.failing([pair | {"a": facts([], failure="no")}]) == []


def test_a_table_says_how_the_ways_compare() -> None:
    kernels = [{"name": "mix", "us": 12.4, "launches": 1.0}]
    pair = {
        "name": "coupling", "op": "coupling", "shape": [1, 512],
        "a": facts([2e-3, 1e-3], backend="cuda", older=[], precision="tf32", kernels=kernels,
                   floor_s=2.5e-4),
        "b": facts([3e-3, 2.5e-3], backend="cuda", older=["coupling"], difference=2e-7),
    }  # fmt: skip
    text = gpu_tables.variants({"variants": [pair]})
    assert "| coupling | 1 x 3 x 512 x 512 | cuda tf32 newer kernels: 2 ms, 1 ms |" in text
    assert "cuda older kernels: 3 ms, 2.5 ms | 2.50 | 4x | 2.0e-07 |" in text
    assert "| coupling, us | one way | the other |" in text and "`mix` 12 | none |" in text
    failed = pair | {"b": facts([], failure="did not end within 25 s")}
    text = gpu_tables.variants({"variants": [failed]})
    assert "as it is: did not end within 25 s |  | 4x |  |" in text


# ---- ways ----


def test_ways_are_compared_before_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = PAIR | {"b": {"backend": "reference", "precision": "float32"}, "kernels": True}
    rows = measured([pair, PAIR], monkeypatch)
    assert [(r["pair"], r["way"]) for r in rows] == [(0, "a"), (0, "b"), (1, "a")]
    assert rows[1]["part"]["difference"] == 0 and "difference" not in rows[0]["part"]
    assert all(r["part"]["median_s"] > 0 for r in rows)
    assert rows[0]["part"]["kernels"] and "kernels" not in rows[2]["part"]
    assert [r["pair"] for r in measured([pair, PAIR], monkeypatch, begin=2)] == [1]
    (found,) = gpu_variants.joined(rows[:2], [pair])
    assert found["b"]["difference"] == 0 and found["a"]["kernels"]


def test_a_way_that_waits_for_ever_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    left = threading.Event()
    monkeypatch.setattr(gpu_ways, "measure_way", lambda *_: (left.wait(30) and {}, None))
    rows = measured([PAIR], monkeypatch, patience=0.1, leave=left.set)
    assert left.is_set()
    assert rows[0]["part"] == {"failure": "did not end within 0 s"}


def test_a_device_that_stays_broken_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    wrong = PAIR | {"op": "entropy", "a": {"precision": "tf32"}, "b": {}}
    rows = measured([wrong], monkeypatch, leave=lambda: left.append(1))
    assert [("failure" in r["part"]) for r in rows] == [True, False] and not left

    def broken(clock: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu_parts.Host, "synchronize", broken)
    rows = measured([wrong], monkeypatch, leave=lambda: left.append(1))
    assert len(rows) == 1 and left == [1]
    assert rows[0]["part"]["failure"].startswith("ValueError: precision")


def test_a_way_runs_the_older_kernels_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    older: dict[str, bool] = {}

    def switch(op: str, device: int, use_older: bool) -> bool:
        older[op] = use_older
        return op != "patches" or not use_older  # a library without older kernels of it

    monkeypatch.setattr(native, "use_older_cuda_kernels", switch)
    monkeypatch.setattr(backends, "unavailable_reasons", dict)
    with gpu_variants.kernels_of({}):
        assert older == {}
    with gpu_variants.kernels_of({"older": ["monce"]}):
        assert older == dict.fromkeys(gpu_variants.OLDER, False) | {"monce": True}
    assert older == dict.fromkeys(gpu_variants.OLDER, False)
    with pytest.raises(ValueError, match="no older kernels of patches"):
        gpu_variants.use_older(["patches"])
    monkeypatch.setattr(backends, "unavailable_reasons", lambda: {"cuda": "no GPU here"})
    with (
        pytest.raises(RuntimeError, match="no GPU here"),
        gpu_variants.kernels_of({"older": []}),
    ):
        pass


# ---- the processes ----


def test_variants_run_twice_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each environment runs in a separate process, here on the CPU."""
    command, seen = gpu.part_command, []
    together = gpu_processes.run_together

    def run(
        commands: Any, folder: Path, limit: float, environment: Any, meanwhile: Any
    ) -> dict[str, str]:
        seen.append(environment)
        return together(commands, folder, limit, environment)

    monkeypatch.setattr(gpu, "run_together", run)
    monkeypatch.setattr(gpu, "part_command", lambda *a: [*command(*a), "--device", "cpu"])
    how, (found,) = gpu.run_variants([PAIR], tmp_path, 300)
    assert how == "ok" and seen == 2 * [{}, {"MGHF_SWITCH": "1"}]
    assert found["op"] == "gram" and found["a"]["backend"] == "reference"
    assert [len(found[way]["median_s"]) for way in "ab"] == [2, 2]
    text = gpu_tables.variants({"variants": [found]})
    assert "| p | 1 x 3 x 32 x 32 | reference: " in text and "MGHF_SWITCH=1: " in text
    assert gpu.run_variants([PAIR], tmp_path, 3) == ("4 of 4 turns were left out", [found])


class Processes:
    """Stands for processes that write some of their rows and end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *written: tuple[int, str]) -> None:
        self.written, self.begins = list(written), []
        monkeypatch.setattr(gpu, "run_together", self.run)

    def run(
        self, commands: Mapping[str, list[str]], folder: Path, *_: Any, **__: Any
    ) -> dict[str, str]:
        ((name, command),) = commands.items()
        words = dict(itertools.pairwise(command))
        self.begins.append(int(words["--begin"]))
        ways = gpu_variants.ways_of(json.loads(Path(words["--pairs"]).read_text()), {})
        count, how = self.written.pop(0) if self.written else (len(ways), "ok")
        with Path(command[command.index("benchmarks.gpu_ways") + 1]).open("a") as file:
            for index, side in ways[self.begins[-1] :][:count]:
                row = {"pair": index, "way": side, "part": {"median_s": 1.0}}
                file.write(json.dumps(row) + "\n")
        return {name: how}


def test_another_process_takes_the_ways_that_are_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pairs = [PAIR | {"name": name, "b": {"backend": "reference"}} for name in "pqr"]
    died = "exit code -11: no message"
    processes = Processes(monkeypatch, (2, "exit code 3: no"), (0, died), (3, "ok"))
    how, rows = gpu.run_variants(pairs, tmp_path, 300)
    assert processes.begins == [0, 2, 3, 0] and how.startswith(f"exit code 3: no; {died}")
    assert how.endswith("; 1 of 12 measurements failed")
    assert rows[1]["a"] == {"backend": "reference", "median_s": [1.0], "failure": died}
    assert [len(row["b"]["median_s"]) for row in rows] == [2, 2, 2]


def test_a_part_over_its_time_keeps_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    processes = Processes(monkeypatch, (1, "over 9 s"), (1, "over 9 s"))
    pair = PAIR | {"b": {}}
    how, (row,) = gpu.run_variants([pair], tmp_path, 20)
    assert how == "over 9 s" and processes.begins == [0, 0] and row["a"]["median_s"] == [1.0, 1.0]


def test_rows_are_saved_while_a_part_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MGHF_COMMIT", "abc1234")
    run: dict[str, Any] = {
        "commit": "abc1234", "parts": {"ceilings": "ok"}, "ceilings": {}, "variants": [],
        "values": [], "rows": [{"op": "gram", "kind": "eager"}],
    }  # fmt: skip
    saved: list[dict[str, Any]] = []

    def save_progress(part: str) -> dict[str, Any]:
        gpu.save_progress(run, part, tmp_path, [PAIR], saved.append)
        return saved[-1] if saved else {}

    assert save_progress("gram") == {}
    (tmp_path / "gram.jsonl").write_text('{"op": "gram", "kind": "eager"}\n{"op": ')
    found = save_progress("gram")
    assert len(found["rows"]) == 2 and found["rows"][1]["commit"] == "abc1234"
    assert found["parts"] == {"ceilings": "ok", "gram": "did not end"}
    line = {"pair": 0, "way": "a", "part": {"median_s": 1.0}}
    (tmp_path / "variants.jsonl").write_text(json.dumps(line) + "\n")
    assert save_progress("variants")["variants"][0]["a"]["median_s"] == [1.0]
    assert run["rows"] == [{"op": "gram", "kind": "eager"}] and run["variants"] == []
    count = len(saved)
    old = time.time() - 60
    os.utime(tmp_path / "gram.jsonl", (old, old))
    save_progress("gram")
    assert len(saved) == count  # nothing new


def test_what_runs_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_processes, "POLL", 0.1)
    called: list[float] = []
    command = [sys.executable, "-c", "import time; time.sleep(1)"]
    ended = gpu_processes.run_together(
        {"a": command}, tmp_path, 60, meanwhile=lambda: called.append(time.monotonic())
    )
    assert ended == {"a": "ok"} and len(called) >= 3
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(gpu_processes, "GRACE", 0.5)
    ended = gpu_processes.run_together({"a": slow}, tmp_path, 1, meanwhile=lambda: None)
    assert ended == {"a": "over 1 s"}


def test_parts_go_on_where_newer_kernels_cannot_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The whole command on a CPU, which has no CUDA kernels: every way says so, and so does a
    package that is not there."""
    command = gpu.part_command
    on_cpu = ["--device", "cpu", "--size", "32"]
    monkeypatch.setattr(gpu_setup, "problem_here", lambda: None)
    monkeypatch.setattr(gpu, "gpu_name", lambda: "card")
    monkeypatch.setattr(gpu, "part_command", lambda *a: [*command(*a), *on_cpu])
    monkeypatch.setattr(gpu_variants, "NEWER_KERNELS", gpu_variants.NEWER_KERNELS[:1])
    monkeypatch.setattr(gpu_variants, "SMALL_MAPS", ())
    monkeypatch.setattr(gpu_variants, "GRADED_ALONE", ())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["--only", "newer", "flash", "--out", str(tmp_path)]) == 1
    run = json.loads((tmp_path / "card.json").read_text())
    assert run["parts"] == {"newer": "12 of 12 measurements failed", "flash": "ok"}
    assert [pair["a"]["precision"] for pair in run["variants"]] == [*PRECISIONS]
    assert all("failure" in pair[way] for pair in run["variants"] for way in "ab")
    assert all(row["commit"] == run["commit"] for row in (*run["variants"], *run["flash"]))
    assert "newer 12 of 12 measurements failed" in (tmp_path / "card.md").read_text()


def test_failed_newer_kernels_are_not_used_in_later_parts(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    command = gpu.part_command("mghf_c", file, False, ["coupling", "monce"])
    assert command[-3:] == ["--older", "coupling", "monce"]
    assert "--older" not in gpu.part_command("mghf_c", file, False)
