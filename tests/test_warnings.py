"""When the losses warn, and at which line."""

from __future__ import annotations

import functools
import linecache
import warnings
from collections.abc import Callable
from typing import Any

import draws
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mghf_fast import DetailFeatureExtractor, HFDiffLoss, MGHFLoss
from mghf_fast._warnings import warn_caller

FAR = {"0,1": ((255, 0), (2, -1)), "-1,1": ((255, 0), (8, -4)), None: ((255, 0), (8, -4))}
"""input_range -> factors and shifts with which images in [0, 1] get far outside of it."""
NEAR = {"0,1": ((1, 0), (1.2, -0.1)), "-1,1": ((1, 0), (3, -1.5)), None: ((1, 0), (3, -1.5))}


def small(in_channels: int = 3) -> DetailFeatureExtractor:
    torch.manual_seed(0)
    return DetailFeatureExtractor(in_channels, 8)


def small_loss(**options: Any) -> MGHFLoss:
    return MGHFLoss(**{"extractor": small(), **options})


def pair(channels: int = 3) -> tuple[Tensor, Tensor]:
    """Two images, of which the second reaches from 0 to 1."""
    gt = draws.rand(1, channels, 48, 48)
    gt[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    return (gt + 0.1 * draws.randn_like(gt)).clamp(0, 1), gt


def told(*calls: Callable[[], object]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            call()
    return caught


@pytest.mark.parametrize("input_range", FAR)
@pytest.mark.parametrize("make", [small_loss, lambda **o: HFDiffLoss(small(), **o)])
def test_values_far_outside_the_range_give_one_warning(
    make: Callable[..., nn.Module], input_range: str | None
) -> None:
    for cases, far in ((FAR, 1), (NEAR, 0)):
        for scale, shift in cases[input_range]:
            sr, gt = (scale * image + shift for image in pair())
            call = functools.partial(make(input_range=input_range), sr, gt)
            found = [str(w.message) for w in told(call, call)]
            start = f"input_range is {input_range!r}"
            assert [text[: len(start)] for text in found] == [start] * far
            assert all(f"reaches from {shift:.3g} to {scale + shift:.3g}" in text for text in found)


def test_only_the_first_gt_is_checked() -> None:
    loss, (sr, gt) = MGHFLoss(), pair()
    assert not told(lambda: loss(sr, gt), lambda: loss(255 * sr, 255 * gt))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_reads_no_values() -> None:
    """The default extractor's images are checked, which nobody asked for: no trace may fail by it,
    or hold it, and the first call after it is the first that is checked."""
    loss, (sr, gt) = small_loss(backend="reference"), pair()
    program = make_fx(loss)(sr, gt)
    assert "aminmax" not in program.code
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = mode.from_tensor(sr), mode.from_tensor(gt)
        assert loss(*fakes).shape == ()
    assert "aminmax" not in str(torch.jit.trace(loss, (sr, gt), check_trace=False).graph)
    assert len(told(lambda: loss(255 * sr, 255 * gt))) == 1


def test_a_module_of_the_users_and_latents_may_have_any_range() -> None:
    sr, gt = (255 * image for image in pair())
    loss = MGHFLoss(extractor=nn.Sequential(small()))
    assert not told(lambda: loss(sr, gt))
    named = MGHFLoss(extractor=nn.Sequential(small()), input_range="-1,1")
    assert len(told(lambda: named(sr, gt))) == 1
    latents = MGHFLoss(extractor=small(4))
    sr, gt = (255 * image for image in pair(4))
    assert not told(lambda: latents(sr, gt))


def test_warnings_point_at_the_line_that_called_the_library() -> None:
    sr, gt = (255 * image for image in pair())
    hf_diff, network = HFDiffLoss(small()), nn.ModuleDict({"loss": MGHFLoss("n")})
    calls = {
        "called": lambda: small_loss(input_range="0,1")(sr, gt),
        "terms": lambda: small_loss().terms(sr, gt),
        "within HFDiffLoss": lambda: hf_diff(sr, gt),
        "frozen weights": lambda: network.load_state_dict({"loss.extractor.x": gt}, strict=False),
    }
    for name, call in calls.items():
        (warning,) = told(call)
        line = linecache.getline(warning.filename, warning.lineno)
        assert warning.filename == __file__ and f'"{name}": lambda' in line


def test_what_inductor_writes_is_not_the_users_line() -> None:
    """It lies in a folder of its cache, which may be anywhere, as a module of PyTorch's."""
    written: dict[str, Any] = {"__name__": "torch._inductor.runtime.compile_tasks.c1"}
    exec(compile("def call(run): run()", "/cache/c1.py", "exec"), written)
    library = functools.partial(written["call"], functools.partial(warn_caller, "x"))
    (warning,) = told(library)
    assert warning.filename == __file__ and warning.category is UserWarning
