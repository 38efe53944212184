"""The library as functions.

With ``backend=None`` a function follows the innermost :class:`use_backend`, by default ``"auto"``:
the best backend that can run. A name forces that backend.

Tensors are float32, float16, bfloat16 or (plain PyTorch only) float64, with any strides; sums and
exponentials are computed in float32 (float64 for float64). No argument is ever modified.
``precision``, where a function has it, is the least precision of its matrix products: see
:mod:`mghf_fast.precision`.
Common errors: ``TypeError`` for an argument of the wrong type or dtype, ``ValueError`` for a wrong
shape, device or value, ``RuntimeError`` for a forced backend that cannot run, with its reason.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as check
from . import _options, ops
from ._gather import gather_rows
from .backends import current_backend
from .ops import vocabulary
from .ops.vocabulary import BlockWeights
from .precision import accumulation_dtype, product_precision

__all__ = [
    "BlockWeights",
    "ContentStyleTerms",
    "channel_entropy",
    "content_style_terms",
    "dec_loss",
    "gram_matrix",
    "invertible_block",
    "invertible_block_inverse",
    "js_divergence_loss",
    "marginal_error",
    "monce_loss",
    "naive_term",
    "patch_nce_loss",
    "patch_projection",
    "sinkhorn_plan",
]

REDUCTIONS = ("mean", "sum", "none")


def _reduce(x: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return x
    return x.mean() if reduction == "mean" else x.sum()


def _check_block(name: str, x: Tensor, weights: BlockWeights, kernels: tuple[int, ...]) -> None:
    check.check_tensor(name, x, "(B, C, H, W)")
    if not isinstance(weights, BlockWeights):
        raise TypeError(f"weights must be BlockWeights, got {type(weights).__name__}")
    check.check_choice("weights.activation", weights.activation, vocabulary.ACTIVATIONS)
    check.check_choice("weights.subnet", weights.subnet, vocabulary.SUBNETS)
    if weights.clamp is not None:
        check.check_number("weights.clamp", weights.clamp, positive=True)
    channels = x.shape[1]
    mix = tuple(weights.mix_weight.shape)
    if len(mix) == 4 and mix[2] == 3 and 3 in kernels:
        expected = vocabulary.weight_shapes(mix[0], weights.subnet, channels, 3)
        check.check_even_channels("weights.mix_weight", mix[0])
    else:
        check.check_even_channels(name, channels)
        expected = vocabulary.weight_shapes(channels, weights.subnet)
    got = [tuple(w.shape) for w in weights.tensors()]
    if got != expected:
        raise ValueError(
            f"weights do not fit {name} with {channels} channels and subnet {weights.subnet!r}: "
            f"their shapes must be {expected}, got {got}"
        )
    check.check_device(name, x, "weights", weights.mix_weight)
    for weight in weights.tensors():
        check.refuse_tangent("weights", weight)


def invertible_block(
    x: Tensor,
    weights: BlockWeights,
    *,
    backend: str | None = None,
    precision: str = "auto",
) -> Tensor:
    """One invertible block: mix, then an affine coupling of the two halves (HF-Diff eq. 5).

    Args:
        x: features, (B, C, H, W) with an even C; (B, any, H, W) for weights with a 3x3 mix.
        weights: from :meth:`mghf_fast.nn.InvertibleBlock.weights`, any floating dtype.

    Returns:
        (B, C, H, W), dtype and layout of ``x``. Differentiable in ``x`` and the weights; only the
        input is saved for the backward, and with the CUDA kernels, for a gradient in ``x`` alone,
        the slopes of the activations as bits and the scale exp(r), 352 bytes a pixel for 128
        channels in float32 (with a 1x1 mix z1 besides, 608).
    """
    _check_block("x", x, weights, (1, 3))
    chosen, tensors = current_backend(backend), weights.tensors()
    options = (weights.activation, weights.subnet, weights.clamp)
    keep = ops.coupling.keeps_state(x, tensors, chosen)
    grade = product_precision(precision, x.device.type)
    return ops.coupling.coupling(x, tensors, *options, keep, chosen, grade)[0]


def invertible_block_inverse(
    y: Tensor, weights: BlockWeights, *, backend: str | None = None
) -> Tensor:
    """The inverse of :func:`invertible_block`.

    Args:
        y: features, (B, C, H, W) with an even C.
        weights: the weights that produced ``y``; ``mix`` must be an invertible matrix.

    Returns:
        (B, C, H, W), dtype and layout of ``y``. In float32 a block with an orthogonal mix
        reconstructs to about 1e-6; errors grow with depth.

    Raises:
        torch.linalg.LinAlgError: ``weights.mix_weight`` is singular. (The Triton and CUDA kernels
            give NaN or infinities instead: a check would make the host wait for the GPU.)
    """
    _check_block("y", y, weights, (1,))
    options = (weights.activation, weights.subnet, weights.clamp, current_backend(backend))
    return ops.coupling.coupling_inverse(y, weights.tensors(), *options)


def channel_entropy(x: Tensor, bins: int = 256, *, backend: str | None = None) -> Tensor:
    """Normalised histogram entropy of every feature map (MGHF, AWDFE).

    Args:
        x: features, (B, C, H, W).
        bins: number of equal bins over each map's own [min, max], 2 to 2^24.

    Returns:
        (B, C), between 0 and 1, float32 (float64 for float64 input): 0 for a constant map, NaN for
        a map that holds a NaN or an infinity. No gradient.
    """
    check.check_tensor("x", x, "(B, C, H, W)")
    bins = _options.bins_of(bins)
    return ops.entropy.entropy(x.detach(), bins, current_backend(backend))


def gram_matrix(
    x: Tensor,
    normalize: bool = True,
    *,
    backend: str | None = None,
    precision: str = "auto",
) -> Tensor:
    """Gram matrix of the feature maps of each image.

    Args:
        x: features, (B, C, H, W).
        normalize: divide by C * H * W.

    Returns:
        (B, C, C), float32 (float64 for float64 input; half-precision sums would overflow).
    """
    check.check_tensor("x", x, "(B, C, H, W)")
    size = check.check_integer("x", x.shape[1] * x.shape[2] * x.shape[3], 1)
    scale = 1.0 / size if normalize else 1.0
    grade = product_precision(precision, x.device.type)
    return ops.gram.gram(x, scale, current_backend(backend), grade)


class ContentStyleTerms(NamedTuple):
    """The four terms of :func:`content_style_terms`, each (B,)."""

    naive: Tensor
    mse: Tensor
    correlation: Tensor
    gram: Tensor


def _feature_pair(gt: Tensor, sr: Tensor) -> tuple[Tensor, Tensor]:
    """Checks the pair; returns it in one dtype, gt detached."""
    check.check_tensor("gt", gt, "(B, C, H, W)")
    check.check_tensor("sr", sr, "(B, C, H, W)")
    check.check_pair("gt", gt, "sr", sr)
    check.check_order("sr", sr, "gt", gt)
    return check.promoted(gt.detach(), sr)


def content_style_terms(
    *,
    gt: Tensor,
    sr: Tensor,
    top_m: int | None = None,
    alpha: float = 1.1,
    gamma: float = 2**0.5,
    bins: int = 256,
    gram: str = "channel",
    backend: str | None = None,
    precision: str = "auto",
) -> ContentStyleTerms:
    """MGHF-n and the three content-style terms of a pair of feature stacks (MGHF eqs. 3 to 7).

    Maps are weighted by w = (1 + alpha I)^gamma, where the importance I is one minus the mean
    channel entropy of the two images' map; the last three terms use the ``top_m`` most important
    maps of each image. Weights and selection are constants under autograd.

    Args:
        gt: features of the ground truth, (B, C, H, W). Gets no gradient.
        sr: features of the super-resolved image, same shape.
        top_m: kept maps M, 1 to C; default C // 2 (at least 1).
        alpha: slope of the weight, above -1.
        gamma: exponent of the weight.
        bins: histogram bins of the entropy, 2 to 2^24.
        gram: ``"channel"``, M x M Gram matrices of the maps, or ``"map"``, eq. 7 taken literally:
            the H x H Gram matrix of each map.

    Returns:
        ``naive``: mean squared difference of all C maps; ``mse``: the same for the kept maps,
        weighted; ``correlation``: one minus their mean Pearson correlation, 0 to 2; ``gram``:
        squared difference of the weighted Gram matrices over M. Each (B,), float32 (float64 for
        float64).
    """
    gt, sr = _feature_pair(gt, sr)
    channels = check.check_integer("channels", sr.shape[1], 1)
    top_m = max(channels // 2, 1) if top_m is None else top_m
    kept, alpha, gamma, bins = _options.style(top_m, alpha, gamma, bins, gram, channels)
    assert kept is not None
    terms = ops.content_style.content_style(
        gt,
        sr,
        kept,
        alpha,
        gamma,
        bins,
        gram,
        current_backend(backend),
        product_precision(precision, sr.device.type),
    )
    return ContentStyleTerms(*terms[:4])


def naive_term(*, gt: Tensor, sr: Tensor, backend: str | None = None) -> Tensor:
    """MGHF-n of a pair of feature stacks, mean (sr - gt)^2 (MGHF eq. 2), alone: the ``naive`` of
    :func:`content_style_terms` without the sweeps of the other terms.

    Args:
        gt: features of the ground truth, (B, C, H, W). Gets no gradient.
        sr: features of the super-resolved image, same shape.

    Returns:
        (B,), float32 (float64 for float64). Only the arguments are saved for the backward.
    """
    gt, sr = _feature_pair(gt, sr)
    naive: Tensor = ops.content_style.content_style(
        gt, sr, 0, 1.0, 1.0, 2, "channel", current_backend(backend)
    )[0]
    return naive


def _check_patches(
    x: Tensor, parameters: tuple[Tensor, Tensor, Tensor, Tensor], patch_size: int, stride: int
) -> tuple[int, int]:
    """Checks all arguments; returns patch size and stride."""
    weight1, bias1, weight2, bias2 = parameters
    check.check_tensor("x", x, "(B, C, H, W)")
    patch_size = check.check_integer("patch_size", patch_size, 1)
    stride = check.check_integer("stride", stride, 1)
    check.check_tensor("weight1", weight1, "(hidden, patch_size ** 2)")
    check.check_tensor("bias1", bias1, "(hidden)")
    check.check_tensor("weight2", weight2, "(D, hidden)")
    check.check_tensor("bias2", bias2, "(D)")
    hidden, dimension = weight1.shape[0], weight2.shape[0]
    got = (tuple(weight1.shape), tuple(bias1.shape), tuple(weight2.shape), tuple(bias2.shape))
    expected = ((hidden, patch_size**2), (hidden,), (dimension, hidden), (dimension,))
    if got != expected:
        raise ValueError(
            f"weight1, bias1, weight2, bias2 must have shapes {expected} for patch_size "
            f"{patch_size}, got {got}"
        )
    check.check_device("x", x, "weight1", weight1)
    if min(x.shape[2:]) < patch_size:
        raise ValueError(
            f"x must be at least patch_size = {patch_size} pixels high and wide, got "
            f"{x.shape[2]} x {x.shape[3]}"
        )
    return patch_size, stride


def patch_projection(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    patch_size: int = 32,
    stride: int = 24,
    backend: str | None = None,
    precision: str = "auto",
) -> Tensor:
    """Unit embeddings of the patches of every feature map: Linear, ReLU, Linear, normalise.

    Args:
        x: features, (B, C, H, W), with H and W at least ``patch_size``.
        weight1: (hidden, patch_size ** 2); ``bias1``: (hidden,).
        weight2: (D, hidden); ``bias2``: (D,).
        patch_size: side of a patch in pixels.
        stride: distance between patches in pixels.

    Returns:
        (B * C, N, D) in float32 (float64 for a float64 ``x``), N = ((H - patch_size) // stride + 1)
        times the same for W, patches in row-major order; rows have length 1 (y / (|y| + 1e-7)).
    """
    parameters = (weight1, bias1, weight2, bias2)
    sizes = _check_patches(x, parameters, patch_size, stride)
    grade = product_precision(precision, x.device.type)
    return ops.patches.patches(x, *parameters, *sizes, current_backend(backend), grade)[0]


def sinkhorn_plan(
    similarity: Tensor,
    *,
    cost: str = "hard",
    epsilon: float = 1.0,
    iterations: int = 50,
    tolerance: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Entropic optimal transport plan between patches (MGHF eqs. 13 to 16, MoNCE).

    Args:
        similarity: (B, N, N), rows are queries and columns keys; finite, in [-1, 1] like cosines
            (-inf for a forbidden pair is not supported: the result depends on the backend).
        cost: ``"hard"`` sends mass to similar pairs, ``"easy"`` to dissimilar ones, ``"exp"``
            minimises the papers' cost exp(s).
        epsilon: entropic regularisation, above 0. From 0.005 up the plan of unit vectors is finite.
        iterations: Sinkhorn iterations, each the row then the column scaling.
        tolerance: a matrix stops early once its largest row-marginal error is at most this;
            ``None`` runs every iteration.

    Returns:
        (B, N, N) with diagonal 0; columns sum to 1, rows approximately (:func:`marginal_error`
        measures it). N = 1 gives 0. Differentiable through every iteration.
    """
    check.check_tensor("similarity", similarity, "(B, N, N)")
    if similarity.shape[1] != similarity.shape[2]:
        raise ValueError(f"similarity must have shape (B, N, N), got {tuple(similarity.shape)}")
    check.check_choice("cost", cost, vocabulary.COSTS)
    epsilon = check.check_number("epsilon", epsilon, positive=True)
    iterations = check.check_integer("iterations", iterations, 1)
    if tolerance is not None:
        tolerance = float(check.check_number("tolerance", tolerance, positive=True))
    return ops.sinkhorn.sinkhorn(
        similarity, cost, float(epsilon), iterations, tolerance, current_backend(backend)
    )


def marginal_error(plan: Tensor) -> Tensor:
    """Convergence residual of a transport plan: its largest row or column sum error.

    Args:
        plan: (B, N, N), from :func:`sinkhorn_plan`.

    Returns:
        (B,), float32 (float64 for float64): the largest distance of a row's or column's sum from 1.
    """
    check.check_tensor("plan", plan, "(B, N, N)", tangents=True)
    plan = plan.double() if plan.dtype == torch.float64 else plan.float()
    rows, columns = (plan.sum(2) - 1).abs(), (plan.sum(1) - 1).abs()
    return torch.maximum(rows.amax(1), columns.amax(1))


def _embedding_pair(query: Tensor, key: Tensor, *, tangents: bool) -> tuple[Tensor, Tensor]:
    """Checks the pair; returns it in one dtype, the key detached."""
    check.check_tensor("query", query, "(B, N, D)", tangents=tangents)
    check.check_tensor("key", key, "(B, N, D)", tangents=tangents)
    check.check_pair("query", query, "key", key)
    check.check_order("query", query, "key", key)
    return check.promoted(query, key.detach())


def monce_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float = 0.07,
    epsilon: float = 1.0,
    iterations: int = 50,
    negative_weight: float = 1.0,
    cost: str = "hard",
    plan_gradient: str = "exact",
    reduction: str = "mean",
    backend: str | None = None,
    precision: str = "auto",
) -> Tensor:
    """Patch contrastive loss whose negatives are weighted by a transport plan (MGHF eq. 8, MoNCE).

    Args:
        query: embeddings of the SR patches, (B, N, D), unit rows.
        key: embeddings of the GT patches, same shape; patch i of both is the positive pair. Gets no
            gradient.
        temperature: tau, the temperature of the contrast.
        epsilon: entropic regularisation of the plan.
        iterations: Sinkhorn iterations.
        negative_weight: Q, the weight of all negatives together.
        cost: as in :func:`sinkhorn_plan`.
        plan_gradient: ``"exact"`` differentiates through the plan, ``"detach"`` holds it constant.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over images and patches.

    Returns:
        A scalar, or (B, N) for ``"none"``; float32 (float64 for float64), never negative. A single
        patch (N = 1) has no negatives and loss 0.
    """
    query, key = _embedding_pair(query, key, tangents=False)
    check.check_number("temperature", temperature, positive=True)
    check.check_choice("reduction", reduction, REDUCTIONS)
    epsilon = check.check_number("epsilon", epsilon, positive=True)
    iterations = check.check_integer("iterations", iterations, 1)
    negative_weight = check.check_number("negative_weight", negative_weight, positive=True)
    check.check_choice("cost", cost, vocabulary.COSTS)
    check.check_choice("plan_gradient", plan_gradient, vocabulary.PLAN_GRADIENTS)
    losses, _ = ops.monce.monce(
        query,
        key,
        float(temperature),
        float(epsilon),
        iterations,
        float(negative_weight),
        cost,
        plan_gradient,
        current_backend(backend),
        product_precision(precision, query.device.type),
    )
    return _reduce(losses, reduction)


def patch_nce_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float = 0.07,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Patch contrastive loss with equal negatives (CUT): :func:`monce_loss` with plan 1 / (N - 1).

    Args and returns as in :func:`monce_loss`. It has no kernel of its own and runs in PyTorch
    whatever the backend.
    """
    query, key = _embedding_pair(query, key, tangents=True)
    check.check_number("temperature", temperature, positive=True)
    check.check_choice("reduction", reduction, REDUCTIONS)
    current_backend(backend)
    return _reduce(ops.monce.patch_nce(query, key, float(temperature)), reduction)


def dec_loss(
    sr: Tensor,
    gt: Tensor,
    *,
    patch_size: int = 8,
    threshold_db: float = 34.0,
    temperatures: tuple[float, float] = (0.5, 1.5),
    temperature: str = "inside",
    similarity: str = "rmse",
    max_value: float = 1.0,
    norm_floor: float | None = None,
    gather: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Detail-enhanced contrastive loss between image patches (DECLoss eqs. 37 to 42).

    Args:
        sr: super-resolved images, (B, 3, H, W) (any number of channels).
        gt: ground truth, same shape. Gets no gradient.
        patch_size: side of the non-overlapping patches in pixels; H and W must be multiples.
        threshold_db: GT patches at least this similar (PSNR, dB) are positives of each other.
        temperatures: the temperature of positives and that of negatives.
        temperature: ``"inside"`` the exponential; ``"outside"`` as printed in the paper, where the
            temperatures change the value but not the gradient.
        similarity: ``"rmse"`` for a true PSNR, ``"l2"`` for the printed norm.
        max_value: the images' peak value (2 for images in [-1, 1]).
        norm_floor: minimum norm by which a flattened patch is divided, above 0. Default 0.02
            ``max_value`` sqrt(C patch_size^2), the norm of a uniform grey of 5 of 255; 1e-8 is the
            literal reading, with which a black patch has a gradient hundreds of times the usual.
        gather: contrast the patches of all ranks of the default process group (every rank gets the
            loss of the whole batch; DistributedDataParallel's mean is the whole batch's gradient);
            the same as ``False`` without an initialised group. Ranks may have unequal batches.

    Returns:
        A scalar, float32 (float64 for float64). Patches without a negative are left out; if none is
        left, 0 with gradient 0. There is no value per image: an image's patches are contrasted with
        the whole batch's, so its share depends on the images beside it.
    """
    check.check_tensor("sr", sr, "(B, 3, H, W)")
    check.check_tensor("gt", gt, "(B, 3, H, W)")
    check.check_pair("sr", sr, "gt", gt)
    check.check_order("sr", sr, "gt", gt)
    sr, gt = check.promoted(sr, gt.detach())
    patch_size, threshold_db, (of_positives, of_negatives), max_value, norm_floor = _options.dec(
        patch_size, threshold_db, temperatures, temperature, similarity, max_value, norm_floor
    )
    if sr.shape[2] % patch_size or sr.shape[3] % patch_size:
        raise ValueError(
            f"sr must be a multiple of patch_size = {patch_size} pixels high and wide, got "
            f"{sr.shape[2]} x {sr.shape[3]}"
        )
    sr_patches, gt_patches = _flat_patches(sr, patch_size), _flat_patches(gt, patch_size)
    if norm_floor is None:
        depth = check.check_integer("sr", sr_patches.shape[1], 1)
        norm_floor = vocabulary.RMS_FLOOR * max_value * depth**0.5
    norm_floor = max(norm_floor, torch.finfo(torch.float32).tiny)
    if gather:
        sr_patches, gt_patches = gather_rows(sr_patches), gather_rows(gt_patches)
    loss, _ = ops.dec.dec(
        sr_patches,
        gt_patches,
        threshold_db,
        of_positives,
        of_negatives,
        temperature,
        similarity,
        max_value,
        float(norm_floor),
        current_backend(backend),
    )
    return loss


def _flat_patches(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (patches of the whole batch, C * size * size)."""
    b, c, h, w = x.shape
    tiles = x.reshape(b, c, h // size, size, w // size, size)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, c * size * size)


def js_divergence_loss(
    p: Tensor, q: Tensor, *, reduction: str = "mean", backend: str | None = None
) -> Tensor:
    """Jensen-Shannon divergence between the softmaxes of two embeddings (HF-Diff section 3.3).

    (KL(p | m) + KL(q | m)) / 2 of the softmaxes, m = (p + q) / 2 their mean.

    Args:
        p: embeddings, (B, D) or (B, T, D); the softmax is over D.
        q: embeddings of the other image, same shape. Both get a gradient.
        reduction: ``"mean"`` over B (and T), or ``"none"``: one value per image, the mean over T.

    Returns:
        A scalar, or (B,), in nats, 0 to ln 2, float32 (float64 for float64). An embedding with an
        infinity has no softmax and gives NaN. It has no kernel of its own and runs in PyTorch
        whatever the backend.
    """
    shape = "(B, T, D)" if isinstance(p, Tensor) and p.dim() == 3 else "(B, D)"
    check.check_tensor("p", p, shape, tangents=True)
    check.check_tensor("q", q, shape, tangents=True)
    check.check_pair("p", p, "q", q)
    check.check_choice("reduction", reduction, ("mean", "none"))
    p, q = check.promoted(p, q)
    current_backend(backend)
    dtype = accumulation_dtype(p.dtype)
    log_p, log_q = F.log_softmax(p.to(dtype), -1), F.log_softmax(q.to(dtype), -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergence = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    each = divergence.sum(-1)
    return 0.5 * (each.mean() if reduction == "mean" else each.view(len(p), -1).mean(1))
