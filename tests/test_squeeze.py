"""The squeeze stem: space to depth and a lift, and the whole extractor behind it."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import contract
import draws
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mghf_fast import DetailFeatureExtractor, LocalInformationLoss, MGHFLoss, functional
from mghf_fast.losses import Preset
from mghf_fast.losses.mghf import downscale_of
from mghf_fast.nn import InvertibleBlock
from mghf_fast.nn.stems import SqueezeStem, reflected
from mghf_fast.ops import OPS

BACKENDS = [b for b in ("reference", "cpu") if OPS["coupling"].why_not(b, torch.zeros(1)) is None]


def squeezed(squeeze: int = 2, blocks: int = 2, **options: object) -> DetailFeatureExtractor:
    channels = 3 * squeeze**2 + 4
    made = DetailFeatureExtractor(
        3, channels + channels % 2, blocks, stem="squeeze", squeeze=squeeze,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return made.requires_grad_(False)


def undone(extractor: DetailFeatureExtractor, features: Tensor) -> Tensor:
    for block in reversed(extractor.blocks):
        assert isinstance(block, InvertibleBlock)
        features = block.inverse(features)
    assert isinstance(extractor.stem, SqueezeStem)
    return extractor.stem.inverse(features)


def images(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 2 * draws.rand(2, 3, height, width, dtype=dtype) - 1


# ---- the stem ------------------------------------------------------------------------------------


@pytest.mark.parametrize("squeeze", [2, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(16, 24), (17, 23), (8, 15), (11, 9)])
def test_it_is_a_padded_pixel_unshuffle_and_a_linear_layer(
    squeeze: int, height: int, width: int
) -> None:
    stem = SqueezeStem(3, 3 * squeeze**2 + 2, squeeze)
    x = images(height, width)
    padded = F.pad(x, (0, -width % squeeze, 0, -height % squeeze), mode="reflect")
    unshuffled = F.pixel_unshuffle(padded, squeeze)
    expected = torch.einsum("ck,bkhw->bchw", stem.lift.weight, unshuffled)
    found = stem(x)
    assert found.shape[2:] == (math.ceil(height / squeeze), math.ceil(width / squeeze))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(stem.inverse(found), padded)


def test_reflection_is_that_of_pytorch_in_values_and_gradients() -> None:
    x = draws.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    found = reflected(reflected(x, 2, 4), 3, 2)
    expected = F.pad(x, (0, 2, 0, 4), mode="reflect")
    upstream = draws.randn_like(expected)
    assert torch.equal(found, expected)
    (a,), (b,) = (torch.autograd.grad(y, x, upstream) for y in (found, expected))
    torch.testing.assert_close(a, b)
    assert reflected(x, 2, 0) is x


def test_the_lift_keeps_lengths() -> None:
    """For every start the columns are orthogonal and of equal length."""
    for init in ("curved", "linear"):
        lift = DetailFeatureExtractor(stem="squeeze", init=init).stem.lift.weight
        gram = lift.mT @ lift
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(48), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(3, 16), (16, 3), (1, 1)])
def test_a_side_below_the_squeeze_is_refused(size: tuple[int, int]) -> None:
    height, width = size
    with pytest.raises(
        ValueError, match=f"image must be at least 4 .* for squeeze 4, got {height} x {width}"
    ):
        squeezed(4)(images(height, width))
    assert squeezed(4)(images(4, 5)).shape[2:] == (1, 2)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"squeeze must be one of 2, 4, 8, got 3"):
        DetailFeatureExtractor(stem="squeeze", squeeze=3)
    with pytest.raises(ValueError, match=r"channels must be at least .* = 192 .*, got 128"):
        DetailFeatureExtractor(stem="squeeze", squeeze=8)
    with pytest.raises(ValueError, match=r"= 64 for stem 'squeeze', got 48"):
        DetailFeatureExtractor(4, 48, stem="squeeze")
    with pytest.raises(ValueError, match="channels must be an even number"):
        DetailFeatureExtractor(channels=49, stem="squeeze")
    with pytest.raises(ValueError, match="image must have 3 channels, got 1"):
        squeezed()(draws.rand(1, 1, 8, 8))


def test_sizes() -> None:
    extractor = DetailFeatureExtractor(blocks=3, stem="squeeze")
    assert extractor.downscale == 4 and DetailFeatureExtractor().downscale == 1
    assert sum(p.numel() for p in extractor.parameters()) == 128 * 48 + 3 * 69_120
    assert extractor.config["squeeze"] == 4
    assert "squeeze" not in DetailFeatureExtractor().config  # files stay as they were


# ---- the extractor behind it ---------------------------------------------------------------------


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("squeeze", [2, 4, 8])
@pytest.mark.parametrize("size", [(16, 24), (13, 30)])
def test_an_image_comes_back(squeeze: int, size: tuple[int, int], kernels: str) -> None:
    extractor, x = squeezed(squeeze, 3), images(*size)
    found = undone(extractor, extractor(x, backend=kernels))[..., : size[0], : size[1]]
    assert contract.relative_error(found, x) < 1e-4
    assert extractor.invertibility_error(x) < 1e-4


@pytest.mark.parametrize("kernels", BACKENDS)
def test_against_float64(kernels: str) -> None:
    extractor = squeezed(4, 3)
    exact = copy.deepcopy(extractor).double()
    contract.check_against_reference(
        lambda x: extractor(x, backend=kernels),
        lambda x: exact(x, backend="reference"),
        [images(21, 34)],
        value_tolerance=2e-5,
        gradient_tolerance=2e-4,
    )


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype: torch.dtype, kernels: str) -> None:
    made = squeezed(2, 1)

    def on(backend: str, x: Tensor) -> Tensor:
        features: Tensor = copy.deepcopy(made).to(x.dtype)(x, backend=backend)
        return features

    # The lift's weights are rounded in the same way in all three.
    made.to(dtype).float()
    contract.check_half_precision(
        lambda x: on(kernels, x), lambda x: on("reference", x), [images(9, 12)], dtype
    )


def test_gradients_numerically() -> None:
    extractor = squeezed(2, 2, activation="softplus").double()
    x = images(5, 7, torch.float64)[:1].requires_grad_()
    assert torch.autograd.gradcheck(extractor, x)
    contract.check_second_derivative(extractor, x[..., :4, :5])


def test_gradients_of_the_parameters() -> None:
    extractor = squeezed(2, 1, activation="softplus").double()
    names = ["stem.lift.weight", "blocks.0.mix.weight", "blocks.0.rho.depthwise.weight"]
    state = dict(extractor.named_parameters())
    x = images(4, 5, torch.float64)[:1]

    def features(*weights: Tensor) -> Tensor:
        replaced = state | dict(zip(names, weights, strict=True))
        result: Tensor = torch.func.functional_call(extractor, replaced, (x,))
        return result

    leaves = [state[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(features, leaves)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_any_layout(kernels: str) -> None:
    extractor, x = squeezed(), images(11, 14)
    for name, strided in contract.image_layouts(x):
        contract.check_layout(lambda y: extractor(y, backend=kernels), x, strided)
        assert name
    for _, view in contract.expanded(x):
        contract.check_layout(lambda y: extractor(y, backend=kernels), view.contiguous(), view)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_repeats_bitwise(kernels: str) -> None:
    extractor = squeezed(4)
    contract.check_deterministic(
        "reference", lambda x: extractor(x, backend=kernels), images(19, 25)
    )


def test_compiles_whole() -> None:
    extractor = squeezed()
    contract.check_compiled(extractor, images(9, 12))
    compiled = torch.compile(extractor, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((8, 10), (12, 14), (13, 17)):
        x = images(*size)
        torch.testing.assert_close(compiled(x), extractor(x))


def test_dtype_is_the_images_and_float32_under_autocast() -> None:
    extractor, x = squeezed(), images(8, 12)
    for dtype in contract.DTYPES:
        assert extractor(x.to(dtype)).dtype == dtype
    expected = extractor(x.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (x, x.bfloat16()):
            found = extractor(given)
            assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_saved_loaded_copied_and_pickled(tmp_path: Path) -> None:
    extractor, x = squeezed(4, 3), images(17, 21)
    path = tmp_path / "squeezed.safetensors"
    extractor.save_pretrained(path)
    expected = extractor(x)
    for other in (
        DetailFeatureExtractor.from_pretrained(path),
        copy.deepcopy(extractor),
        pickle.loads(pickle.dumps(extractor)),
    ):
        assert other.downscale == 4 and other.config == extractor.config
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("variant", ["c", "n"])
def test_a_bad_pixel_gives_a_nan_loss(variant: str, bad: float) -> None:
    loss = MGHFLoss(variant, extractor=squeezed(2, 1), reduction="none")
    gt = images(57, 64)  # the last rows are in no patch
    sr = gt + 0.1 * draws.randn_like(gt)
    assert loss(sr, gt).isfinite().all()
    for which in (0, 1):
        pair = [sr.clone(), gt.clone()]
        pair[which][1, 2, 56, 63] = bad
        losses = loss(*pair)
        assert losses[0].isfinite() and losses[1].isnan()


def test_memory_modes_agree() -> None:
    recompute, store = (squeezed(2, 2, memory=m) for m in ("recompute", "store"))
    store.load_state_dict(recompute.state_dict())
    grads = []
    for extractor in (recompute, store):
        torch.manual_seed(0)
        x = images(10, 12).requires_grad_()
        extractor(x).square().sum().backward()
        grads.append(x.grad)
    a, b = grads
    assert a is not None and b is not None and contract.relative_error(a, b) < 1e-5


def test_a_frozen_extractor_keeps_nothing_at_full_resolution() -> None:
    extractor, kept = squeezed(2, 2), []
    x = images(32, 32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        extractor(x)
    assert all(t.shape[-2:] != (32, 32) for t in kept)
    # Only one input per block.
    assert sum(t.shape == (2, 16, 16, 16) for t in kept) <= 2


# ---- a loss of features at reduced resolution ----------------------------------------------------


def pair(b: int = 2, size: int = 56) -> tuple[Tensor, Tensor]:
    gt = draws.rand(b, 3, size, size)
    return (gt + 0.1 * draws.randn_like(gt)).requires_grad_(), gt


def with_stem(squeeze: int = 4, channels: int = 48) -> DetailFeatureExtractor:
    return DetailFeatureExtractor(3, channels, 1, stem="squeeze", squeeze=squeeze)


@pytest.mark.parametrize(
    ("preset", "squeeze", "patches"),
    [("2026", 4, 441), ("2025", 4, 961), ("2026", 8, 441), ("2026", 2, 441), ("2026", None, 441)],
)
def test_patches_are_counted_in_image_pixels(
    preset: str, squeeze: int | None, patches: int
) -> None:
    extractor = (
        DetailFeatureExtractor(3, 8) if squeeze is None else with_stem(squeeze, 3 * squeeze**2)
    )
    local = MGHFLoss(preset=preset, extractor=extractor).local_information
    side = 512 // (squeeze or 1)
    assert local.projections["32"](torch.zeros(1, 1, side, side)).shape[1] == patches


def test_squeezed_features_are_compared_as_any_others() -> None:
    extractor = with_stem()
    sr, gt = pair(size=90)
    terms = MGHFLoss(extractor=extractor).terms(sr, gt)
    s, g = extractor(sr), extractor(gt).detach()
    assert s.shape == (2, 48, 23, 23)
    torch.testing.assert_close(terms["lip"], LocalInformationLoss(8, 6)(s, g))
    style = functional.content_style_terms(gt=g, sr=s)
    torch.testing.assert_close(terms["naive"], style.naive.mean())
    torch.testing.assert_close(terms["csc_correlation"], style.correlation.mean())
    assert terms["lip"] > 0


def test_squeezed_loss_compiles_and_repeats() -> None:
    loss = MGHFLoss(extractor=with_stem())
    sr, gt = pair(1, 58)
    contract.check_compiled(lambda sr: loss(sr, gt), sr.detach())
    contract.check_deterministic("reference", lambda sr: loss(sr, gt), sr.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(sr, gt), loss(sr, gt.bfloat16().float()), rtol=0.1, atol=0)
        assert loss(sr, gt).dtype == torch.float32
    exact = copy.deepcopy(loss).double()
    contract.check_against_reference(
        lambda sr: loss(sr, gt), lambda sr: exact(sr, gt.double()), [sr.detach()]
    )


def test_automatic_patches_of_squeezed_features() -> None:
    for squeeze, sides in (
        (2, {32: 16, 16: 8, 8: 4}),
        (4, {32: 8, 16: 4, 8: 2}),
        (8, {32: 4, 16: 2}),
    ):
        loss = MGHFLoss(extractor=with_stem(squeeze, 3 * squeeze**2), patch_size="auto")
        local = loss.local_information
        found = {int(size): p.patch_size for size, p in local.projections.items()}
        assert found == sides
        least = min(sides)
        small = draws.rand(1, 3, 3 * least, 3 * least)
        assert loss(small, small.flip(3)).item() > 0
        with pytest.raises(ValueError, match=f"sr must be at least {least} pixels .* got 7 x 40"):
            loss(*draws.rand(2, 1, 3, 7, 40))


class Shrinks(nn.Module):
    """Features at 1/2 of the resolution, with the attribute `downscale`."""

    def __init__(self, downscale: object = 2) -> None:
        super().__init__()
        self.downscale = downscale
        self.convolution = nn.Conv2d(3, 6, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.convolution(x)
        return features


def test_any_module_may_say_its_downscale() -> None:
    sr, gt = pair(size=80)
    extractor = Shrinks()
    loss = MGHFLoss(extractor=extractor)
    expected = LocalInformationLoss(16, 12)(extractor(sr), extractor(gt))
    torch.testing.assert_close(loss.terms(sr, gt)["lip"], expected)
    assert downscale_of(Shrinks(nn.Conv2d(3, 3, 1))) == downscale_of(nn.Identity()) == 1
    for image in (draws.rand(2, 1, 3, 31, 56), draws.rand(2, 1, 3, 56, 30)):
        height, width = image.shape[3:]
        with pytest.raises(
            ValueError, match=f"at least 32 pixels .* got {height} x {width}; .*'auto' takes 8 pix"
        ):
            loss(*image)
    # Features that are smaller than `downscale` says.
    with pytest.raises(ValueError, match=r"at least 32 pixels .* got 28 x 28"):
        LocalInformationLoss(downscale=4)(*draws.rand(2, 1, 2, 7, 7))


def test_a_downscale_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match="patch_size and stride must be multiples .* downscale 5 .*, got 32 and 24"
    ):
        MGHFLoss(extractor=Shrinks(5))
    with pytest.raises(ValueError, match="downscale 16 .*, got 32 and 24"):
        MGHFLoss(extractor=Shrinks(16))
    with pytest.raises(ValueError, match="downscale 4 .*, got 30 and 24"):
        MGHFLoss(extractor=with_stem(), patch_size=30)
    with pytest.raises(ValueError, match="patch_size 'auto' needs .* downscale 32"):
        LocalInformationLoss("auto", 32, downscale=32)
    with pytest.raises(ValueError, match=r"extractor\.downscale must be at least 1, got 0"):
        MGHFLoss(extractor=Shrinks(0))
    with pytest.raises(TypeError, match=r"extractor\.downscale must be an integer, got 2\.0"):
        MGHFLoss(extractor=Shrinks(2.0))
    with pytest.raises(ValueError, match="downscale must be at least 1, got 0"):
        LocalInformationLoss(downscale=0)
    free = MGHFLoss("n", extractor=Shrinks(5))
    assert free.local_information.downscale == 1  # nothing is cut into patches
    # A local term without a weight may get one, because its patches fit.
    later = MGHFLoss(preset=Preset((1, 1, 0), (1, 1, 1), 1.1, 1.4, 24))
    assert later.local_information.downscale == 4
