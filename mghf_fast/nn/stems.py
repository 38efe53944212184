"""The stems: layers before the invertible blocks that produce their channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision import autocasting, without_autocast
from .initial import orthogonal

STEMS = ("conv", "residual", "squeeze")


class ResidualStem(nn.Module):
    """A ResNet basic block: two 3x3 convolutions and a 1x1 shortcut, each with batch norm."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.shortcut_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut_norm(self.shortcut(x)))


def reflected(x: Tensor, dim: int, count: int) -> Tensor:
    """``x`` padded by reflection with ``count`` entries at the end of ``dim``, which is longer than
    ``count``."""
    # On a GPU the gradient of torch.nn.functional.pad is summed in a nondeterministic order.
    if not count:
        return x
    return torch.cat((x, x.narrow(dim, x.shape[dim] - 1 - count, count).flip(dim)), dim)


def unreflected(grad: Tensor, dim: int, size: int) -> Tensor:
    """The gradient in ``x``, which has ``size`` along ``dim``, from that in the padded ``x``."""
    count = grad.shape[dim] - size
    if not count:
        return grad
    own = grad.narrow(dim, 0, size).clone()
    own.narrow(dim, size - 1 - count, count).add_(grad.narrow(dim, size, count).flip(dim))
    return own


class SqueezeStem(nn.Module):
    """Space to depth, then an orthogonal lift to more channels: features at 1/r of the resolution;
    invertible.

    Pixel (r i + p, r j + q) of colour k becomes channel (k r + p) r + q at (i, j), the order of
    :func:`torch.nn.functional.pixel_unshuffle`. Sides that are no multiple of r are padded by
    reflection.

    Args:
        in_channels: channels of the image.
        channels: C, at least ``in_channels`` r^2, or the lift would lose some of the image.
        squeeze: r.
    """

    def __init__(self, in_channels: int, channels: int, squeeze: int) -> None:
        super().__init__()
        self.in_channels, self.squeeze = in_channels, squeeze
        self.lift = nn.Linear(in_channels * squeeze**2, channels, bias=False)
        orthogonal(self.lift.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, C, ceil(H / r), ceil(W / r)), channels_last; dtype of the
        image, under autocast at least float32.

        Raises:
            ValueError: a side has fewer than r pixels.
        """
        r = self.squeeze
        if min(x.shape[2:]) < r:
            raise ValueError(
                f"image must be at least {r} pixels high and wide for squeeze {r}, got "
                f"{x.shape[2]} x {x.shape[3]}"
            )
        # Under autocast the blocks compute in float32, and so does the stem.
        dtype = torch.promote_types(x.dtype, self.lift.weight.dtype)
        if autocasting(x.device.type):
            with without_autocast(x.device.type):
                return self.lifted(x.to(dtype))
        return self.lifted(x.to(dtype)).to(x.dtype)

    def lifted(self, x: Tensor) -> Tensor:
        """:meth:`forward` for a checked image whose type is at least as wide as the weights'."""
        r = self.squeeze
        x = reflected(reflected(x, 2, -x.shape[2] % r), 3, -x.shape[3] % r)
        batch, colours, height, width = x.shape
        x = x.reshape(batch, colours, height // r, r, width // r, r).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(batch, height // r, width // r, colours * r * r)
        return F.linear(x, self.lift.weight.to(x.dtype)).permute(0, 3, 1, 2)

    def squeezed(self, images: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """What the lift takes: images (B, in_channels, H, W) of one shape as one batch, (number
        times B, in_channels r^2, ceil(H / r), ceil(W / r)) of ``dtype``, channels_last. Each image
        is copied once."""
        r, first = self.squeeze, images[0]
        batch, colours, height, width = first.shape
        rows, columns = -(-height // r), -(-width // r)
        shape = len(images), batch, rows, columns, colours, r, r
        x = first.new_empty(shape, dtype=dtype)
        for target, image in zip(x, images, strict=True):
            image = reflected(reflected(image, 2, -height % r), 3, -width % r)
            image = image.view(batch, colours, rows, r, columns, r)
            target.permute(0, 3, 1, 4, 2, 5).copy_(image)
        return x.view(-1, rows, columns, colours * r * r).permute(0, 3, 1, 2)

    def unsqueezed(self, grad: Tensor, image: Tensor) -> Tensor:
        """The gradient in ``image``, (B, in_channels, H, W), from that in its squeezed form; type
        of the image."""
        r = self.squeeze
        batch, colours, height, width = image.shape
        rows, columns = grad.shape[2:]
        padded = (height, width) != (rows * r, columns * r)
        shape = batch, colours, rows * r, columns * r
        # Gradients of what is padded are added up before they are rounded.
        x = grad.new_empty(shape, dtype=grad.dtype if padded else image.dtype)
        pixels = grad.view(batch, colours, r, r, rows, columns).permute(0, 1, 4, 2, 5, 3)
        x.view(batch, colours, rows, r, columns, r).copy_(pixels)
        return unreflected(unreflected(x, 3, width), 2, height).to(image.dtype)

    @torch.no_grad()
    def inverse(self, y: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, in_channels, r h, r w): the padded image whose features are nearest
        to ``y``, by least squares."""
        r = self.squeeze
        undo = torch.linalg.pinv(self.lift.weight.double()).to(y.dtype)
        x = F.linear(y.permute(0, 2, 3, 1), undo)
        return F.pixel_shuffle(x.permute(0, 3, 1, 2).contiguous(), r)


def make_stem(kind: str, in_channels: int, channels: int, squeeze: int) -> nn.Module:
    """The stem of one of ``STEMS``."""
    if kind == "conv":
        return nn.Conv2d(in_channels, channels, 3, padding=1)
    if kind == "residual":
        return ResidualStem(in_channels, channels)
    return SqueezeStem(in_channels, channels, squeeze)
