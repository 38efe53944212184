"""The adapters for trainers that are not on PyPI, against their contracts: the registry, the order
of arguments, who applies the weight, and how the trainer uses the module. The contracts were read
from, and partly run with,

    traiNNer-redux  6862931 of June 2026
    neosr           31c7022 of April 2025
    KAIR            fc1732f of October 2024

The registry is our own stand-in (trainers.py); none of their code is here.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import draws
import pytest
import torch
import trainers
from torch import Tensor, nn

from mghf_fast import MGHFLoss
from mghf_fast.integrations import kair
from mghf_fast.integrations._criterion import Criterion

Images = tuple[Tensor, Tensor]


@pytest.fixture
def redux() -> Iterator[Callable[..., nn.Module]]:
    with trainers.stand_in("traiNNer", "trainner_redux", True) as registry:
        yield registry.found["mghfloss"]


@pytest.fixture
def neosr() -> Iterator[Callable[..., nn.Module]]:
    with trainers.stand_in("neosr", "neosr", False) as registry:
        yield registry.found["mghf_loss"]


@pytest.fixture
def images() -> Images:
    gt = draws.rand(2, 3, 40, 48)
    return (gt + 0.1 * draws.randn_like(gt)).requires_grad_(), gt


def expected(images: Images, **options: Any) -> Tensor:
    return MGHFLoss(**{"input_range": "0,1", **options})(*images)


def test_redux_multiplies_itself(redux: Callable[..., nn.Module], images: Images) -> None:
    loss = redux(loss_weight=0.25)
    assert loss.loss_weight == 0.25
    torch.testing.assert_close(loss(*images), expected(images))  # without the weight


def test_redux_makes_its_schema_of_annotated_keywords(redux: Callable[..., nn.Module]) -> None:
    parameters = inspect.signature(redux).parameters.values()
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters)
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters)
    with pytest.raises(TypeError, match="colour"):
        redux(loss_weight=1, colour=1)


def test_redux_steps(redux: Callable[..., nn.Module], images: Images) -> None:
    """The trainer's step: the module in channels_last, autocast, a teacher's picture made in
    inference mode, the entries of a dictionary summed with the weight."""
    loss = redux(loss_weight=0.5, terms=True).to("cpu", memory_format=torch.channels_last)
    sr = images[0]
    with torch.inference_mode():
        target = torch.clamp(images[1], 0, 1)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            output = sr.to(dtype)
            found = loss(output, target)
            total = sum(part * abs(loss.loss_weight) for part in found.values() if part > 0)
        whole = expected((output.float(), target.clone()))
        torch.testing.assert_close(total, 0.5 * whole)
        (gradient,) = torch.autograd.grad(total, sr)
        assert gradient.abs().sum() > 0


def test_redux_does_not_hide_a_nan_among_the_parts(
    redux: Callable[..., nn.Module], images: Images
) -> None:
    sr = images[0].detach().clone()
    sr[0, 0, 0, 0] = float("nan")
    found = redux(loss_weight=1, terms=True)(sr, images[1])
    assert isinstance(found, Tensor) and found.isnan()


def test_neosr_leaves_the_weight_to_the_loss(
    neosr: Callable[..., nn.Module], images: Images
) -> None:
    loss = neosr(loss_weight=0.25, variant="n").to("cpu", memory_format=torch.channels_last)
    torch.testing.assert_close(loss(*images), 0.25 * expected(images, variant="n"))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(images[0].bfloat16(), images[1])
    assert value.dtype == torch.float32
    with pytest.raises(TypeError, match="unknown option weight; allowed are loss_weight, variant"):
        neosr(weight=1)


def test_kair_multiplies_itself_and_wraps_an_attribute(images: Images) -> None:
    loss = kair.PerceptualLoss(
        feature_layer=[2, 7, 16, 25, 34],
        weights=[0.1, 0.1, 1.0, 1.0, 1.0],
        lossfn_type="mghf-c",
        use_input_norm=True,
        use_range_norm=False,
    )
    loss.vgg = nn.DataParallel(loss.vgg.to("cpu"))
    loss.lossfn = loss.lossfn.to("cpu")
    torch.testing.assert_close(loss(*images), expected(images))
    assert loss(*images).dim() == 0


def test_kair_options(images: Images) -> None:
    loss = kair.PerceptualLoss(weights={"extractor": "random"}, lossfn_type="mghf-n")
    torch.testing.assert_close(loss(*images), expected(images, variant="n", extractor="random"))
    loss = kair.PerceptualLoss(lossfn_type="mghf-n", use_range_norm=True)
    torch.testing.assert_close(loss(*images), expected(images, variant="n", input_range="-1,1"))
    with pytest.raises(ValueError, match="F_lossfn_type must be one of 'mghf-c'.* got 'l3'"):
        kair.PerceptualLoss(lossfn_type="l3")
    with pytest.raises(TypeError, match="F_weights got the unknown option extracter; allowed are"):
        kair.PerceptualLoss(weights={"extracter": "random"}, lossfn_type="mghf-n")


def test_kair_keeps_its_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("models.loss")
    module.PerceptualLoss = lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.loss", module)
    options: Any = kair.PerceptualLoss([2, 7], [1.0, 1.0], "l1", use_range_norm=True)
    assert options == {
        "feature_layer": [2, 7],
        "weights": [1.0, 1.0],
        "lossfn_type": "l1",
        "use_input_norm": True,
        "use_range_norm": True,
    }


# ---- what all adapters have in common ----


def adapters() -> dict[str, tuple[Callable[[], nn.Module], str]]:
    """A function that makes each adapter with weight 1, and the name of its second argument."""

    def in_registry(package: str, adapter: str, name: str, lower: bool) -> nn.Module:
        with trainers.stand_in(package, adapter, lower) as registry:
            return registry.found[name](loss_weight=1.0)

    return {
        "criterion": (Criterion, "gt"),
        "kair": (lambda: kair.PerceptualLoss(lossfn_type="mghf-c"), "gt"),
        "redux": (lambda: in_registry("traiNNer", "trainner_redux", "mghfloss", True), "target"),
        "neosr": (lambda: in_registry("neosr", "neosr", "mghf_loss", False), "y"),
    }


@pytest.mark.parametrize("name", adapters())
def test_every_adapter(name: str, images: Images) -> None:
    make, second = adapters()[name]
    loss = make()
    sr, gt = images
    value = loss(sr, gt)
    torch.testing.assert_close(value, expected(images))
    assert torch.equal(copy.deepcopy(loss)(sr, gt), value)
    # A swapped call would silently train nothing.
    with pytest.raises(ValueError, match=f"{second} requires a gradient and .* does not"):
        loss(gt, sr)
    with torch.no_grad():
        loss(gt, sr)
    # Crops below a patch, video, images of two types.
    small = [image[..., :24, :24] for image in images]
    torch.testing.assert_close(loss(*small), expected(tuple(small), patch_size="auto"))
    torch.testing.assert_close(loss(sr[None], gt[None]), value)
    torch.testing.assert_close(loss(sr.bfloat16(), gt), value, rtol=0.05, atol=0)
    with pytest.raises(ValueError, match="same shape"):
        loss(sr, gt[..., :40])


@pytest.mark.parametrize("name", adapters())
def test_nothing_of_an_adapter_trains_or_is_saved(name: str) -> None:
    parent = nn.ModuleDict({"net": nn.Conv2d(3, 3, 1), "loss": adapters()[name][0]()})
    parent.requires_grad_(True)
    assert {name for name, _ in parent.named_parameters()} == {"net.weight", "net.bias"}
    assert not any(key.startswith("loss") for key in parent.state_dict())


def test_terms_follow_gammas_that_are_set(images: Images) -> None:
    loss = Criterion()
    loss.loss.gammas = (0.5, 0, 0.01)
    terms = loss.terms(*images)
    assert set(terms) == {"naive", "lip"}
    torch.testing.assert_close(sum(terms.values()), loss(*images))


def test_a_criterion_gives_a_clip_one_value(images: Images) -> None:
    loss = Criterion(reduction="none")
    clips = [image.detach()[None].expand(3, -1, -1, -1, -1) for image in images]
    assert loss(*clips).shape == (3,)
    torch.testing.assert_close(loss(*clips)[0], loss(*images).mean())
    assert all(term.shape == (3,) for term in loss.terms(*clips).values())
    assert torch.equal(pickle.loads(pickle.dumps(loss))(*images), loss(*images))


def test_the_package_imports_no_adapter() -> None:
    code = (
        "import sys, mghf_fast; sys.exit(any(m.startswith('mghf_fast.int') for m in sys.modules))"
    )
    assert trainers.run(["-c", code], trainers.Path(__file__).parent).returncode == 0
