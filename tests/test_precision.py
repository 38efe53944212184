"""The option `precision`: its values, what "auto" stands for, and that every product gets it."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import contract
import draws
import pytest
import torch
from torch import Tensor

import mghf_fast
from mghf_fast import MGHFLoss, functional, ops, problems
from mghf_fast.losses import step
from mghf_fast.nn import DetailFeatureExtractor, InvertibleBlock, PatchProjection
from mghf_fast.precision import PRECISIONS, product_precision

OPS = ("coupling", "gram", "content_style", "patches", "monce")
MORE_PRECISE = ("reference", "cpu")
"""Backends whose products are in float32 whatever is asked for."""


def pair() -> tuple[Tensor, Tensor]:
    gt = draws.rand(1, 3, 80, 84)
    return (gt + 0.1 * draws.randn_like(gt)).requires_grad_(), gt


def small_loss(**options: Any) -> MGHFLoss:
    torch.manual_seed(3)
    return MGHFLoss(extractor=DetailFeatureExtractor(3, 8, 2), **options)


class Graded:
    """Records the precisions that an op's backends get, in the order of the calls."""

    def __init__(self, patch: pytest.MonkeyPatch, op: str, backend: str) -> None:
        self.got: list[tuple[str, str]] = []
        right = ops.OPS[op].implementation(backend)

        def recording(name: str) -> Any:
            function = getattr(right, name)

            def run(*given: Any, **named: Any) -> Any:
                self.got.append((name, given[-1]))
                return function(*given, **named)

            return run

        names = ("forward", "backward", "add_backward")
        wrong = dataclasses.replace(right, **{name: recording(name) for name in names})
        patch.setitem(ops.OPS[op]._implementations, backend, wrong)


@contextlib.contextmanager
def convolutions(setting: str) -> Iterator[None]:
    """PyTorch's setting for convolutions on CUDA."""
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    torch.backends.cudnn.conv.fp32_precision = setting  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]


# ---- values ----


@pytest.mark.parametrize("wrong", ["fp16", "TF32", "", None, 16, torch.float16])
def test_another_value_is_refused(wrong: Any) -> None:
    x, q = draws.randn(1, 4, 8, 8), draws.randn(1, 4, 3)
    block, project = InvertibleBlock(4), PatchProjection(4, 4, hidden=8, dimension=4)
    w = (project.hidden.weight, project.hidden.bias, project.output.weight, project.output.bias)
    for call in (
        lambda: mghf_fast.MGHFLoss("n", extractor="random", precision=wrong),
        lambda: mghf_fast.HFDiffLoss(extractor="random", precision=wrong),
        lambda: mghf_fast.ContentStyleLoss(precision=wrong),
        lambda: mghf_fast.LocalInformationLoss(precision=wrong),
        lambda: functional.gram_matrix(x, precision=wrong),
        lambda: functional.invertible_block(x, block.weights(), precision=wrong),
        lambda: functional.content_style_terms(gt=x, sr=x, precision=wrong),
        lambda: functional.monce_loss(q, q, precision=wrong),
        lambda: functional.patch_projection(x, *w, patch_size=4, stride=4, precision=wrong),
        lambda: project(x, precision=wrong),
        lambda: block(x, precision=wrong),
    ):
        with pytest.raises(ValueError, match="precision must be one of 'auto', 'float32'") as error:
            call()
        assert f"got {wrong!r}" in str(error.value) and "\n" not in str(error.value)


def test_it_is_displayed() -> None:
    loss = small_loss(precision="tf32")
    assert loss.precision == "tf32" and "precision='tf32'" in repr(loss)
    for part in (loss.content_style, loss.local_information):
        assert part.precision == "tf32" and "precision='tf32'" in repr(part)
    assert "precision='auto'" in repr(small_loss())


# ---- "auto" ----


def test_auto_is_what_convolutions_have() -> None:
    for setting, meant in (("ieee", "float32"), ("tf32", "tf32"), ("none", "float32")):
        with convolutions(setting):
            assert product_precision("auto", "cuda") == meant
            assert product_precision("auto", "cpu") == product_precision("auto", "meta")
            assert product_precision("auto", "cpu") == "float32"
            for named in PRECISIONS:
                assert product_precision(named, "cuda") == product_precision(named, "cpu") == named


def test_auto_follows_the_parents_of_convolutions_setting() -> None:
    before = torch.backends.fp32_precision  # type: ignore[attr-defined]
    with convolutions("none"):
        try:
            torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
            assert product_precision("auto", "cuda") == "tf32"
        finally:
            torch.backends.fp32_precision = before  # type: ignore[attr-defined]


FOLLOWS_THE_OLDER_SETTING = """
import torch
from mghf_fast.precision import product_precision
assert product_precision("auto", "cuda") == "tf32"  # PyTorch's own default
torch.backends.cudnn.allow_tf32 = False
assert product_precision("auto", "cuda") == "float32"
torch.backends.cudnn.allow_tf32 = True
assert product_precision("auto", "cuda") == "tf32"
"""


def test_auto_follows_the_older_setting_too() -> None:
    subprocess.run([sys.executable, "-c", FOLLOWS_THE_OLDER_SETTING], check=True)


def test_auto_is_resolved_while_tracing() -> None:
    def fn(x: Tensor) -> Tensor:
        return functional.gram_matrix(x) + (product_precision("auto", "cuda") == "tf32")

    with convolutions("tf32"):
        contract.check_compiled(fn, draws.randn(1, 3, 4, 4))


# ---- every op gets it ----


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gradient_has_the_results_precision(
    monkeypatch: pytest.MonkeyPatch, op: str, precision: str
) -> None:
    graded = Graded(monkeypatch, op, "reference")
    problems.small(op).results("reference", precision=precision)
    assert graded.got == [("forward", precision), ("backward", precision)]


@pytest.mark.parametrize("op", OPS)
def test_float32_is_the_operators_default(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    graded = Graded(monkeypatch, op, "reference")
    problems.small(op).results("reference")
    assert graded.got == [("forward", "float32"), ("backward", "float32")]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_asks_every_op(monkeypatch: pytest.MonkeyPatch, op: str, fused: bool) -> None:
    if op == "gram":
        pytest.skip("no loss has it")
    graded = Graded(monkeypatch, op, "reference")
    if not fused:
        monkeypatch.setattr(step, "applies", lambda sr, gt: False)
    loss, (sr, gt) = small_loss(backend="reference", precision="bfloat16"), pair()
    loss(sr, gt).backward()
    assert len(graded.got) >= 2 and {got for _, got in graded.got} == {"bfloat16"}
    # It is an attribute that can be set between steps.
    graded.got.clear()
    for part in (loss, loss.content_style, loss.local_information):
        part.precision = "tf32"
    loss(sr, gt).backward()
    assert len(graded.got) >= 2 and {got for _, got in graded.got} == {"tf32"}


def test_hf_diff_passes_it_on() -> None:
    assert mghf_fast.HFDiffLoss("random", precision="tf32").perceptual.precision == "tf32"


# ---- backends that are more precise ----


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kernels", MORE_PRECISE)
def test_float32_products_whatever_is_asked(op: str, kernels: str) -> None:
    problem = problems.small(op)
    if (reason := ops.OPS[op].why_not(kernels, problem.tensors[0])) is not None:
        pytest.skip(reason)
    exact = problem.results(kernels, True)
    for precision in PRECISIONS:
        for got, want in zip(problem.results(kernels, True, precision), exact, strict=True):
            assert torch.equal(got, want)


# What a grade may err by in a result and a gradient on the small problems, against float64: a few
# times what its rounding of the factors gives. Most of a gradient's error is that of units whose
# rounded value is on the other side of an activation's kink.
ALLOWED = {"float32": (1e-5, 1e-4), "tf32": (2e-3, 2e-2), "bfloat16": (1e-2, 1e-1)}
SMALL = {
    "coupling": (1, 5),
    "gram": (1, 9),
    "content_style": (1, 24),
    "patches": (1, 56),
    "monce": (1, 20),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_products_on_a_gpu_have_the_precision(op: str, kernels: str) -> None:
    whole = problems.PROBLEMS[op](*SMALL[op])
    x = whole.tensors[0].to(torch.get_default_device())
    if (reason := ops.OPS[op].why_not(kernels, x)) is not None:
        pytest.skip(reason)
    problem = whole.to(x.device, torch.float32)
    exact = problem.to(x.device, whole.exact).results("reference", True)
    errors = {}
    for precision, (of_result, of_gradient) in ALLOWED.items():
        found = problem.results(kernels, True, precision)
        errors[precision] = [
            contract.relative_error(got, want) for got, want in zip(found, exact, strict=True)
        ]
        for error, allowed in zip(
            errors[precision], [of_result] + 99 * [of_gradient], strict=False
        ):
            assert error <= allowed, (precision, errors)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_a_nan_of_any_bits_stays_one(op: str, kernels: str) -> None:
    whole = problems.PROBLEMS[op](*SMALL[op])
    x = whole.tensors[0].to(torch.get_default_device())
    if (reason := ops.OPS[op].why_not(kernels, x)) is not None:
        pytest.skip(reason)
    problem = whole.to(x.device, torch.float32)
    # GPUs make the first of these; adding to its bits would give -0.
    for bits in (0x7FFFFFFF, -1, 0x7FC00000):
        problem.tensors[0].view(-1)[3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        for precision in PRECISIONS:
            assert problem.run(problem.tensors, kernels, precision).isnan().any(), (bits, precision)


def test_the_compiled_ops_refuse_another_value() -> None:
    if ops.OPS["gram"].why_not("cpu", torch.zeros(1, 2, 2, 2)) is not None:
        pytest.skip("there is no CPU library")
    x = torch.zeros(1, 2, 2, 2)
    with pytest.raises(RuntimeError, match="precision is 'half'; allowed are 'float32', 'tf32'"):
        torch.ops.mghf_native.gram(x, 1.0, "half")


def test_contract() -> None:
    x = draws.randn(1, 4, 5, 6, requires_grad=True)
    contract.check_opcheck(ops.gram.gram, x, 0.5, "auto", "tf32")
    block = InvertibleBlock(4).weights()
    tensors = [w.detach().requires_grad_() for w in block.tensors()]
    contract.check_opcheck(ops.coupling.coupling, x, tensors, *block[5:], False, "auto", "bfloat16")
    contract.check_compiled(lambda x: functional.gram_matrix(x, precision="tf32"), x.detach())
