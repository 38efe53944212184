"""The invertible block (HF-Diff eq. 5; MGHF's detail feature extractor is a chain of these).

    x = mix(x)                                    dense 1x1, C -> C, bias; or, with the extractor's
                                                  stem folded into it, 3x3 with zero padding, any
                                                  number of channels -> C
    z1, z2 = halves(x)
    z2 <- z2 + phi(z1)
    z1 <- z1 * exp(r) + eta(z2),   r = rho(z2)    the updated z2; or r = k tanh(rho(z2) / k)
    y = cat(z1, z2)

phi, rho, eta ("bottleneck"): 1x1 c -> 2c, act, reflect-pad 1, depthwise 3x3, act, 1x1 2c -> c;
("conv2"): reflect-pad 1, 3x3 c -> c, act, reflect-pad 1, 3x3 c -> c. No biases. c = C / 2.

Inverse:  z1 = (z1 - eta(z2)) exp(-r),  z2 = z2 - phi(z1),  x = mix^-1 (cat(z1, z2)).

Gradient of the input for (g1, g2), the gradient of y (T marks a transposed Jacobian):

    d_r = g1 z1 exp(r);  d_z2 = g2 + rho^T d_r + eta^T g1;  d_z1 = g1 exp(r) + phi^T d_z2
    d_x = mix^T cat(d_z1, d_z2)

Only the block's input is kept for the backward; everything else is computed again.

Determinant of the Jacobian: the mix is the same C x C matrix at each of the H W pixels; of the two
shears (phi, eta) it is 1, whatever they are, and the scale multiplies each z1 by exp(r):

    log |det| = H W log |det mix| + sum of r
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ..backends import can_run_reference
from ..ops.vocabulary import BlockWeights, nothing_kept
from ..precision import accumulation_dtype


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "relu6":
        return F.relu6(x)
    if activation == "softplus":
        return F.softplus(x)
    return F.leaky_relu(x, 0.01)


def _activation_slope(x: Tensor, activation: str) -> Tensor:
    if activation == "relu6":
        return ((x > 0) & (x < 6)).to(x.dtype)
    if activation == "softplus":
        return torch.sigmoid(x)
    return torch.full_like(x, 0.01).masked_fill(x > 0, 1.0)


def _pad(x: Tensor) -> Tensor:
    """Reflection by one pixel; a side of length one has nothing to reflect and is repeated."""
    h, w = x.shape[-2:]
    x = F.pad(x, (1, 1, 0, 0), mode="reflect" if w > 1 else "replicate")
    return F.pad(x, (0, 0, 1, 1), mode="reflect" if h > 1 else "replicate")


def _pad_transposed(grad: Tensor) -> Tensor:
    # In gather form, because PyTorch's CUDA backward of the reflection pad is not deterministic.
    for dim in (-2, -1):
        n = grad.shape[dim] - 2
        inner = grad.narrow(dim, 1, n).clone()
        inner.narrow(dim, min(1, n - 1), 1).add_(grad.narrow(dim, 0, 1))
        inner.narrow(dim, max(n - 2, 0), 1).add_(grad.narrow(dim, n + 1, 1))
        grad = inner
    return grad


def _subnet(x: Tensor, kernels: tuple[Tensor, ...], activation: str) -> Tensor:
    if len(kernels) == 2:
        expand, project = kernels
        return F.conv2d(_pad(_activate(F.conv2d(_pad(x), expand), activation)), project)
    expand, depthwise, project = kernels
    hidden = _pad(_activate(F.conv2d(x, expand), activation))
    hidden = F.conv2d(hidden, depthwise, groups=depthwise.shape[0])
    return F.conv2d(_activate(hidden, activation), project)


def _subnet_backward(
    grad: Tensor, x: Tensor, kernels: tuple[Tensor, ...], activation: str, need_weights: bool
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the sub-network's input and, if requested, of its kernels."""
    if len(kernels) == 2:
        expand, project = kernels
        padded = _pad(x)
        before = F.conv2d(padded, expand)
        grad_before = _pad_transposed(F.conv_transpose2d(grad, project))
        grad_before = grad_before * _activation_slope(before, activation)
        grad_x = _pad_transposed(F.conv_transpose2d(grad_before, expand))
        if not need_weights:
            return grad_x, []
        hidden = _pad(_activate(before, activation))
        return grad_x, [
            conv2d_weight(padded, list(expand.shape), grad_before),
            conv2d_weight(hidden, list(project.shape), grad),
        ]
    expand, depthwise, project = kernels
    groups = depthwise.shape[0]
    before1 = F.conv2d(x, expand)
    hidden1 = _pad(_activate(before1, activation))
    before2 = F.conv2d(hidden1, depthwise, groups=groups)
    grad2 = F.conv_transpose2d(grad, project) * _activation_slope(before2, activation)
    grad1 = _pad_transposed(F.conv_transpose2d(grad2, depthwise, groups=groups))
    grad1 = grad1 * _activation_slope(before1, activation)
    grad_x = F.conv_transpose2d(grad1, expand)
    if not need_weights:
        return grad_x, []
    return grad_x, [
        conv2d_weight(x, list(expand.shape), grad1),
        conv2d_weight(hidden1, list(depthwise.shape), grad2, groups=groups),
        conv2d_weight(_activate(before2, activation), list(project.shape), grad),
    ]


def _mix(x: Tensor, w: BlockWeights) -> Tensor:
    return F.conv2d(x, w.mix_weight, w.mix_bias, padding=w.mix_weight.shape[2] // 2)


def _log_scale(raw: Tensor, clamp: float | None) -> Tensor:
    return raw if clamp is None else clamp * torch.tanh(raw / clamp)


def _in_accumulation_dtype(x: Tensor, weights: BlockWeights) -> tuple[Tensor, BlockWeights]:
    dtype = accumulation_dtype(x.dtype)
    tensors = [w.to(dtype) for w in weights.tensors()]
    return x.to(dtype), BlockWeights.from_tensors(tensors, *weights[5:])


def invertible_block(x: Tensor, weights: BlockWeights) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W); with a 3x3 mix (B, any, H, W) -> (B, C, H, W)."""
    dtype = x.dtype
    x, w = _in_accumulation_dtype(x, weights)
    z1, z2 = _mix(x, w).chunk(2, 1)
    z2 = z2 + _subnet(z1, w.phi, w.activation)
    scale = torch.exp(_log_scale(_subnet(z2, w.rho, w.activation), w.clamp))
    z1 = z1 * scale + _subnet(z2, w.eta, w.activation)
    return torch.cat((z1, z2), 1).to(dtype)


def invertible_block_inverse(y: Tensor, weights: BlockWeights) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W): the input for which ``invertible_block`` returns ``y``."""
    dtype = y.dtype
    y, w = _in_accumulation_dtype(y, weights)
    z1, z2 = y.chunk(2, 1)
    scale = torch.exp(-_log_scale(_subnet(z2, w.rho, w.activation), w.clamp))
    z1 = (z1 - _subnet(z2, w.eta, w.activation)) * scale
    z2 = z2 - _subnet(z1, w.phi, w.activation)
    mixed = torch.cat((z1, z2), 1) - w.mix_bias.view(-1, 1, 1)
    inverse = torch.linalg.inv(w.mix_weight.flatten(1))
    return F.conv2d(mixed, inverse[:, :, None, None]).to(dtype)


def invertible_block_log_det(x: Tensor, weights: BlockWeights) -> Tensor:
    """(B, C, H, W) -> (B,), log |det| of the Jacobian of ``invertible_block`` at each image, in
    float32 (float64 for float64); minus infinity for a singular mix."""
    x, w = _in_accumulation_dtype(x, weights)
    z1, z2 = _mix(x, w).chunk(2, 1)
    z2 = z2 + _subnet(z1, w.phi, w.activation)
    log_scale = _log_scale(_subnet(z2, w.rho, w.activation), w.clamp)
    # In float64, because an error in the mix's share is multiplied by the number of pixels.
    # (Apple's GPUs have no float64.)
    mix = w.mix_weight.flatten(1)
    mix = mix if x.device.type == "mps" else mix.double()
    of_mix = torch.linalg.slogdet(mix).logabsdet * (x.shape[2] * x.shape[3])
    return of_mix.to(x.dtype) + log_scale.sum((1, 2, 3))


def invertible_block_backward(
    grad: Tensor, x: Tensor, weights: BlockWeights, need_weights: bool
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of ``x`` and, with ``need_weights``, of every tensor of ``weights.tensors()``."""
    dtype = x.dtype
    x, w = _in_accumulation_dtype(x, weights)
    grad1, grad2 = grad.to(x.dtype).chunk(2, 1)

    z1, z2 = _mix(x, w).chunk(2, 1)
    z2 = z2 + _subnet(z1, w.phi, w.activation)
    log_scale = _log_scale(_subnet(z2, w.rho, w.activation), w.clamp)
    scale = torch.exp(log_scale)

    grad_rho = grad1 * z1 * scale
    if w.clamp is not None:
        grad_rho = grad_rho * (1 - (log_scale / w.clamp) ** 2)
    from_rho, weights_rho = _subnet_backward(grad_rho, z2, w.rho, w.activation, need_weights)
    from_eta, weights_eta = _subnet_backward(grad1, z2, w.eta, w.activation, need_weights)
    grad_z2 = grad2 + from_rho + from_eta
    from_phi, weights_phi = _subnet_backward(grad_z2, z1, w.phi, w.activation, need_weights)
    grad_mixed = torch.cat((grad1 * scale + from_phi, grad_z2), 1)
    padding = w.mix_weight.shape[2] // 2
    grad_x = F.conv_transpose2d(grad_mixed, w.mix_weight, padding=padding).to(dtype)
    if not need_weights:
        return grad_x, []
    grad_weights = [
        conv2d_weight(x, list(w.mix_weight.shape), grad_mixed, padding=padding),
        grad_mixed.sum((0, 2, 3)),
        *weights_phi,
        *weights_rho,
        *weights_eta,
    ]
    return grad_x, [g.to(t.dtype) for g, t in zip(grad_weights, weights.tensors(), strict=True)]


# ---- as a backend ----


def forward(
    x: Tensor,
    weights: list[Tensor],
    activation: str,
    subnet: str,
    clamp: float | None,
    keep: bool,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    block = BlockWeights.from_tensors(weights, activation, subnet, clamp)
    return invertible_block(x, block), nothing_kept(x)


def backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    state: Tensor,
    activation: str,
    subnet: str,
    clamp: float | None,
    need_weights: bool,
    precision: str = "float32",
) -> list[Tensor]:
    block = BlockWeights.from_tensors(weights, activation, subnet, clamp)
    grad_x, grad_weights = invertible_block_backward(grad, x, block, need_weights)
    return [grad_x, *grad_weights]


def inverse(
    y: Tensor, weights: list[Tensor], activation: str, subnet: str, clamp: float | None
) -> Tensor:
    block = BlockWeights.from_tensors(weights, activation, subnet, clamp)
    return invertible_block_inverse(y, block)


can_run = can_run_reference
