"""Trials of kernels: checked once at their first use on a device, avoided if they differ."""

from __future__ import annotations

import contextlib
import functools
import json
import linecache
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import draws
import kernel_sources
import pytest
import torch
from torch import Tensor

import mghf_fast
from mghf_fast import cache, problems, trials
from mghf_fast.backends import unavailable_reasons
from mghf_fast.commands.doctor import examination as doctor
from mghf_fast.ops import OPS, _dispatch

H200 = {
    ("cuda", "coupling"): "9cc2cdc709a24c82",
    ("cuda", "entropy"): "7b1cd4287db88e65",
    ("cuda", "gram"): "e28730144f5b6796",
    ("cuda", "content_style"): "b46a3ac1df0e0d7e",
    ("cuda", "patches"): "03cd2a150173d11b",
    ("cuda", "sinkhorn"): "535a5571aceb708c",
    ("cuda", "monce"): "260797ed66409da3",
    ("triton", "coupling"): "e04345aedc7043cb",
    ("triton", "entropy"): "9b3846cefd8104bf",
    ("triton", "gram"): "f9eb5e4412706e31",
    ("triton", "content_style"): "5d42e438c6a01efb",
    ("triton", "patches"): "9317129ae71625c6",
    ("triton", "sinkhorn"): "7df90f9e16453a73",
    ("triton", "monce"): "149e361843457314",
    ("triton", "dec"): "d845360ed21eb773",
}
"""Digests of the sources that ran on an H200 (benchmarks/results/h200.json, 2026-11-26). Since then
Triton's files were split and their host functions renamed: for the proven ops these are the digests
after that. The kernels' code, and its specialisations by the launches at the paper's shapes
(kernels, types, constants, options, for sm_80 and sm_90), were compared before and after, and are
the same. Then the host functions of Triton's `coupling` took `keep` and `state`, which they ignore;
no line of a kernel or of a launch changed."""


def test_what_is_proven_is_what_was_run() -> None:
    for (backend, op), capabilities in trials.PROVEN.items():
        assert capabilities == trials.HOPPER  # the only one run so far
        assert kernel_sources.digest(backend, op) == H200[backend, op], (
            f"the {backend} kernels of {op} are no longer those that a GPU has run: take them out "
            "of trials.PROVEN, so that they are tried at their first use"
        )


def test_a_digest_is_of_what_is_compiled() -> None:
    texts = {
        "csrc/cuda/gram.cu": '#include "gram.h"\n#include "bins.h"\nint a; // one',
        "csrc/cuda/bins.h": "int c();",
        "csrc/cuda/bins.cu": "int c() { return 1; }",
        "csrc/cuda/gram.h": "int b;",
        "csrc/cuda/ops/gram.cpp": '#include "../gram.h"\nint c;',
        "kernels/gram.py": (
            "from mghf_fast.kernels import launch\nfrom mghf_fast.kernels.image import x\n"
            "def f():\n    return 1\n"
        ),
        "kernels/image.py": "x = 1",
        "kernels/launch.py": "y = 1",
    }

    def digests(**changed: str) -> tuple[str, str]:
        known = texts | {k.replace("__", "/").replace("_cu", ".cu"): v for k, v in changed.items()}
        read = known.__getitem__
        return kernel_sources.digest("cuda", "gram", read), kernel_sources.digest(
            "triton", "gram", read
        )

    before = digests()
    texts["csrc/cuda/gram.cu"] = (
        '#include "gram.h"\n#include "bins.h"\n\n/* another\ncomment */ int  a;'
    )
    texts["kernels/gram.py"] = '"""Says more."""\n' + texts["kernels/gram.py"]
    assert digests() == before
    texts["csrc/cuda/gram.h"] = "int d;"
    texts["kernels/image.py"] = "x = 2"
    after = digests()
    assert after[0] != before[0] and after[1] != before[1]
    texts["csrc/cuda/bins.cu"] = "int c() { return 2; }"
    assert digests()[0] != after[0]


def test_every_op_with_a_gpu_kernel_has_a_problem() -> None:
    tried = {name for name, op in OPS.items() if {*trials.TRIED} & {*op.backends}}
    assert {*tried, "coupling_inverse"} == {*problems.PROBLEMS} == {*problems.SMALL}
    assert {op for _, op in trials.PROVEN} <= {*OPS}


def test_matrices_of_several_blocks_are_tried() -> None:
    for op in ("monce", "sinkhorn"):
        small, *between, larger = problems.for_trial(op)
        assert small.tensors[0].shape[1] < 112 and larger.tensors[0].shape[1] > 640
        # On compute capability 9.0 a map of more than 224 patches is three warpgroups'.
        assert [224 < x.tensors[0].shape[1] <= 336 for x in between] == [True] * (op == "monce")


def test_a_block_with_several_tiles_of_pixels_is_tried() -> None:
    _, larger = problems.for_trial("content_style")
    pixels = larger.tensors[0][0, 0].numel()
    assert pixels % 4 == 0 and pixels > 64 * 2 * 132  # an H200's blocks of content_style_stream.h


def test_activations_with_kernels_of_their_own_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def forward(x: Tensor, weights: list[Tensor], activation: str, *rest: Any) -> Any:
        tried.append(activation)
        return [x]

    monkeypatch.setattr(torch.ops.mghf_fast, "coupling", forward)
    for problem in problems.for_trial("coupling"):
        problem.run(problem.tensors, "reference")
    assert {*tried} == {"relu6", "leaky_relu"}


@pytest.mark.parametrize("op", [*problems.PROBLEMS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_cpu_kernels_would_pass(op: str, dtype: torch.dtype) -> None:
    if "cpu" in unavailable_reasons():
        pytest.skip(unavailable_reasons()["cpu"])
    outcome = trials.try_kernel(op, "cpu", torch.device("cpu"), dtype)
    problem = problems.small(op)
    gradients = int(problem.differentiable)
    if problem.weights and dtype == torch.float32:
        gradients = len(problem.tensors)
    assert outcome.failure is None and len(outcome.errors) == 1 + gradients
    assert max(outcome.errors) < (1e-5 if dtype == torch.float32 else trials.HALF / 2)


# ---- on a device: the CPU's kernels stand in for a GPU's ----


@pytest.fixture
def on_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Makes the CPU's kernels subject to trials, with an empty cache."""
    if "cpu" in unavailable_reasons():
        pytest.skip(unavailable_reasons()["cpu"])
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(trials, "DEVICES", ("cpu",))
    monkeypatch.setattr(trials, "TRIED", ("cpu",))
    monkeypatch.setattr(trials, "_capability", lambda device: (9, 9))
    monkeypatch.setattr(trials, "_capturing", lambda: False)
    cache._known.cache_clear()
    cache._told.cache_clear()
    trials.forget()
    yield tmp_path / "cache" / cache.NAME
    cache._known.cache_clear()
    trials.forget()


def broken(monkeypatch: pytest.MonkeyPatch, op: str, how: str) -> None:
    right = OPS[op].implementation("cpu")

    def forward(*arguments: Any) -> Any:
        if how == "raises":
            raise RuntimeError("an illegal instruction was encountered\nand more")
        result = right.forward(*arguments)
        if how in ("tf32", "bfloat16"):  # wrong with these products only
            return tuple(x * (2 if arguments[-1] == how else 1) for x in result)
        if how == "wide":  # wrong for images of several strips only
            return tuple(x * (2 if arguments[0].shape[-1] > 64 else 1) for x in result)
        factor = torch.nan if how == "nan" else 1.01
        return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor

    def backward(*arguments: Any) -> Any:
        found = right.backward(*arguments)
        return [1.01 * found[0], *found[1:]] if isinstance(found, list) else 1.01 * found

    monkeypatch.setitem(
        OPS[op]._implementations,
        "cpu",
        _dispatch.Implementation(
            right.forward if how == "gradient" else forward,
            backward if how == "gradient" else right.backward,
            right.can_run,
        ),
    )


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gt = torch.rand(1, 3, 64, 64, generator=generator)
    return (0.9 * gt + 0.05).requires_grad_(), gt


def training_step() -> tuple[Tensor, Tensor]:
    sr, gt = images()
    loss = mghf_fast.MGHFLoss(input_range="0,1")(sr, gt)
    loss.backward()
    assert sr.grad is not None
    return loss.detach(), sr.grad


def test_every_precision_is_tried_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "coupling", "tf32")
    outcome = trials.try_kernel("coupling", "cpu", torch.device("cpu"), torch.bfloat16)
    assert outcome.failure is not None and "with products in tf32" in outcome.failure


def test_a_right_kernel_is_tried_once_and_kept(on_trial: Path) -> None:
    with mghf_fast.use_backend("cpu"):
        expected = training_step()
    assert not on_trial.exists()  # a backend requested by name is not tried
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = training_step()
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    (machine,) = json.loads(on_trial.read_text())["machines"].values()
    kept = machine["trials"]
    assert {"cpu coupling float32", "cpu monce float32"} <= {*kept}
    assert all(row["failure"] is None for row in kept.values())
    written = on_trial.stat().st_mtime_ns
    trials.forget()
    training_step()
    assert on_trial.stat().st_mtime_ns == written
    rows = {row["op"]: row for row in trials.listed(torch.device("cpu"))}
    assert rows["coupling"]["state"] == "passed" and rows["coupling"]["types"] == ["float32"]
    assert rows["dec"]["state"] == "not tried"


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("wrong", r"its result differs from the reference's by 1.0e-02 \(1e-04\)"),
        ("nan", "its result differs from the reference's by inf"),
        ("gradient", r"its gradient differs from the reference's by 1.0e-02 \(1e-03\)"),
        ("raises", "RuntimeError: an illegal instruction was encountered"),
        ("wide", r"its result differs from the reference's by 1.0e\+00"),
        ("tf32", r"with products in tf32 its result differs from the reference's by 1.0e\+00"),
        ("bfloat16", r"with products in bfloat16 its result differs .* by 1.0e\+00 \(1e-01\)"),
    ],
)
def test_a_wrong_kernel_is_left_out_with_one_warning(
    on_trial: Path, monkeypatch: pytest.MonkeyPatch, how: str, told: str
) -> None:
    with mghf_fast.use_backend("reference"):
        expected = training_step()
    broken(monkeypatch, "coupling", how)
    with pytest.warns(RuntimeWarning, match=told) as caught:
        got = training_step()
        again = training_step()
    assert (
        len([w for w in caught if "leaves out the cpu kernel of coupling" in str(w.message)]) == 1
    )
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5 * float(e.abs().max()))
    # Another process reads it from the file, and warns once too.
    trials.forget()
    with pytest.warns(RuntimeWarning, match="leaves out the cpu kernel of coupling"):
        training_step()
    (row,) = (r for r in trials.listed(torch.device("cpu")) if r["op"] == "coupling")
    assert row["state"] not in ("passed", "not tried")
    fails = pytest.raises(RuntimeError) if how == "raises" else contextlib.nullcontext()
    with fails, mghf_fast.use_backend("cpu"):
        training_step()  # requested by name it still runs


def in_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_warnings_point_at_the_line_that_called_the_library(
    on_trial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a trial, and of a cache that cannot be read."""
    broken(monkeypatch, "coupling", "wrong")
    broken(monkeypatch, "gram", "wrong")
    gram, loss = mghf_fast.functional.gram_matrix, mghf_fast.MGHFLoss("n", input_range="0,1")
    x, (sr, gt) = draws.randn(1, 4, 8, 8), images()
    compiled = torch.compile(gram, fullgraph=True, backend="aot_eager")
    library_alone = functools.partial(gram, x)
    calls = {
        "an op": lambda: gram(x),
        "a loss": lambda: loss(sr, gt),
        "compiled": lambda: compiled(x),
        "of the user's thread": lambda: in_a_thread(lambda: gram(x)),
        "of a thread without a user's line": lambda: in_a_thread(library_alone),
    }
    on_trial.parent.mkdir(parents=True)
    for name, call in calls.items():
        on_trial.write_text("no JSON")
        cache._known.cache_clear()
        cache._told.cache_clear()
        trials.forget()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            call()
        told = [warning for warning in caught if warning.category is RuntimeWarning]
        assert ["cannot be used" in str(w.message) for w in told] == [True, False], name
        for warning in told:
            line = linecache.getline(warning.filename, warning.lineno)
            if name == "of a thread without a user's line":
                assert warning.filename == mghf_fast.functional.__file__
            else:
                assert warning.filename == __file__ and f'"{name}": lambda' in line


def with_older_kernels(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """The op's kernels are wrong until its older ones are asked for."""
    right = OPS[op].implementation("cpu")
    broken(monkeypatch, op, "nan")

    def use(name: str, backend: str, device: torch.device) -> bool:
        if name != op:
            return False
        monkeypatch.setitem(OPS[op]._implementations, "cpu", right)
        return True

    monkeypatch.setattr(trials, "_use_older", use)


def test_where_newer_kernels_fail_the_older_ones_run(
    on_trial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mghf_fast.use_backend("cpu"):
        expected = training_step()
    with monkeypatch.context() as patch:
        with_older_kernels(patch, "coupling")
        told = "uses the older cpu kernels of coupling .*: its result differs"
        with pytest.warns(RuntimeWarning, match=told) as caught:
            got = training_step()
            training_step()
        assert len(caught) == 1
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    (row,) = (r for r in trials.listed(torch.device("cpu")) if r["op"] == "coupling")
    assert row["state"].startswith("its older kernels passed, the newer did not: its result")
    # Another process reads it from the file: it asks for the older ones without a trial.
    written = on_trial.stat().st_mtime_ns
    trials.forget()
    with_older_kernels(monkeypatch, "coupling")
    with pytest.warns(RuntimeWarning, match=told):
        again = training_step()
    assert all(torch.equal(a, e) for a, e in zip(again, expected, strict=True))
    assert on_trial.stat().st_mtime_ns == written


def test_older_kernels_are_tried_for_every_type(
    on_trial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What passed with the newer kernels is no proof of the older ones, which replace them when
    another type fails."""
    x, weights = draws.randn(1, 128, 8, 8), problems.small("coupling").tensors[1:]
    assert trials.refusal("coupling", "cpu", x) is None
    with_older_kernels(monkeypatch, "coupling")
    with pytest.warns(RuntimeWarning, match="uses the older"):
        assert trials.refusal("coupling", "cpu", x.bfloat16()) is None
    (machine,) = json.loads(on_trial.read_text())["machines"].values()
    assert [*machine["trials"]] == ["cpu coupling bfloat16"]
    assert OPS["coupling"].preferred(x, *weights) == "cpu"
    (machine,) = json.loads(on_trial.read_text())["machines"].values()
    assert [*machine["trials"]] == ["cpu coupling bfloat16", "cpu coupling float32"]


def test_a_cache_that_cannot_be_written_keeps_nobody_from_training(
    on_trial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_trial.parent.parent.mkdir(exist_ok=True)
    on_trial.parent.write_text("a file where the folder should be")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss, _ = training_step()
    assert bool(loss.isfinite())


def test_under_a_capture_a_kernel_on_trial_waits(
    on_trial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "_capturing", lambda: True)
    x = torch.zeros(1, 2, 8, 8)
    assert "CUDA graph" in str(trials.refusal("gram", "cpu", x))
    assert OPS["gram"].preferred(x) == "reference" and not on_trial.exists()
    monkeypatch.setattr(trials, "_capturing", lambda: False)
    assert trials.refusal("gram", "cpu", x) is None
    monkeypatch.setattr(trials, "_capturing", lambda: True)
    assert OPS["gram"].preferred(x) == "cpu"


def test_a_trial_in_the_middle_of_anything(on_trial: Path) -> None:
    """Under torch.compile, autocast, no_grad and inference mode."""
    x = draws.rand(2, 4, 12, 12)
    expected = mghf_fast.functional.gram_matrix(x, backend="reference")
    compiled = torch.compile(mghf_fast.functional.gram_matrix, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
        trials.forget()
        on_trial.unlink()
        cache._known.cache_clear()
        with context:
            torch.testing.assert_close(mghf_fast.functional.gram_matrix(x), expected)
        assert on_trial.exists()


def test_a_trial_under_another_default_type(on_trial: Path) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            training_step()
    finally:
        torch.set_default_dtype(before)
    (machine,) = json.loads(on_trial.read_text())["machines"].values()
    assert "cpu coupling bfloat16" in machine["trials"]
    assert all(row["failure"] is None for row in machine["trials"].values())


def test_the_doctor_lists_them(on_trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_step()
    facts = {
        "identity": "Some GPU",
        "tuned": None,
        "rules": [],
        "trials": trials.listed(torch.device("cpu")),
    }
    text = "\n".join(doctor._gpu_lines(facts))
    assert "on trial: cpu coupling, passed (float32)" in text and "not tuned" in text
    assert "on trial: cpu dec, not tried" in text
