"""One step (forward, and backward to the super-resolved image) of each row of Table 5.

`table5` and the benchmarks measure these. Inputs are random with a fixed seed; images are in
[0, 1], feature stacks are standard normal, GT is a disturbed copy of SR. Three variants of a row:

    reference   the plain PyTorch of `mghf_fast.reference` under ordinary autograd
    compile     torch.compile of the reference
    mghf_fast   the public functions, each op on the backend that "auto" picks
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional
from ...losses import PRESETS, LocalInformationLoss, MGHFLoss
from ...nn import DetailFeatureExtractor, InvertibleBlock, PatchProjection
from ...ops.vocabulary import VARIANCE_FLOOR
from ...reference import content_style, coupling, monce, patches
from .cost import VGG16_STAGES

CHANNELS = 128
PATCH_SIZE, STRIDE = 32, 24
WARM_UP_SIZE = 64
VARIANTS = ("reference", "compile", "mghf_fast")

ROW_OPS = {
    "lip": ("patches", "sinkhorn", "monce"),
    "gram": ("content_style",),
    "correlation": ("content_style",),
    "awdfe_mse": ("content_style",),
    "dfe_mse": (),
    "dfe": ("coupling",),
    "total": ("coupling", "content_style", "patches", "sinkhorn", "monce"),
    "vgg16": (),
}
"""The ops that the variant "mghf_fast" of each row runs."""

Step = Callable[[], object]
Weights = tuple[Tensor, Tensor, Tensor, Tensor]


class VGG16Features(nn.Sequential):
    """The convolutions of VGG-16 with the layer order, and so the state-dict keys, of torchvision's
    ``vgg16().features``. Weights are random, which costs as much as trained ones."""

    def __init__(self, in_channels: int = 3) -> None:
        layers: list[nn.Module] = []
        for stage in VGG16_STAGES:
            for channels in stage:
                layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU(inplace=True)]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers)
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.constant_(layer.get_parameter("bias"), 0)


class VGG16Perceptual(nn.Module):
    """The perceptual loss that MGHF-n is meant to replace: mean squared difference of VGG-16
    features after the last ReLU of each stage, summed (Johnson et al.); frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.features = VGG16Features().requires_grad_(False)

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self._stages(gt)
        pairs = zip(self._stages(sr), targets, strict=True)
        return torch.stack([F.mse_loss(s, g) for s, g in pairs]).sum()

    def _stages(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                outputs.append(x)
            x = layer(x)
        return outputs


class AlexNetFeatures(nn.Sequential):
    """The convolutions of AlexNet in the order of torchvision's ``alexnet().features``; random."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True)),
            *(nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True)),
            *(nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True)),
        )


class LPIPSLayout(nn.Module):
    """A network with LPIPS's layout (Zhang et al.): it normalises the images, takes the features
    after five ReLUs of AlexNet or VGG-16, normalises them to unit length over the channels, weights
    their squared difference by a 1x1 convolution without bias, and sums the means over the pixels.
    Frozen; weights are random (positive in the 1x1 convolutions), which costs as much as trained
    ones."""

    SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

    def __init__(self, network: str = "alex") -> None:
        super().__init__()
        if network == "alex":
            features: nn.Sequential = AlexNetFeatures()
            self.after, widths = (1, 4, 7, 9, 11), [64, 192, 384, 256, 256]
        else:
            features = VGG16Features()
            self.after, widths = (3, 8, 15, 22, 29), [stage[-1] for stage in VGG16_STAGES]
        self.features = nn.Sequential(*list(features)[: self.after[-1] + 1])
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        for head in self.heads:
            nn.init.uniform_(head.get_parameter("weight"))
        self.register_buffer("shift", torch.tensor(self.SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(self.SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self._stages(2 * gt - 1)
        pairs = zip(self.heads, self._stages(2 * sr - 1), targets, strict=True)
        terms = [head((s - g).square()).mean((1, 2, 3)) for head, s, g in pairs]
        return torch.stack(terms).sum(0).mean()

    def _stages(self, x: Tensor) -> list[Tensor]:
        x = (x - self.get_buffer("shift")) / self.get_buffer("scale")
        outputs = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.after:
                outputs.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return outputs


# Numbers are drawn on the CPU, so that they are the same for every device.


def image_pair(size: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """SR (a leaf that requires a gradient) and GT, (B, 3, size, size) in [0, 1]."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        sr = torch.rand(batch, 3, size, size, generator=generator)
        gt = (sr + 0.1 * torch.randn(sr.shape, generator=generator)).clamp(0, 1)
    return sr.to(device).requires_grad_(), gt.to(device)


def feature_pair(size: int, channels: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """S (a leaf that requires a gradient) and G, (B, channels, size, size), standard normal."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        s = torch.randn(batch, channels, size, size, generator=generator)
        g = (s + 0.5 * torch.randn(s.shape, generator=generator)) / math.sqrt(1.25)
    return s.to(device).requires_grad_(), g.to(device)


def workload(row: str, variant: str, size: int, batch: int = 1) -> Step:
    """A warmed-up step of one row, ready to be measured.

    Args:
        row: a row's key (see :func:`mghf_fast.commands.table5.cost.table5`).
        variant: one of :data:`VARIANTS`.
        size: height and width of the images in pixels, at least 32.
        batch: image pairs.

    Returns:
        A function without arguments that runs forward and backward and returns SR's gradient.

    Raises:
        ValueError: unknown row or variant.
    """
    if row not in BUILDERS:
        raise ValueError(f"row is {row!r}; allowed are {', '.join(map(repr, BUILDERS))}")
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; allowed are {', '.join(map(repr, VARIANTS))}")
    build = BUILDERS[row]
    if variant == "compile":
        step = build("reference", size, batch, torch.compile)
        step()  # compiles
        return step
    # A small size loads every library and starts the threads, at little cost.
    build(variant, min(size, WARM_UP_SIZE), 1, _as_it_is)()
    return build(variant, size, batch, _as_it_is)


Wrap = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
Builder = Callable[[str, int, int, Wrap], Step]


def _as_it_is(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def _step(function: Callable[..., Tensor], sr: Tensor, *others: Tensor) -> Step:
    """Forward, and the gradient of the scalar ``function(sr, *others)`` with respect to ``sr``."""
    return lambda: torch.autograd.grad(function(sr, *others), sr)


def reference_lip(s: Tensor, g: Tensor, weights: Weights, downscale: int = 1) -> Tensor:
    """The reference's local term of two feature stacks at 1 / ``downscale`` of the resolution,
    under ordinary autograd."""
    sizes = PATCH_SIZE // downscale, STRIDE // downscale
    query = patches.patch_projection(s, *weights, *sizes)
    with torch.no_grad():
        key = patches.patch_projection(g, *weights, *sizes)
    return monce.monce(query, key, 0.07, 1.0, 50, 1.0, "hard", "exact").mean()


def _lip(variant: str, size: int, batch: int, wrap: Wrap) -> Step:
    weights = projection_weights()

    def reference(s: Tensor, g: Tensor) -> Tensor:
        return reference_lip(s, g, weights)

    function = LocalInformationLoss() if variant == "mghf_fast" else reference
    return _step(wrap(function), *feature_pair(size, CHANNELS, batch))


# The three terms of CSC, each on the M kept maps with their weights, as the paper counts them. The
# op content_style computes the three (and MGHF-n) in one call, so "mghf_fast" runs them together.


def _gram_term(s: Tensor, g: Tensor, weights: Tensor) -> Tensor:
    m, n = s.shape[1], s[0, 0].numel()
    s, g = (weights * s).flatten(2), (weights * g).flatten(2)
    return ((s @ s.mT - g @ g.mT) / (m * n)).square().sum((1, 2)).mean() / m


def _correlation_term(s: Tensor, g: Tensor, weights: Tensor) -> Tensor:
    del weights  # Pearson's correlation ignores them
    s, g = s - s.mean((2, 3), keepdim=True), g - g.mean((2, 3), keepdim=True)
    variance_s, variance_g = s.square().mean((2, 3)), g.square().mean((2, 3))
    floor = VARIANCE_FLOOR
    root = (variance_s.clamp_min(floor) * variance_g.clamp_min(floor)).sqrt()
    return 1 - ((s * g).mean((2, 3)) / root).mean()


def _mse_term(s: Tensor, g: Tensor, weights: Tensor) -> Tensor:
    return (weights * (s - g)).square().mean()


def _csc_term(term: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Builder:
    def build(variant: str, size: int, batch: int, wrap: Wrap) -> Step:
        if variant == "mghf_fast":

            def joint(s: Tensor, g: Tensor) -> Tensor:
                terms = functional.content_style_terms(gt=g, sr=s)
                return (terms.mse + terms.correlation + terms.gram).mean()

            return _step(wrap(joint), *feature_pair(size, CHANNELS, batch))
        kept = CHANNELS // 2
        weights = torch.linspace(1, 2, kept).view(1, kept, 1, 1)
        return _step(wrap(term), *feature_pair(size, kept, batch), weights)

    return build


def _dfe_mse(variant: str, size: int, batch: int, wrap: Wrap) -> Step:
    del variant  # plain PyTorch in every variant
    return _step(wrap(F.mse_loss), *feature_pair(size, CHANNELS, batch))


def _reference_features(image: Tensor, extractor: DetailFeatureExtractor) -> Tensor:
    x: Tensor = extractor.stem(image)
    for block in extractor.blocks:
        assert isinstance(block, InvertibleBlock)
        x = coupling.invertible_block(x, block.weights())
    return x


def _dfe(variant: str, size: int, batch: int, wrap: Wrap) -> Step:
    extractor = paper_extractor()
    sr, gt = image_pair(size, batch)
    generator = torch.Generator().manual_seed(1)
    side = -(-size // extractor.downscale)
    upstream = torch.randn(sr.shape[0], CHANNELS, side, side, generator=generator, device="cpu")
    upstream = upstream.to(sr.device)

    def reference(image: Tensor) -> Tensor:
        return _reference_features(image, extractor)

    features = wrap(extractor if variant == "mghf_fast" else reference)

    def step() -> object:
        with torch.no_grad():
            features(gt)
        return torch.autograd.grad(features(sr), sr, upstream)

    return step


def paper_extractor() -> DetailFeatureExtractor:
    """An untrained extractor with the papers' sizes, the same in every process. It has PyTorch's
    own initialisation, with which all committed times were measured, and with which rounding flips
    few activations, so that variants of a step can be compared."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        extractor = DetailFeatureExtractor(init="linear", clamp=None)
    return extractor.requires_grad_(False).to(torch.get_default_device())


def reference_mghf(
    variant: str = "c", extractor: DetailFeatureExtractor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """MGHF-c or MGHF-n with the published weights of 2026 as a function of SR and GT, by the
    reference under ordinary autograd. The default extractor is :func:`paper_extractor`'s."""
    extractor = (extractor or paper_extractor()).requires_grad_(False)
    downscale = extractor.downscale
    weights = projection_weights(PATCH_SIZE // downscale)
    preset = PRESETS["2026"]

    def loss(sr: Tensor, gt: Tensor) -> Tensor:
        s = _reference_features(sr, extractor)
        with torch.no_grad():
            g = _reference_features(gt, extractor)
        if variant == "n":
            return (s - g).square().mean()
        terms = content_style.content_style(
            g, s, s.shape[1] // 2, preset.alpha, preset.gamma, 256, "channel"
        )
        naive, *consistency = (term.mean() for term in terms[:4])
        csc = sum(beta * term for beta, term in zip(preset.betas, consistency, strict=True))
        lip = reference_lip(s, g, weights, downscale)
        return preset.gammas[0] * naive + preset.gammas[1] * csc + preset.gammas[2] * lip

    return loss


def _total(variant: str, size: int, batch: int, wrap: Wrap) -> Step:
    ours = variant == "mghf_fast"
    loss = MGHFLoss(preset="2026", extractor=paper_extractor()) if ours else reference_mghf()
    return _step(wrap(loss), *image_pair(size, batch))


def _vgg16(variant: str, size: int, batch: int, wrap: Wrap) -> Step:
    del variant  # none of our ops in it
    return _step(wrap(VGG16Perceptual()), *image_pair(size, batch))


def projection_weights(patch_size: int = PATCH_SIZE) -> Weights:
    """The default patch projection's weights and biases, in the op's order."""
    first, second = (projection := PatchProjection(patch_size)).hidden, projection.output
    return first.weight, first.bias, second.weight, second.bias


BUILDERS: dict[str, Builder] = {
    "lip": _lip,
    "gram": _csc_term(_gram_term),
    "correlation": _csc_term(_correlation_term),
    "awdfe_mse": _csc_term(_mse_term),
    "dfe_mse": _dfe_mse,
    "dfe": _dfe,
    "total": _total,
    "vgg16": _vgg16,
}
