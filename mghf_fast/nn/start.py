"""The weights that a new extractor starts from.

With PyTorch's own initialisation the sub-networks' outputs are so small compared to what they are
added to that a block is linear to three digits, and the distance between features is an MSE of
pixels: if the ground truth is uncertain, the picture that minimises it is the blurred mean. The
*curved* start draws every layer so that, on photographs in [-1, 1], root mean squares are

    the input of a coupling         1,
    every pre-activation            2, where ReLU6 is nonlinear on both sides,
    the outputs of phi and eta      2, and of rho 1/2.

A linear layer with n weights per output, each of variance g^2 / n, turns a root mean square of m
into g m in expectation over the weights, whatever the correlations of its input. So the gains g
follow from the second moments of the preceding layers, and no picture is needed.

The rule assumes Gaussian pre-activations. Those of photographs are not Gaussian, and lose more to
ReLU6: measured on four of them with three seeds and one block, the coupling's input is 1.0 to 1.1,
pre-activations 1.4 to 2.4, phi's output 1.4 to 1.8, eta's 1.1 to 1.6, rho's 0.3 to 0.45. Later
blocks have inputs of 0.6 to 0.9. For candidates shifted by a pixel, |F(mean) - mean F|^2 is 0.08 to
0.2 of the features' variance (three blocks after a squeeze: 0.17 to 0.35), with the linear start
0.001 (0.003); it is 0.005 to 0.03 for softplus, which is nearly linear within 2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .initial import orthogonal
from .stems import ResidualStem, SqueezeStem

if TYPE_CHECKING:
    from .detail_feature_extractor import InvertibleBlock

STARTS = ("curved", "linear")

PHOTOGRAPH_RMS = 0.556
"""Root mean square of photographs in [-1, 1], measured on 131 from BSDS500 and ImageNet."""
PRE_ACTIVATION, SHIFT, LOG_SCALE = 2.0, 2.0, 0.5
"""Root mean squares of pre-activations, of the outputs of phi and eta, and of rho's output."""
ACTIVATED = {"relu6": 1.411, "softplus": 1.527, "leaky_relu": 1.415}
"""Root mean square of an activation of N(0, PRE_ACTIVATION^2)."""

# z2 + phi(z1) and z1 exp(rho) + eta have these mean squares; E exp(2 r) = exp(2 LOG_SCALE^2).
_UPDATED = 1 + SHIFT**2
_SCALED = math.exp(2 * LOG_SCALE**2) + SHIFT**2
BLOCK_OUTPUT_RMS = math.sqrt((_UPDATED + _SCALED) / 2)


def _draw(weight: Tensor, gain: float) -> None:
    nn.init.normal_(weight, std=gain / math.sqrt(weight[0].numel()))


@torch.no_grad()
def curve_block(block: InvertibleBlock, input_rms: float) -> None:
    """Draws the weights of an :class:`InvertibleBlock` from torch's random numbers.

    The mix is orthogonal, divided by ``input_rms``, the root mean square of the block's input.
    """
    orthogonal(block.mix.weight, gain=1 / input_rms)
    assert block.mix.bias is not None
    nn.init.zeros_(block.mix.bias)
    activated = ACTIVATED[block.activation]
    for network, output, before in (
        (block.phi, SHIFT, 1.0),
        (block.rho, LOG_SCALE, math.sqrt(_UPDATED)),
        (block.eta, SHIFT, math.sqrt(_UPDATED)),
    ):
        *hidden, last = network.kernels()
        rms = before
        for kernel in hidden:
            _draw(kernel, PRE_ACTIVATION / rms)
            rms = activated
        _draw(last, output / rms)


@torch.no_grad()
def curve_stem(stem: nn.Module) -> float:
    """Draws a stem's weights so that photographs give features with a root mean square of about 1,
    and returns the expected one."""
    if isinstance(stem, nn.Conv2d):
        _draw(stem.weight, 1 / PHOTOGRAPH_RMS)
        assert stem.bias is not None
        nn.init.zeros_(stem.bias)
    elif isinstance(stem, SqueezeStem):
        channels, inputs = stem.lift.weight.shape
        orthogonal(stem.lift.weight, gain=math.sqrt(channels / inputs) / PHOTOGRAPH_RMS)
    elif isinstance(stem, ResidualStem):
        # As the batch norms will do once they have statistics. Each ReLU halves the mean square;
        # the last one acts on the sum of two branches of mean square 1.
        _draw(stem.conv1.weight, 1 / PHOTOGRAPH_RMS)
        _draw(stem.conv2.weight, math.sqrt(2))
        _draw(stem.shortcut.weight, 1 / PHOTOGRAPH_RMS)
    return 1.0
