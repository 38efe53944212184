"""The tables of a result of `make gpu`, and their comparison with other results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gpu_runs import a_run

from benchmarks import gpu, gpu_parts, gpu_tables, report, results
from mghf_fast import preferences

# ---- tables ----


def test_the_tables() -> None:
    text = gpu_tables.markdown(a_run())
    gram = next(line for line in text.splitlines() if line.startswith("| Gram matrices | "))
    assert gram.startswith(
        "| Gram matrices | 20 ms, 10 MiB | 5 ms, 10 MiB | 5 ms, 10 MiB | 1 ms, 10 MiB | 20x, 5.0x,"
    )
    assert "; " in gram and gram.endswith(" % |")
    assert "Tests on the device: test_gram 9 passed." in text
    assert "**Not complete:** dec over 20 s." in text
    assert "clocks held down by: software power cap; torch 2.x" in text
    assert "copy tb per s 4.3" in text
    assert "| whole MGHF-c step, 32 x 3 x 64 x 64 | 20 ms<br>10 MiB | 1 ms" in text
    assert "out of memory" in text
    assert "| Gram | 8.59 | 8.59 | 2.15 | 1 ms, 4.0 MiB |  | out of memory |" in text
    assert "POT 4 ms, 10 MiB 4.0x" in text
    assert "| VGG-16, for comparison | 4 ms, 10 MiB | 4 ms, 10 MiB | 4 ms, 10 MiB |  |" in text


def test_a_run_of_which_nothing_is_left_has_a_text() -> None:
    empty = a_run() | {"rows": [], "table5": [], "ceilings": {}, "tests": {}, "parts": {"a": "no"}}
    text = gpu_tables.markdown(empty)
    assert "none ran" in text and "**Not complete:** a no." in text


MARKER = "<!-- benchmarks: on GPUs -->\nold\n<!-- benchmarks: end -->\n"


def test_the_readme_has_the_tables_of_every_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (tmp_path / "cpu.json").write_text('{"machine": {}, "rows": []}')
    text, _ = report.generate(f"before\n{MARKER}after\n")
    assert text == f"before\n{MARKER}after\n".replace("old\n", gpu_tables.NONE)
    for name in ("card-a", "card-b"):
        (tmp_path / f"{name}.json").write_text(gpu.to_json(a_run(name)))
    text, _ = report.generate(f"before\n{MARKER}after\n")
    assert text.startswith("before\n<!--") and text.endswith("<!-- benchmarks: end -->\nafter\n")
    assert text.count("| Gram matrices | ") == 2 and "results/card-b.json" in text
    assert report.generate(text)[0] == text


def test_the_pages_say_whether_figures_were_taken() -> None:
    """The blocks equal the committed results, and the text around them does not contradict them: it
    does not claim that no GPU has run the kernels, or give other GPU times."""
    for page, count in (("README.md", 1), ("docs/benchmarks.md", 1)):
        text = (report.ROOT / page).read_text()
        assert len(report.ON_GPUS.findall(text)) == count
        assert report.generate(text, page)[0] == text, "python -m benchmarks.report"
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/building.md",
                 "docs/benchmarks.md"):  # fmt: skip
        outside = report.ON_GPUS.sub("", (report.ROOT / page).read_text())
        outside = report.MARKED.sub("", outside)
        assert "No GPU figure" not in outside
        if gpu_tables.runs():
            assert not re.search(r"(no|never|not)[^.]{0,40} run on (a|any) GPU\b(?! yet)", outside)
            assert not re.search(r"H200[^.]{0,80}\d+(\.\d+)? ms", outside), page


# ---- the table of preferences ----


def forced_rows(times: dict[str, float], shape: str = "1x3x512x512") -> list[results.Row]:
    return [
        {"op": "gram", "shape": shape, "form": gpu_parts.FORCED[backend], "kind": "forced",
         "dtype": "float32", "parts": {"step": {"median_s": seconds}}}
        for backend, seconds in times.items()
    ]  # fmt: skip


def test_results_are_held_against_the_table_of_preferences() -> None:
    elements = 128 * 512 * 512
    rules = [
        preferences.Rule("gram", ("triton", "cuda"), below=elements),
        preferences.Rule("gram", ("cuda", "triton")),
    ]
    run = a_run("card") | {"rows": forced_rows({"cuda": 3e-3, "triton": 2e-3})}
    (found,) = gpu_tables.contradictions(run, rules)
    assert found.startswith("card: gram, 1x3x512x512, float32, size 33554432: cuda takes 1.50")
    assert "| gram | 1 x 3 x 512 x 512 | float32 | 3 ms | 2 ms | triton |" in gpu_tables.markdown(
        run
    )
    small = forced_rows({"cuda": 3e-3, "triton": 2e-3}, "1x3x256x256")
    assert gpu_tables.contradictions(run | {"rows": small}, rules) == []
    assert gpu_tables.contradictions(run, [preferences.Rule("gram", ("triton",))]) == []
    alike = forced_rows({"cuda": 2.05e-3, "triton": 2e-3})
    assert gpu_tables.contradictions(run | {"rows": alike}, rules) == []
    for backend in gpu_parts.FORCED:
        assert gpu_tables.contradictions(run | {"rows": forced_rows({backend: 1.0})}, rules) == []


def test_times_of_kernels_that_were_written_again_contradict_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preferences, "REWRITTEN", {("gram", "cuda"): "2026-11-30"})
    rows = forced_rows({"cuda": 3e-3, "triton": 2e-3})
    run, rules = a_run("card"), [preferences.Rule("gram", ("cuda", "triton"))]
    for taken, number in (({}, 0), ({"taken": "2026-11-29 23:59 UTC"}, 0),
                          ({"taken": "2026-11-30 00:01 UTC"}, 1)):  # fmt: skip
        found = gpu_tables.contradictions(run | {"rows": [row | taken for row in rows]}, rules)
        assert len(found) == number


def test_no_committed_result_contradicts_the_table_of_preferences() -> None:
    assert [text for run in gpu_tables.runs() for text in gpu_tables.contradictions(run)] == []
