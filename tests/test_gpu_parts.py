"""The measurements of `make gpu`, tested without a GPU."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract import relative_error
from gpu_runs import CASES, CEILINGS, OPS

from benchmarks import cases, floors, gpu_parts
from benchmarks.cases import Form, Shape
from benchmarks.gpu_parts import AUTOTUNED, CAPTURED, LATENTS, PAPER
from mghf_fast import backends, ops
from mghf_fast.commands.table5 import workloads
from mghf_fast.commands.table5.measure import Measurement


@pytest.fixture
def gpu_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases with a GPU's forms, until the end of the test."""
    for op, case in CASES.items():
        monkeypatch.setitem(cases.CASES, op, gpu_parts.on_gpu(case))


# ---- rows ----


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_rows(op: str) -> None:
    """The rows of our forms, launched and as a graph, the paper's size first; and the others'."""
    case = gpu_parts.on_gpu(CASES[op])
    own = gpu_parts.rows_of(case, False, gpu_parts.OWN)
    whole = op in gpu_parts.WHOLE
    assert own[0] == (PAPER, "mghf_fast") and {case.forms[form].kind for _, form in own} == {"ours"}
    shapes = {shape for shape, _ in own}
    if op != "dec":
        assert shapes >= {PAPER, Shape(1, 1024), Shape(16, 256), LATENTS}
    for shape in shapes:
        assert (shape, "mghf_fast" + CAPTURED) in own
        assert ((shape, "mghf_fast bfloat16") in own) == whole
    others = gpu_parts.rows_of(case, False, gpu_parts.OTHERS)
    assert (PAPER, "eager") in others
    assert not {case.forms[form].kind for _, form in others} & {"ours", "forced"}
    assert not any(case.forms[form].compiled for _, form in own + others)
    quick = gpu_parts.rows_of(case, True, gpu_parts.OWN)
    assert {shape for shape, _ in quick} == ({PAPER, LATENTS} if whole else {PAPER})


def test_the_losses_to_replace_are_measured_at_every_shape() -> None:
    rows = gpu_parts.rows_of(gpu_parts.on_gpu(CASES["mghf_c"]), False, gpu_parts.OTHERS)
    for form in ("VGG-16", gpu_parts.VGG16_BEST, "LPIPS AlexNet", "LPIPS VGG-16"):
        assert {shape for shape, name in rows if name == form} == {*gpu_parts.STEPS, Shape(1, 2048)}


def test_compiled_rows() -> None:
    for op, case in CASES.items():
        rows = gpu_parts.rows_of(gpu_parts.on_gpu(case), False, gpu_parts.COMPILE)
        assert bool(rows) == (op in (*gpu_parts.WHOLE, *gpu_parts.COMPILED_OPS))
        assert not rows or {(PAPER, "compile"), (PAPER, "compile" + AUTOTUNED)} <= {*rows}
        # make bench measures none of these
        assert not any(name.endswith((AUTOTUNED, CAPTURED)) for name in case.forms)
    rows = gpu_parts.rows_of(gpu_parts.on_gpu(CASES["mghf_c"]), False, gpu_parts.COMPILE)
    # Compiling 50 unrolled iterations takes minutes.
    assert [name for _, name in rows].index("compile") > 0


def test_vgg16_in_its_best_form() -> None:
    case = gpu_parts.on_gpu(CASES["mghf_c"])
    form = case.forms[gpu_parts.VGG16_BEST]
    (gradient,) = case.step(form.make(), Shape(1, 32), gpu_parts.VGG16_BEST, "step")()
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all()
    assert gradient.is_contiguous(memory_format=torch.channels_last)


# ---- measuring ----


class Watch(gpu_parts.Host):
    """A clock that advances only on request."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def event(self) -> Any:
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def flush(self) -> None:
        self.now += 1000
        self.calls.append("flush")

    def captured(self, function: Callable[[], object]) -> Callable[[], object]:
        self.calls.append("captured")
        return function


def test_time_is_taken_between_events() -> None:
    watch = Watch()

    def work() -> None:
        watch.now += 3  # milliseconds

    found = gpu_parts.timed(watch, work)
    assert len(found.seconds) == gpu_parts.CALLS == watch.calls.count("flush")
    assert found.seconds == pytest.approx([3e-3] * gpu_parts.CALLS)


def test_python_can_be_ahead_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps the device busy comes after the flush and before the event, and is not timed."""
    watch, order = Watch(), []

    def wait() -> None:
        watch.now += 5  # milliseconds
        order.append("ahead")

    def work() -> None:
        watch.now += 3
        order.append("work")

    monkeypatch.setattr(watch, "ahead", wait)
    found = gpu_parts.timed(watch, work, ahead=True)
    assert found.seconds == pytest.approx([3e-3] * gpu_parts.CALLS_AHEAD)
    assert order[3:] == ["ahead", "work"] * gpu_parts.CALLS_AHEAD


def test_what_is_slow_is_called_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "SLOW", 0.01)
    calls = []
    found = gpu_parts.timed(gpu_parts.Host(), lambda: calls.append(time.sleep(0.02)))
    assert len(calls) == 2 and len(found.seconds) == 1 and found.seconds[0] >= 0.02


@pytest.mark.usefixtures("gpu_cases")
def test_how_a_form_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def compiler(function: Any, mode: str) -> Any:
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(gpu_parts, "CALLS", 1)
    watch, tiny = Watch(), Shape(1, 32)

    def measured(op: str, form: str, part: str) -> Measurement:
        return gpu_parts.measure_part(watch, cases.CASES[op], tiny, form, part)

    assert measured("gram", "compile", "step").failure is None
    assert measured("gram", "compile" + AUTOTUNED, "step").failure is None
    assert modes == ["default", "max-autotune"] and "captured" not in watch.calls
    assert measured("mghf_n", "mghf_fast" + CAPTURED, "step").failure is None
    assert "captured" in watch.calls
    monkeypatch.setattr(cases, "package_version", lambda package: None)
    assert measured("sinkhorn", "POT", "forward").failure == "POT is not installed"


def test_a_form_that_fails_is_told() -> None:
    assert gpu_parts.failure(torch.OutOfMemoryError("tried to")) == "out of memory"
    assert gpu_parts.failure(KeyError("a\nb")).startswith("KeyError: ")


def test_a_row_of_table_5_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("tried to")

    monkeypatch.setattr(workloads, "workload", broken)
    written: list[dict[str, Any]] = []
    gpu_parts.table5(Watch(), 64, False, written.append)
    assert [list(r["measured"]) for r in written][:2] == [
        ["mghf_fast", "reference"], ["mghf_fast", "reference", "compile"],
    ]  # fmt: skip
    assert all(m == {"failure": "out of memory"} for r in written for m in r["measured"].values())


@pytest.mark.usefixtures("gpu_cases")
def test_a_whole_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "CALLS", 1)
    written: list[dict[str, Any]] = []
    gpu_parts.run("mghf_n", written.append, quick=True, backend="reference", size=64)
    forms = [r["form"] for r in written]
    assert forms[0] == "mghf_fast" and {"mghf_fast bfloat16", "mghf_fast" + CAPTURED} <= {*forms}
    for found in written:
        assert found["shape"] == "1x3x64x64" and found["parts"]["step"]["median_s"] > 0
        floors.annotate(found, CEILINGS)
    assert written[0]["parts"]["step"]["times_floor"] > 1
    assert written[0]["backends"] == dict.fromkeys(("coupling", "content_style"), "reference")
    assert {r["backend"] for r in written} == {"reference"}


@pytest.mark.usefixtures("gpu_cases")
def test_ceilings_values_and_table_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "CALLS", 1)

    def part(name: str) -> list[dict[str, Any]]:
        written: list[dict[str, Any]] = []
        gpu_parts.run(name, written.append, quick=True, backend="reference", size=64)
        return written

    (found,) = part("ceilings")
    assert set(found) == set(CEILINGS) and all(rate > 0 for rate in found.values())
    rows = part("table5")
    assert [r["key"] for r in rows] == list(workloads.ROW_OPS)
    assert all(m.get("median_s", 0) > 0 for r in rows for m in r["measured"].values())
    checked = part("values")
    assert {r["op"] for r in checked} == set(floors.OPS) and all(r["passed"] for r in checked)


@pytest.mark.usefixtures("gpu_cases")
def test_wrong_values_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.CASES["gram"]
    wrong = cases.Form(lambda: lambda x: 1.01 * case.forms["eager"].make()(x), "ours")
    monkeypatch.setitem(case.forms, "mghf_fast", wrong)  # type: ignore[arg-type]
    written: list[dict[str, Any]] = []
    gpu_parts.values(written.append)
    assert {r["op"] for r in written if not r["passed"]} == {"gram"}


# ---- the peers ----


@pytest.mark.parametrize(
    ("network", "parameters", "shapes"),
    [
        ("alex", 2_470_848, [(64, 15), (192, 7), (384, 3), (256, 3), (256, 3)]),
        ("vgg", 14_716_160, [(64, 64), (128, 32), (256, 16), (512, 8), (512, 4)]),
    ],
)
def test_the_layout_of_lpips(network: str, parameters: int, shapes: list[tuple[int, int]]) -> None:
    """Parameters and stages as in the package lpips, and its formula, by hand."""
    loss = workloads.LPIPSLayout(network)
    assert sum(p.numel() for p in loss.parameters()) == parameters
    sr, gt = workloads.image_pair(64, 2)
    stages = [loss._stages(2 * x.detach() - 1) for x in (sr, gt)]
    assert [tuple(s.shape[1:3]) for s in stages[0]] == shapes
    assert loss(gt, gt) == 0
    expected = 0.0
    for head, s, g in zip(loss.heads, *stages, strict=True):
        torch.testing.assert_close(s.norm(dim=1)[s.norm(dim=1) > 0.5].mean(), torch.tensor(1.0))
        weights = head.get_parameter("weight")[0]
        expected += float((weights * (s - g) ** 2).sum(1).mean())
    assert float(loss(sr, gt).detach()) == pytest.approx(expected, rel=1e-4)
    (gradient,) = torch.autograd.grad(loss(sr, gt), sr)
    assert gradient.isfinite().all() and gradient.norm() > 0


def test_inputs_are_the_same_on_every_device() -> None:
    pairs = zip(workloads.feature_pair(8, 4), workloads.feature_pair(8, 4), strict=True)
    assert all(relative_error(a, b) == 0 for a, b in pairs)
    with torch.device("meta"):
        made = (
            *workloads.image_pair(8), *workloads.feature_pair(8, 4),
            cases.features(Shape(1, 512)), *cases.embeddings(Shape(1, 64)),
        )  # fmt: skip
    assert all(x.device.type == "meta" for x in made)


# ---- forms of two kinds of kernels ----


def test_ops_with_two_kinds_of_kernels_have_forms_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [n + t for n in gpu_parts.FORCED.values() for t in ("", gpu_parts.IN_BFLOAT16)]
    assert not set(names) & set(gpu_parts.on_gpu(CASES["entropy"]).forms)
    monkeypatch.setattr(ops.OPS["entropy"], "why_not", lambda backend: None)
    case = gpu_parts.on_gpu(CASES["entropy"])
    assert {case.forms[name].kind for name in names} == {"forced"}
    assert not set(names) & set(gpu_parts.on_gpu(CASES["mghf_c"]).forms)


def test_a_form_on_a_backend_of_its_own() -> None:
    seen = []
    form = Form(lambda: lambda x: seen.append(backends.current_backend()) or x, "ours")
    function = gpu_parts.with_backend("cuda", form).make()
    with backends.use_backend("triton"):
        assert function(torch.ones(1)) == 1
        assert backends.current_backend() == "triton"
    assert seen == ["cuda"]


@pytest.mark.parametrize("op", ["gram", "sinkhorn", "content_style"])
def test_a_form_with_inputs_of_its_own(op: str) -> None:
    case = CASES[op]
    form = dataclasses.replace(case.forms["mghf_fast"], inputs=torch.bfloat16)
    case = dataclasses.replace(case, forms={"ours": form})
    (gradient,) = case.step(form.make(), gpu_parts.TINY, "ours", "step")()
    assert gradient.dtype == torch.bfloat16


def test_which_backends_were_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "CALLS", 1)
    found: dict[str, str] = {}
    case = CASES["gram"]
    with backends.use_backend("reference"):
        gpu_parts.measure_part(Watch(), case, gpu_parts.TINY, "mghf_fast", "step", found)
    assert found == {"gram": "reference"}
    form = gpu_parts.with_backend("reference", case.forms["mghf_fast"])
    with gpu_parts.chosen(found):
        pass
    assert found == {"gram": "reference"} and form.kind == "forced"
