"""Arithmetic, memory and parameters of MGHF-c by formula: the accounting of the paper's Table 5.

The paper's "FLOP" is one multiply-add. Both images are counted, forward only. Its memory column
adds up the float32 tensors that an eager implementation names (for the extractor and VGG-16 only
the weights), so it is not a peak. Nothing here is measured; `mghf-fast table5` does that.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
FLOAT32_BYTES = 4

VGG16_STAGES = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
"""Feature stack of VGG-16 (Simonyan and Zisserman): output channels of the 3x3 convolutions with
bias in each stage; a 2x2 max pooling ends a stage."""


@dataclass(frozen=True)
class Setting:
    """The sizes a count depends on. The defaults are those of the paper's Table 5.

    Attributes:
        batch: image pairs, B.
        channels: feature maps of the extractor, C (even).
        kept: number of feature maps kept by the entropy score, M, from 1 to C.
        height: image height in pixels, H.
        width: image width in pixels, W.
        image_channels: channels of the image.
        blocks: invertible blocks of the extractor, K.
        patch_size: side of a patch in image pixels.
        stride: distance of neighbouring patches in image pixels.
        hidden: width of the projection's hidden layer.
        embedding: width of a patch embedding, D.
        iterations: Sinkhorn iterations, each one row and one column scaling.
        squeeze: r of the extractor's "squeeze" stem, whose features are at 1/r of the resolution
            (sides rounded up); 1 stands for the 3x3 convolution, at full resolution.

    Raises:
        ValueError: a size is not positive, C is odd, M exceeds C, the image holds no patch, or
            ``squeeze`` does not divide patch and stride or gives more than C channels.
    """

    batch: int = 1
    channels: int = 128
    kept: int = 128
    height: int = 512
    width: int = 512
    image_channels: int = 3
    blocks: int = 1
    patch_size: int = 32
    stride: int = 24
    hidden: int = 128
    embedding: int = 64
    iterations: int = 50
    squeeze: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.channels % 2:
            raise ValueError(f"channels is {self.channels}; it must be even")
        if self.kept > self.channels:
            raise ValueError(f"kept is {self.kept}; at most channels = {self.channels} can be kept")
        if min(self.height, self.width) < self.patch_size:
            raise ValueError(
                f"a {self.height}x{self.width} image holds no {self.patch_size}x{self.patch_size} "
                f"patch; height and width must be at least patch_size"
            )
        if self.patch_size % self.squeeze or self.stride % self.squeeze:
            raise ValueError(
                f"squeeze is {self.squeeze}; it must divide patch_size {self.patch_size} and "
                f"stride {self.stride}"
            )
        if self.squeeze > 1 and self.image_channels * self.squeeze**2 > self.channels:
            raise ValueError(
                f"squeeze is {self.squeeze}; channels {self.channels} must be at least "
                f"image_channels * squeeze ** 2 = {self.image_channels * self.squeeze**2}"
            )

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of a feature map: H and W over r, rounded up."""
        return -(-self.height // self.squeeze), -(-self.width // self.squeeze)

    @property
    def pixels(self) -> int:
        """Pixels of the features of all SR or all GT images: B H W, divided by r^2 if r divides H
        and W."""
        height, width = self.sides
        return self.batch * height * width

    @property
    def patch_pixels(self) -> int:
        """Pixels of a patch on a feature map."""
        return (self.patch_size // self.squeeze) ** 2

    @property
    def patches(self) -> int:
        """Patches of one feature map, N (without padding other than the stem's)."""
        patch, step = self.patch_size // self.squeeze, self.stride // self.squeeze
        height, width = self.sides
        return ((height - patch) // step + 1) * ((width - patch) // step + 1)


@dataclass(frozen=True)
class Cost:
    """One count: ``macs`` multiply-adds, ``bytes`` of float32 tensors, ``parameters``."""

    macs: int
    bytes: int
    parameters: int

    @property
    def gmacs(self) -> float:
        """10^9 multiply-adds: the paper's GFLOPs."""
        return self.macs / 1e9

    @property
    def mib(self) -> float:
        """2^20 bytes."""
        return self.bytes / MIB

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.macs + other.macs, self.bytes + other.bytes, self.parameters + other.parameters
        )


def _maps(setting: Setting, channels: int, copies: int) -> int:
    """Bytes of ``copies`` stacks of ``channels`` float32 feature maps."""
    return copies * channels * setting.pixels * FLOAT32_BYTES


def lip_parts(setting: Setting, similarity_products: int = 2) -> dict[str, int]:
    """Multiply-adds of the local information loss (MGHF eqs. 8 to 16, MoNCE), by step.

    The published MoNCE code multiplies queries and keys twice, once for the transport cost and once
    for the logits, and computes the positives in a third product.

    Args:
        setting: the sizes.
        similarity_products: how often the N x N similarities are computed.

    Returns:
        ``projection`` (two linear layers, both images), ``similarity``, ``positives`` and
        ``sinkhorn`` (two matrix-vector products per iteration).
    """
    s, maps = setting, setting.batch * setting.channels
    layers = s.patch_pixels * s.hidden + s.hidden * s.embedding
    return {
        "projection": 2 * maps * s.patches * layers,
        "similarity": similarity_products * maps * s.patches**2 * s.embedding,
        "positives": maps * s.patches * s.embedding,
        "sinkhorn": 2 * s.iterations * maps * s.patches**2,
    }


def projection_parameters(setting: Setting) -> int:
    """Parameters of Linear(pixels of a patch, hidden), ReLU, Linear(hidden, embedding), with their
    biases."""
    s = setting
    return (s.patch_pixels + 1) * s.hidden + (s.hidden + 1) * s.embedding


def lip(setting: Setting) -> Cost:
    """Local information loss as published: arithmetic as in :func:`lip_parts`; memory of the
    feature maps, the unfolded patches, the embeddings (all for both images), one N x N matrix per
    feature map, and the two scaling vectors."""
    s, maps = setting, setting.batch * setting.channels
    elements = maps * (
        2 * s.patches * (s.patch_pixels + s.embedding) + s.patches**2 + 2 * s.patches
    )
    return Cost(
        macs=sum(lip_parts(s).values()),
        bytes=_maps(s, s.channels, 2) + elements * FLOAT32_BYTES,
        parameters=projection_parameters(s),
    )


def lip_ours(setting: Setting) -> Cost:
    """The same loss as computed here: one similarity product is used for the plan, the logits and
    (its diagonal) the positives. The first layer is a strided convolution, which needs no unfolded
    patches, but its output is kept; similarities and plan are two N x N matrices per map."""
    s, maps = setting, setting.batch * setting.channels
    parts = lip_parts(s, similarity_products=1)
    elements = maps * (2 * s.patches * (s.hidden + s.embedding) + 2 * s.patches**2 + 2 * s.patches)
    return Cost(
        macs=sum(parts.values()) - parts["positives"],
        bytes=_maps(s, s.channels, 2) + elements * FLOAT32_BYTES,
        parameters=projection_parameters(s),
    )


def gram(setting: Setting) -> Cost:
    """Gram loss (MGHF eq. 7): F F^T of the M kept maps, for both images. The paper's memory is four
    stacks of maps and the two M x M matrices."""
    s = setting
    return Cost(
        macs=2 * s.kept**2 * s.pixels,
        bytes=_maps(s, s.kept, 4) + 2 * s.batch * s.kept**2 * FLOAT32_BYTES,
        parameters=0,
    )


def correlation(setting: Setting) -> Cost:
    """Pearson correlation loss: 11 operations per element, four stacks of maps."""
    return Cost(11 * setting.kept * setting.pixels, _maps(setting, setting.kept, 4), 0)


def awdfe_mse(setting: Setting) -> Cost:
    """Mean squared error of the weighted kept maps: 2 operations per element, two stacks."""
    return Cost(2 * setting.kept * setting.pixels, _maps(setting, setting.kept, 2), 0)


def dfe_mse(setting: Setting) -> Cost:
    """Mean squared error of all maps (MGHF-n): 2 operations per element, three stacks of maps."""
    return Cost(2 * setting.channels * setting.pixels, _maps(setting, setting.channels, 3), 0)


def invertible_block(setting: Setting) -> Cost:
    """One invertible block (HF-Diff eq. 5) on both images, with its weights as memory: a dense 1x1
    C -> C with bias and three sub-networks c -> 2c -> depthwise 3x3 -> c without bias, c = C/2."""
    s, half = setting, setting.channels // 2
    subnetwork = half * 2 * half + 9 * 2 * half + 2 * half * half
    per_pixel = s.channels**2 + 3 * subnetwork
    parameters = per_pixel + s.channels
    return Cost(2 * per_pixel * s.pixels, parameters * FLOAT32_BYTES, parameters)


def stem(setting: Setting) -> Cost:
    """The 3x3 convolution with bias from the image to C maps, or the squeeze stem's lift without
    bias from r^2 pixels to C maps, on both images; weights as memory."""
    squeezed = setting.squeeze > 1
    inputs = setting.image_channels * (setting.squeeze**2 if squeezed else 9)
    per_pixel = inputs * setting.channels
    parameters = per_pixel + (0 if squeezed else setting.channels)
    return Cost(2 * per_pixel * setting.pixels, parameters * FLOAT32_BYTES, parameters)


def extractor(setting: Setting, with_stem: bool = False) -> Cost:
    """The detail feature extractor: K invertible blocks, and the stem if requested. The 3x3 stem is
    folded into the first block's mix and so replaces it; the squeeze stem is computed before it."""
    block, start = invertible_block(setting), stem(setting)
    k = setting.blocks
    cost = Cost(k * block.macs, k * block.bytes, k * block.parameters)
    if not with_stem:
        return cost
    first_mix = 0 if setting.squeeze > 1 else 2 * setting.channels**2 * setting.pixels
    return Cost(cost.macs - first_mix, cost.bytes, cost.parameters) + start


def vgg16_features(setting: Setting) -> Cost:
    """All thirteen convolutions of VGG-16 on both images, with the weights as memory; each pooling
    halves height and width, rounding down."""
    macs = parameters = 0
    height, width, channels = setting.height, setting.width, setting.image_channels
    for stage in VGG16_STAGES:
        for layer in stage:
            macs += 9 * channels * layer * height * width
            parameters += (9 * channels + 1) * layer
            channels = layer
        height, width = height // 2, width // 2
    return Cost(2 * setting.batch * macs, parameters * FLOAT32_BYTES, parameters)


ROWS = ("lip", "gram", "correlation", "awdfe_mse", "dfe_mse", "dfe", "total", "vgg16")
"""The keys of the rows of :func:`table5`, in the table's order."""


@dataclass(frozen=True)
class Row:
    """One row of Table 5.

    Attributes:
        key: short name, as ``--rows`` takes it.
        name: the row's name in the paper.
        paper: the printed GFLOPs, MB (meaning MiB) and millions of parameters, at 512x512.
        published: our count of the published algorithm in the given setting.
        ours: the same count for this package's defaults in that setting.
    """

    key: str
    name: str
    paper: tuple[float, float, float]
    published: Cost
    ours: Cost


def table5(
    height: int = 512,
    width: int = 512,
    *,
    batch: int = 1,
    channels: int = 128,
    top_m: int | None = None,
    blocks: int = 1,
    squeeze: int = 1,
) -> tuple[Row, ...]:
    """Table 5 for images of ``height`` x ``width`` pixels.

    The published algorithm keeps all C maps (as in the paper's own figures), and its extractor is
    the invertible block alone. Ours keeps ``top_m`` maps (default C/2) and includes the stem,
    folded into the first mix.

    Args:
        height: image height in pixels, at least one patch (32).
        width: image width in pixels, at least one patch (32).
        batch: image pairs.
        channels: feature maps, even.
        top_m: feature maps our implementation keeps, 1 to ``channels``; ``None`` means half.
        blocks: invertible blocks of our extractor.
        squeeze: r of our extractor's stem, as in :class:`Setting`.

    Returns:
        The rows in the paper's order: lip, gram, correlation, awdfe_mse, dfe_mse, dfe, total,
        vgg16.

    Raises:
        ValueError: a size is out of range (see :class:`Setting`).
    """
    half = channels // 2 if top_m is None else top_m
    theirs = Setting(batch, channels, channels, height, width)
    our = Setting(batch, channels, half, height, width, blocks=blocks, squeeze=squeeze)

    rows = [
        Row("lip", "LIP", (21.402, 819.96, 0.139), lip(theirs), lip_ours(our)),
        Row("gram", "Gram", (8.590, 512.13, 0.0), gram(theirs), gram(our)),
        Row(
            "correlation",
            "Correlation",
            (0.369, 512.00, 0.0),
            correlation(theirs),
            correlation(our),
        ),
        Row("awdfe_mse", "AWDFE MSE", (0.067, 256.00, 0.0), awdfe_mse(theirs), awdfe_mse(our)),
        Row("dfe_mse", "DFE MSE", (0.067, 384.00, 0.0), dfe_mse(theirs), dfe_mse(our)),
        Row("dfe", "DFE", (72.290, 1.31, 0.34), extractor(theirs), extractor(our, with_stem=True)),
    ]
    zero = Cost(0, 0, 0)
    published = sum((row.published for row in rows), zero)
    ours = sum((row.ours for row in rows), zero)
    vgg = vgg16_features(theirs)
    return (
        *rows,
        Row("total", "Total (MGHF-c)", (102.785, 2499.89, 0.479), published, ours),
        Row("vgg16", "VGG-16 features", (160.36, 56.13, 14.71), vgg, vgg),
    )


NOTES = (
    "One GFLOP of the paper is 10^9 multiply-adds, forward, both images; its MB are MiB.",
    "The paper's memory column is accounting (named float32 tensors; for DFE and VGG-16 the "
    "weights alone), not a peak. It adds up to 2485.40, although the total row prints 2499.89.",
    "DFE: our block counts 36.172 by the multiply-add rule and 72.343 with multiply and add "
    "counted apart, 0.07 % from the printed 72.290. The printed 343,616 parameters fit neither: no "
    "natural design has both figures, so they are not chased (ours: 69,120 in the block, 72,704 "
    "with the stem).",
)
"""What a reader of Table 5 must know about its counts."""
