"""The result of `make gpu` as Markdown.

    python -m benchmarks.gpu_tables

prints the rules of `mghf_fast/preferences.py` that the committed results of GPUs contradict.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from mghf_fast import preferences

from . import results
from .cases import CASES, Shape, load_all
from .gpu_parts import AUTOTUNED, CAPTURED, FORCED, PAPER, SIZES, TRAINING, VGG16_BEST, WHOLE
from .results import Row, Run, fastest, select, value
from .text import TITLES, cell, duration, part_of, speed, table

NONE = "No GPU figure has been taken yet.\n"

PEERS = {
    "VGG-16": ("VGG-16", "VGG-16 channels_last"),
    "VGG-16 in bfloat16": (VGG16_BEST,),
    "LPIPS, AlexNet": ("LPIPS AlexNet",),
    "LPIPS, VGG-16": ("LPIPS VGG-16",),
}
"""Losses that this one replaces: their forms in eager PyTorch."""

MARGIN = 1.05
"""Ratio of two kernels' times from which on their difference counts."""

# ---- rows of a run ----


def ours(run: Run, op: str, shape: str) -> Row | None:
    """Our row in float32, in the faster of the two layouts."""
    rows = select(run, op=op, shape=shape, kind="ours", dtype="float32")
    return fastest([r for r in rows if not r["form"].endswith(CAPTURED)], part_of(op))


def by(row: Row | None, join: str = ", ") -> str:
    """The backends of a row, if they are not those that "auto" takes."""
    if row is None or row.get("backend") == "auto":
        return ""
    forced = {row["backend"]} if "backend" in row else {*row.get("backends", {}).values()}
    names = [FORCED.get(b, b).removeprefix("mghf_fast ") for b in sorted(forced)]
    return f"{join}by {' and '.join(names)} alone" if names else ""


def host(launched: Row | None, graph: Row | None, part: str) -> str:
    """The time that launching from Python adds to that on the device."""
    a, b = value(launched, part), value(graph, part)
    return "" if a is None or b is None else duration(max(0.0, a - b))


def form(run: Run, op: str, shape: str, *names: str) -> Row | None:
    """The fastest of these forms."""
    rows = [row for row in select(run, op=op, shape=shape) if row["form"] in names]
    return fastest(rows, part_of(op))


def eager(run: Run, op: str, shape: str) -> Row | None:
    return fastest(select(run, op=op, shape=shape, kind="eager"), part_of(op))


def floor(row: Row | None, part: str) -> str:
    """The multiple of the floor, and the percentages of the ceilings of memory and arithmetic."""
    if (times := value(row, part, "times_floor")) is None:
        return ""
    shares = (value(row, part, f"{kind}_percent") for kind in ("bandwidth", "arithmetic"))
    return f"{times:.2g}x; " + ", ".join(f"{share:.0f} %" for share in shares if share is not None)


def factors(own: Row | None, others: Sequence[Row | None], part: str) -> str:
    return ", ".join(filter(None, (speed(other, own, part) for other in others)))


# ---- tables ----


def at_the_papers_size(run: Run) -> str:
    shape, lines = str(PAPER), []
    for op, title in TITLES.items():
        part = part_of(op)
        others = [
            eager(run, op, shape),
            form(run, op, shape, "compile"),
            form(run, op, shape, "compile" + AUTOTUNED),
        ]
        own = ours(run, op, shape)
        cells = [cell(row, part) for row in (*others, own)]
        if any(cells):
            cells[-1] += by(own)
            lines.append([title, *cells, factors(own, others, part), floor(own, part)])
    for title, names in PEERS.items():
        compiled = f"{names[0]} compile"
        rows = [form(run, "mghf_c", shape, *n) for n in (names, [compiled], [compiled + AUTOTUNED])]
        if any(rows):
            lines.append([f"{title}, for comparison", *(cell(r, "step") for r in rows), "", "", ""])
    head = ["512 x 512", "best eager", "torch.compile", "max-autotune", "mghf_fast",
            "faster than each", "its floor; memory, arithmetic"]  # fmt: skip
    return table(head, lines)


def other_libraries(run: Run) -> str:
    """Sinkhorns that a user might take, at the paper's size."""
    own = form(run, "sinkhorn", str(PAPER), "mghf_fast")
    rows = select(run, op="sinkhorn", shape=str(PAPER), kind="peer")
    texts = [f"{r['form']} {cell(r, 'forward')} {speed(r, own, 'forward')}".strip() for r in rows]
    return f"Other Sinkhorns, forward, with how much faster this one is: {'; '.join(texts)}.\n"


def whole_steps(run: Run) -> str:
    """The losses at every size, beside those that they replace."""
    lines = []
    for op in WHOLE:
        for shape in map(str, (*TRAINING, *SIZES)):
            own = ours(run, op, shape)
            graph = form(run, op, shape, "mghf_fast" + CAPTURED)
            rows = [
                eager(run, op, shape),
                own,
                graph,
                form(run, op, shape, "mghf_fast bfloat16"),
                *(form(run, "mghf_c", shape, *names) for names in PEERS.values()),
            ]
            cells = [cell(row, "step", "<br>") for row in rows]
            if any(cells[:4]):
                cells[1] += by(own, "<br>")
                cells.insert(3, host(own, graph, "step"))
                title = f"{TITLES[op].strip('*')}, {shape.replace('x', ' x ')}"
                lines.append([title, *cells, floor(own, "step")])
    head = ["", "best eager", "mghf_fast", "as a CUDA graph", "host", "bfloat16", *PEERS,
            "its floor; memory, arithmetic"]  # fmt: skip
    return table(head, lines)


def over_sizes(run: Run) -> str:
    shapes = [str(shape) for shape in sorted(SIZES)]
    lines = []
    for op, title in TITLES.items():
        if op in WHOLE:
            continue
        part = part_of(op)
        for name, pick in (("mghf_fast", ours), ("eager", eager)):
            rows = [pick(run, op, shape) for shape in shapes]
            cells = [cell(row, part, "<br>") for row in rows]
            if name == "mghf_fast":
                times = [value(row, part, "times_floor") for row in rows]
                cells = [
                    text + (f"<br>{t:.2g}x" if t else "")
                    for text, t in zip(cells, times, strict=True)
                ]
            if any(cells):
                lines.append([f"{title}, {name}" if name == "mghf_fast" else name, *cells])
    head = ["", *(f"{s.size} x {s.size}" for s in sorted(SIZES))]
    return table(head, lines)


def table5(run: Run) -> str:
    lines = []
    for row in run["table5"]:
        counts = [f"{row[key]:.3g}" for key in ("paper_gflop", "published_gmacs", "ours_gmacs")]
        found = [row["measured"].get(v) for v in ("reference", "compile", "mghf_fast")]
        lines.append([row["name"], *counts, *map(_measured, found)])
    head = ["", "GFLOP, the paper", "counted", "ours", "reference", "torch.compile", "mghf_fast"]
    return table(head, lines)


def by_backend(run: Run) -> str:
    """The kernels between which "auto" chooses."""
    lines = []
    for op, shape, dtype, found in _forced(run):
        parts = [f"{found[b] * 1e3:.3g} ms" if b in found else "" for b in FORCED]
        lines.append(
            [op, shape.replace("x", " x "), dtype, *parts, min(found, key=found.__getitem__)]
        )
    return table(["", "", "", *FORCED, "faster"], lines)


def _forced(run: Run, of_today: bool = False) -> list[tuple[str, str, str, dict[str, float]]]:
    """(op, shape, dtype, backend -> seconds) where both kinds of kernels were measured; with
    ``of_today`` without the times of kernels that have been written again since."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in select(run, kind="forced"):
        backend = next(b for b, name in FORCED.items() if row["form"].startswith(name))
        if of_today and _outdated(row, backend):
            continue
        if (seconds := value(row, part_of(row["op"]))) is not None:
            found.setdefault((row["op"], row["shape"], row["dtype"]), {})[backend] = seconds
    for pair in run.get("variants", ()):
        ways = {way.get("backend"): way for way in (pair["a"], pair["b"])}
        if set(ways) == set(FORCED) and not any("environment" in way for way in ways.values()):
            key = (pair["op"], str(Shape(*pair["shape"])), pair.get("dtype", "float32"))
            for backend, way in ways.items():
                if way["median_s"] and not (of_today and _outdated(pair, backend)):
                    found.setdefault(key, {})[backend] = min(way["median_s"])
    return [(*key, times) for key, times in found.items() if len(times) == len(FORCED)]


def _outdated(row: Row, backend: str) -> bool:
    """Rows of the first run have no time at which they were taken."""
    return row.get("taken", "") < preferences.REWRITTEN.get((row["op"], backend), "")


def contradictions(run: Run, rules: Sequence[preferences.Rule] = preferences.RULES) -> list[str]:
    """Cases in which "auto" takes kernels that this run found slower, by more than ``MARGIN``."""
    wrong = []
    for op, shape, dtype, times in _forced(run, of_today=True):
        batch, _, size, _ = map(int, shape.split("x"))
        with torch.device("meta"):
            tensor = CASES[op].inputs(Shape(batch, size))[0]
        kind = getattr(torch, dtype)
        chosen = preferences.preferred_kernels(op, kind, tensor.shape, rules)[0]
        best = min(times, key=times.__getitem__)
        if times[chosen] > MARGIN * times[best]:
            factor = times[chosen] / times[best]
            wrong.append(
                f"{run['machine']['name']}: {op}, {shape}, {dtype}, "
                f"size {preferences.size_of(op, tensor.shape)}: {chosen} takes {factor:.2f} times "
                f"as long as {best}"
            )
    return wrong


def _measured(part: dict[str, Any] | None) -> str:
    return "" if part is None else cell({"parts": {"step": part}}, "step")


def ops_launched(run: Run) -> str:
    """Our ops with the kernels that "auto" takes, launched from Python and as graphs."""
    lines = []
    for op, title in TITLES.items():
        for row in select(run, op=op, form="mghf_fast"):
            graph = form(run, op, row["shape"], "mghf_fast" + CAPTURED)
            if graph is not None and op not in WHOLE:
                part, took = part_of(op), ", ".join(sorted({*row["backends"].values()}))
                cells = [cell(row, part), cell(graph, part), host(row, graph, part)]
                lines.append([f"{title}, {row['shape'].replace('x', ' x ')}", *cells, took])
    return table(["", "mghf_fast", "as a CUDA graph", "host", "backend"], lines)


def kernels(run: Run) -> str:
    """The profile: microseconds of one step by kernel, and iterations by map."""
    blocks = []
    for found in run["profile"]:
        what = f"{found['op']}, {found['shape'].replace('x', ' x ')}"
        if "failure" in found:
            blocks.append(f"{what}: {found['failure']}\n")
        elif "maps_by_iterations" in found:
            counts = found["maps_by_iterations"].items()
            text = ", ".join(f"{maps} maps {n}" for n, maps in counts)
            blocks.append(f"{what} with Triton's kernels: {text or 'none seen'}.\n")
        else:
            rows = [[f"`{k['name']}`", f"{k['us']:.0f}", f"{k['launches']:g}"]
                    for k in found["kernels"]]  # fmt: skip
            head = [what, f"us, {found['us']:.0f} in all", f"launches, {found['launches']:g}"]
            blocks.append(table(head, rows))
    return "\n".join(blocks)


def variants(run: Run) -> str:
    """Every pair, with both measurements of each way in the order in which they were taken, how
    many times as long the second way takes, what the first takes of its floor, and the distance of
    the two results; and the kernels of pairs that list them."""

    def way(found: dict[str, Any]) -> str:
        switches = [f"{k}={v}" for k, v in found.get("environment", {}).items()]
        if "older" in found:
            switches.append("older kernels" if found["older"] else "newer kernels")
        named = (found.get("backend", ""), found.get("precision", ""), *switches)
        times = ", ".join(duration(t) for t in found["median_s"]) or found.get("failure", "none")
        return f"{' '.join(filter(None, named)) or 'as it is'}: {times}"

    lines = []
    for p in run["variants"]:
        a, b = (min(p[side]["median_s"], default=None) for side in "ab")
        ratio = "" if a is None or b is None else f"{b / a:.2f}"
        floor = p["a"].get("floor_s")
        times = "" if a is None or floor is None else f"{a / floor:.2g}x"
        apart = f"{p['b']['difference']:.1e}" if "difference" in p["b"] else ""
        shape = str(Shape(*p["shape"])).replace("x", " x ")
        lines.append([p["name"], shape, way(p["a"]), way(p["b"]), ratio, times, apart])
    head = ["", "", "one way", "the other", "other / one", "one / its floor", "results differ by"]
    return "\n".join([table(head, lines), *kernels_of_pairs(run["variants"])])


def kernels_of_pairs(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """The longest kernels of both ways, in microseconds."""
    blocks = []
    for p in pairs:
        lists = [p[side].get("kernels", []) for side in "ab"]
        if not any(lists):
            continue
        texts = (
            "<br>".join(f"`{k['name']}` {k['us']:.0f}" for k in found) or "none" for found in lists
        )
        blocks.append(table([f"{p['name']}, us", "one way", "the other"], [["", *texts]]))
    return blocks


def flash(run: Run) -> str:
    """Transport problems beside flash-sinkhorn; see gpu_flash.py."""
    lines = []
    for row in run["flash"]:
        if "problem" not in row:
            return f"{row['part']['failure']}.\n"
        cells = [
            cell({"parts": {"step": part}}, "step") if part else ""
            for part in (row["part"], row.get("graph"))
        ]
        apart = f"{row['difference']:.1e}" if "difference" in row else ""
        what = f"{row['problem']}, {row['what']}, {row['precision']}"
        lines.append([what, row["form"], *cells, apart])
    return table(["", "", "launched", "as a CUDA graph", "differs from the plan by"], lines)


def counters(run: Run) -> str:
    rows = run["counters"]
    if failures := [f"{r['kernel']} {r['failure']}" for r in rows if "failure" in r]:
        return "; ".join(failures) + ".\n"
    said = [key for key in rows[0] if key not in ("kernel", "taken", "commit")]
    return table(["", *said], [[f"`{r['kernel']}`", *(r.get(k, "") for k in said)] for r in rows])


def failed_tests(run: Run) -> str:
    """The tests that failed, could not be set up, or were cut off."""
    lines = [
        [f"`{f['test'].rpartition('/')[2] or f['run']}`", f["how"], f["message"].replace("|", "/")]
        for f in run["failures"]
    ]
    return table(["test", "", "message"], lines)


# ---- words ----


def origin(run: Run) -> str:
    """The dates and commits of the rows."""
    if "commit" not in run:
        return ""
    counts: dict[tuple[str, str], int] = {}
    for row in run["rows"]:
        key = (row.get("commit", ""), row.get("taken", "")[:10])
        if key != (run["commit"], run["taken"][:10]):
            counts[key] = counts.get(key, 0) + 1
    older = [
        f"{n} rows of other libraries and eager PyTorch from "
        + (f"{taken}, commit {commit}" if commit else "an earlier run that kept no date")
        for (commit, taken), n in counts.items()
    ]
    return f"Taken {run['taken']} of commit {'; '.join([run['commit'], *older])}. "


def conditions(run: Run) -> str:
    """The card, its state and its ceilings."""
    facts, state = run["machine"], run["state"]["before"]
    rates = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in run["ceilings"].items())
    held = sorted({r for s in run["state"].values() for r in s.get("held_down_by", ())} - {"idle"})
    tf32 = "in TF32" if facts["tf32_convolutions"] else "in float32"
    ours = "ours of float32's accuracy"
    if facts.get("precision", "float32") == "tf32":  # runs before it was an option have no entry
        ours = "ours in TF32 too, for which the floor counts one product"
    return origin(run) + (
        f"{facts['gpu']}, driver {state.get('driver', 'unknown')}, power limit "
        f"{state.get('power_limit_w', 'unknown')} W, clocks held down by: "
        f"{', '.join(held) or 'nothing seen'}; torch {facts['torch']}, triton {facts['triton']}. "
        f"Ceilings measured in the same run: {rates or 'none'}. Medians of forward and backward "
        "(entropy: forward) between events on the device, the second-level cache overwritten "
        "before each; peak memory above the inputs. PyTorch's own convolutions are "
        f"{tf32}, {ours}. The floor is the time that an op's bytes and "
        "multiply-adds take at the ceilings (benchmarks/floors.py), the percentages are the "
        "shares of the measured time that bytes and multiply-adds would take.\n"
    )


def complete(run: Run) -> str:
    """The parts that failed, and the outcome of the tests."""
    tests = "; ".join(f"{name} {text}" for name, text in run["tests"].items())
    failed = "; ".join(f"{part} {text}" for part, text in run["parts"].items() if text != "ok")
    text = f"Tests on the device: {tests or 'none ran'}.\n"
    if checked := "; ".join(f"{tool} {how}" for tool, how in run.get("sanitizer", {}).items()):
        text += f"Sanitizer, every op at a tiny size: {checked}.\n"
    if run.get("failures"):
        summary = f"Tests that failed, could not be set up or were cut off: {len(run['failures'])}"
        text += "\n" + folded(summary, failed_tests(run))
    return text + (f"\n**Not complete:** {failed}.\n" if failed else "")


def folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n</details>\n"


def markdown(run: Run) -> str:
    """Everything of one run."""
    name = run["machine"]["name"]
    file = f"benchmarks/results/{name}.json"
    blocks = [at_the_papers_size(run), conditions(run), complete(run)]
    if run["rows"]:
        steps = whole_steps(run) + "\n" + other_libraries(run)
        blocks.append(folded("Whole steps, at training shapes and with other losses", steps))
        blocks.append(folded("Every op over image sizes, with times its floor", over_sizes(run)))
        if any(r["form"].endswith(CAPTURED) and r["op"] not in WHOLE for r in run["rows"]):
            blocks.append(folded("Every op, launched and as a graph", ops_launched(run)))
        if _forced(run):
            blocks.append(folded("CUDA C++ and Triton, side by side", by_backend(run)))
    if run.get("profile"):
        blocks.append(folded("Kernels of a step, and Sinkhorn's iterations", kernels(run)))
    if run.get("variants"):
        blocks.append(folded("Variants, each measured twice in turn", variants(run)))
    if run.get("flash"):
        blocks.append(folded("Transport beside flash-sinkhorn", flash(run)))
    if run.get("counters"):
        blocks.append(folded("Counters of the longest kernels", counters(run)))
    if run["table5"]:
        blocks.append(folded("Table 5 of the paper, measured", table5(run)))
    return "\n".join(blocks) + f"\nAll rows: [{file}]({file}).\n"


def runs() -> list[Run]:
    """The committed results of GPUs."""
    texts = (path.read_text() for path in sorted(results.RESULTS.glob("*.json")))
    return [run for run in map(json.loads, texts) if "ceilings" in run]


def block() -> str:
    """What docs/benchmarks.md says of GPUs."""
    return "\n".join(map(markdown, runs())) or NONE


if __name__ == "__main__":
    load_all()
    wrong = [text for run in runs() for text in contradictions(run)]
    print("\n".join(wrong) or "no committed result contradicts the table")
    sys.exit(1 if wrong else 0)
