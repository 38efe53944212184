"""The replacement for LPIPS: calls, shapes and errors as its callers expect."""

from __future__ import annotations

import inspect
import pickle

import draws
import pytest
import torch
import trainers

from mghf_fast import MGHFLoss
from mghf_fast.integrations import lpips


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [-1, 1]."""
    gt = 2 * draws.rand(2, 3, 40, 48) - 1
    return (gt + 0.1 * draws.randn_like(gt)).requires_grad_(), gt


@pytest.mark.parametrize("variant", ["c", "n"])
def test_one_distance_an_image(variant: str, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    sr, gt = images
    loss = lpips.LPIPS(net=f"mghf-{variant}", verbose=False)
    assert not loss.training
    distance = loss(sr, gt)
    assert distance.shape == (2, 1, 1, 1)
    expected = MGHFLoss(variant, reduction="none", input_range="-1,1")(sr, gt)
    torch.testing.assert_close(distance.flatten(), expected)
    torch.testing.assert_close(loss((sr + 1) / 2, (gt + 1) / 2, normalize=True), distance)
    same, terms = loss(in0=sr, in1=gt, retPerLayer=True)
    torch.testing.assert_close(same, distance)
    assert all(term.shape == (2, 1, 1, 1) for term in terms)
    assert len(terms) == (5 if variant == "c" else 1)


def test_a_swapped_call_is_refused(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    sr, gt = images
    loss = lpips.LPIPS()
    with pytest.raises(ValueError, match=r"in1 requires a gradient and in0 does not: .* \(in0\)"):
        loss(gt, sr)
    with torch.no_grad():  # a metric may be called in any order
        assert loss(gt, sr).shape == (2, 1, 1, 1)


def test_what_lpips_has_and_this_has_not() -> None:
    with pytest.raises(ValueError, match="net must be one of 'mghf-c', 'mghf-n', got 'vgg'"):
        lpips.LPIPS(net="vgg")
    with pytest.raises(ValueError, match="spatial must be False, got True: MGHF is one number"):
        lpips.LPIPS(spatial=True)
    with pytest.raises(ValueError, match="pnet_tune must be False"):
        lpips.LPIPS(pnet_tune=True)
    with pytest.raises(TypeError, match=r"LPIPS got the unknown option colour; allowed are preset"):
        lpips.LPIPS(colour=True)


def test_as_resshift_calls_it(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    """ResShift 3ce1d81, March 2024: ``LPIPS(net=)``, every parameter frozen by hand, ``eval()``,
    compiled; the decoded picture in half precision, the result asserted to have (B,)."""
    sr, gt = images
    loss = lpips.LPIPS(net="mghf-c").to("cpu")
    for parameter in loss.parameters():
        parameter.requires_grad_(False)
    loss.eval()
    mse = torch.zeros(2, dtype=torch.float16)
    value = loss(sr.half().clamp(-1.0, 1.0), gt).to(torch.float16).view(-1)
    assert value.shape == mse.shape
    (gradient,) = torch.autograd.grad(value.mean(), sr)
    assert gradient.abs().sum() > 0


def test_it_is_pickled(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    loss = lpips.LPIPS()
    assert torch.equal(pickle.loads(pickle.dumps(loss))(*images), loss(*images))


def test_signature_and_shapes_are_those_of_the_package() -> None:
    trainers.need("lpips", "torchvision", "tqdm")
    trainers.supply_torchvision()
    import lpips as original

    for function in ("__init__", "forward"):
        theirs = inspect.signature(getattr(original.LPIPS, function)).parameters
        ours = inspect.signature(getattr(lpips.LPIPS, function)).parameters
        assert list(ours)[: len(theirs)] == list(theirs), function
        for name, parameter in theirs.items():
            if name != "net":
                assert ours[name].default == parameter.default, name
    x = draws.rand(2, 3, 64, 64)
    theirs = original.LPIPS(pretrained=False, pnet_rand=True, verbose=False)
    ours = lpips.LPIPS(verbose=False)
    assert ours(x, 1 - x, normalize=True).shape == theirs(x, 1 - x, normalize=True).shape
    value, terms = theirs(x, 1 - x, retPerLayer=True)
    value_here, terms_here = ours(x, 1 - x, retPerLayer=True)
    assert (value_here.shape, type(terms_here)) == (value.shape, type(terms))


def test_under_accelerate_as_osediff_calls_it(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    """OSEDiff fcc4f09: prepared together with the network, bfloat16, images in float32."""
    trainers.need("accelerate")
    trainers.supply_torchvision()
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    net = torch.nn.Conv2d(3, 3, 3, padding=1)
    net, net_lpips = accelerator.prepare(net, lpips.LPIPS(net="mghf-n"))
    sr, gt = images
    value = net_lpips(net(sr.detach()).float(), gt.float()).mean()
    assert value.dtype == torch.float32
    accelerator.backward(value * 2)
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())
