"""A step of :class:`MGHFLoss` in two autograd nodes, for calls that nothing traces.

Composed of operators, a step costs milliseconds of Python, more than its kernels take on a GPU. The
nodes here call the chosen backends directly: :class:`_Extract` maps the images to their features,
:class:`_Compare` the features to the terms and the total. There are two so that the features are
released before the blocks are differentiated. A node owns the gradient that it allocates, and may
add to it in place.

Backends are chosen, and frozen weights folded and packed, once per size, type and device. Second
derivatives, gradients with a batch dimension, torch.compile, torch.export, torch.jit.trace and
dispatch modes use the loss composed of operators instead.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import _checks as check
from .. import ops
from ..backends import current_backend
from ..nn import DetailFeatureExtractor, PatchProjection
from ..nn.detail_feature_extractor import InvertibleBlock
from ..nn.stems import SqueezeStem
from ..ops._batching import is_batched
from ..ops._dispatch import Implementation, epoch
from ..ops.vocabulary import PackedWeights
from ..precision import accumulation_dtype, product_precision
from .settings import factors

if TYPE_CHECKING:
    from .mghf import MGHFLoss

TOGETHER = 1 << 20
"""On the CPU, up to so many elements in a stack of features both images go through the blocks as
one batch: half of the calls, at the price of copying the images and saving the blocks' inputs for
gt."""
TOGETHER_BYTES = 256 << 20
"""Elsewhere they do if what the blocks need for both, see :func:`_go_together`, is at most this:
half of the launches, and little enough not to set the peak of a step of 512 x 512."""

MOST_PLANS = 16

Again = Callable[..., Sequence[Tensor]]
"""Computes a node's outputs by the library's operators."""


def applies(sr: Tensor, gt: Tensor) -> bool:
    """Whether these are ordinary tensors with storage, not subject to tracing or transforms."""
    plain = (Tensor, nn.Parameter)
    return (
        not torch.compiler.is_compiling()
        and type(sr) in plain
        and type(gt) in plain
        and sr.device.type in ("cpu", "cuda")
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not check.is_traced()
    )


def _capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which rules out making a plan: that copies numbers to
    the GPU, and a kernel's trial waits for it."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _version(x: Tensor) -> int:
    """How often a tensor was changed in place. PyTorch does not count it in inference mode."""
    return -1 if x.is_inference() else x._version


class _Weights:
    """Identifies the tensors, and their versions, for which a plan was made."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._slots = [
            (held, name, tensor, _version(tensor))
            for module in self._modules
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]
        self._hooks = [
            hooks
            for module in self._modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]

    def are_current(self) -> bool:
        for held, name, tensor, version in self._slots:
            if held.get(name) is not tensor or _version(tensor) != version:
                return False
        return not any(self._hooks)


@dataclasses.dataclass
class _Extraction:
    """A frozen extractor for images of one size."""

    weights: _Weights
    squeeze: SqueezeStem | None
    blocks: list[tuple[PackedWeights, tuple[Any, ...]]]
    """Each block's weights, and its activation, sub-network and clamp. The first has the stem
    folded into it, with a squeeze also the range."""
    coupling: Implementation
    together: bool
    dtype: torch.dtype
    precision: str
    from_unit_range: bool
    """Whether images are mapped from [0, 1] to [-1, 1] before the first block."""

    def prepared(self, images: Sequence[Tensor]) -> Tensor:
        """The images, concatenated, in the form that the first block takes."""
        if self.squeeze is not None:
            return self.squeeze.squeezed(images, self.dtype)
        x = images[0].to(self.dtype)
        if len(images) > 1:
            x = torch.cat((x, images[1].to(self.dtype)))
        if self.from_unit_range:
            x = x * 2 - 1
        return x.contiguous(memory_format=torch.channels_last) if _on_cpu(x) else x

    def features(self, images: Sequence[Tensor], inputs: list[Tensor] | None) -> Tensor:
        """Features of the concatenated images. Appends each block's input to ``inputs``, and what
        the block keeps for its gradient."""
        x = self.prepared(images)
        for weights, options in self.blocks:
            given = x
            keep = inputs is not None
            x, state = self.coupling.forward(x, weights, *options, keep, self.precision)
            if inputs is not None:
                inputs += (given, state)
        return x

    def gradient(self, grad: Tensor, inputs: list[Tensor], sr: Tensor) -> Tensor:
        """The gradient in the image from that in its features. Empties ``inputs``."""
        for weights, options in reversed(self.blocks):
            state, x = inputs.pop(), inputs.pop()
            chosen = (False, self.precision)
            grad = self.coupling.backward(grad, x, weights, state, *options, *chosen)[0]
            del state, x
        if self.squeeze is not None:
            return self.squeeze.unsqueezed(grad, sr)
        return (grad * 2 if self.from_unit_range else grad).to(sr.dtype)


def _keeps_graph() -> bool:
    """Whether the running backward retains the graph for another one."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


def _taken(ctx: Any) -> list[Tensor]:
    """The tensors that a node has saved besides autograd's. Unless the graph is retained, the node
    drops its references, so that the caller frees each tensor once it is no longer needed."""
    kept: list[Tensor] = ctx.kept
    if _keeps_graph():
        return list(kept)
    ctx.kept = []
    return kept


class _Extract(torch.autograd.Function):
    """Images -> features of both; differentiable in the first image."""

    @staticmethod
    def forward(
        ctx: Any, sr: Tensor, gt: Tensor, plan: _Extraction, differentiated: bool, again: Again
    ) -> tuple[Tensor, Tensor]:
        inputs: list[Tensor] | None = [] if differentiated else None
        if plan.together:
            both, count = plan.features((sr, gt), inputs), sr.shape[0]
            sr_features, gt_features = both[:count], both[count:]
            inputs = [x[:count] for x in inputs or ()]
        else:
            gt_features = plan.features((gt,), None)
            sr_features = plan.features((sr,), inputs)
        ctx.mark_non_differentiable(gt_features)
        if differentiated:
            ctx.save_for_backward(sr)
            ctx.set_materialize_grads(False)  # of gt's features it would be a stack of zeros
            ctx.plan, ctx.again, ctx.kept = plan, again, inputs
        return sr_features, gt_features

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        (sr,) = ctx.saved_tensors
        if grads[0] is None:
            return (None,) * 5
        if torch.is_grad_enabled() or is_batched(grads[0]):
            grad = _differentiated(ctx.again, (sr,), grads[:1])
        else:
            grad = ctx.plan.gradient(grads[0], _taken(ctx), sr)
        return grad, None, None, None, None


@dataclasses.dataclass
class _Comparison:
    """The terms of two stacks of features of one size, and their weights in the total."""

    names: tuple[str, ...]
    """Names of the computed terms: ``naive`` always, and those with a weight."""
    mean: bool
    """Whether the total is the mean over the images."""
    style: Implementation
    style_options: tuple[Any, ...]
    factors: Tensor | None
    """(terms, 1): each term's factor in the total; with ``mean``, divided by the number of images.
    None if the total is ``naive`` itself, or its mean."""
    gradients: Tensor
    """(terms, 1): the gradients in the terms for a gradient of 1 in the total; for ``lip``, that in
    each of the losses over which it is a mean."""
    none: Tensor
    """(B,) zeros: the gradient in a term without a weight."""
    weights: _Weights | None = None
    patches: Implementation | None = None
    patches_options: tuple[Any, ...] = ()
    monce: Implementation | None = None
    monce_options: tuple[Any, ...] = ()


def _embedded(
    sr: Tensor, gt: Tensor, patches: Implementation, options: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings of ``sr``, their state, and the embeddings of ``gt``; from one call if both
    are the halves of one tensor."""
    batch = sr.shape[0]
    # On the device "meta" all data are at the same address, so storages are compared.
    if (
        sr.untyped_storage()._cdata == gt.untyped_storage()._cdata
        and gt.storage_offset() - sr.storage_offset() == batch * sr.stride(0)
        and gt.stride() == sr.stride()
    ):
        both = sr.as_strided((2 * batch, *sr.shape[1:]), sr.stride())
        embeddings, state = patches.forward(both, *options)
        maps = batch * sr.shape[1]
        return embeddings[:maps], state[:, :, :maps], embeddings[maps:]
    query, state = patches.forward(sr, *options)
    return query, state, patches.forward(gt, *options)[0]


class _Compare(torch.autograd.Function):
    """Features -> the total, (B,) or its mean, and the comparison's terms in order, (B,) each."""

    @staticmethod
    def forward(
        ctx: Any,
        sr: Tensor,
        gt: Tensor,
        plan: _Comparison,
        differentiated: bool,
        owned: bool,
        again: Again,
    ) -> tuple[Tensor, ...]:
        """``owned``: nobody else has ``gt``, so that the backward may overwrite it."""
        images = sr.shape[0]
        naive, mse, correlation, gram, *kept = plan.style.forward(gt, sr, *plan.style_options)
        found = {"naive": naive, "csc_mse": mse, "csc_correlation": correlation, "csc_gram": gram}
        if plan.patches is not None and plan.monce is not None:
            query, state, key = _embedded(sr, gt, plan.patches, plan.patches_options)
            losses, iterates = plan.monce.forward(query, key, *plan.monce_options)
            found["lip"] = losses.view(images, -1).mean(1)
            kept += [query, state, key, iterates]
        terms = [found[name] for name in plan.names]
        # If the total is MGHF-n alone, it is another view of the same tensor.
        total = naive.view(-1)
        if plan.factors is not None:
            total = torch.stack(terms) * plan.factors
            total = total.sum() if plan.mean else total.sum(0)
        elif plan.mean:
            total = total.mean() if images > 1 else total.view(())
        if differentiated:
            ctx.save_for_backward(sr)
            ctx.set_materialize_grads(False)
            ctx.plan, ctx.owned, ctx.again, ctx.kept = plan, owned, again, [gt, *kept]
        return total, *terms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        (sr,) = ctx.saved_tensors
        plan: _Comparison = ctx.plan
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * 6
        if torch.is_grad_enabled() or is_batched(*given):
            again = (sr, _taken(ctx)[0])
            return _differentiated(ctx.again, again, grads), *(None,) * 5
        into = {"into": ctx.kept[0]} if ctx.owned and not _keeps_graph() else {}
        gt, *kept = _taken(ctx)
        images = sr.shape[0]
        rows = plan.gradients * grads[0] if grads[0] is not None else 0 * plan.gradients
        rows = rows.expand(-1, images)
        in_terms = dict(zip(plan.names, rows.unbind(), strict=True))
        for name, grad in zip(plan.names, grads[1:], strict=True):
            if grad is not None:
                share = 1.0 if name != "lip" else sr.shape[0] / kept[-4].shape[:2].numel()
                in_terms[name] = in_terms[name] + grad * share
        names = ("naive", "csc_mse", "csc_correlation", "csc_gram")
        of_style = [in_terms.get(name, plan.none) for name in names]
        if plan.patches is None or plan.monce is None:
            options = plan.style_options[-2:]
            grad_sr = plan.style.backward(*of_style, gt, sr, *kept, *options, **into)
            return grad_sr, *(None,) * 5
        *statistics, query, state, key, iterates = kept
        of_losses = in_terms["lip"].view(images, 1, 1)
        of_losses = of_losses.expand(-1, query.shape[0] // images, query.shape[1])
        of_losses = of_losses.reshape(query.shape[:2])
        # First, because it needs the most memory besides the features; its memory is freed
        # afterwards, unless the graph is retained.
        grad_query = plan.monce.backward(of_losses, query, key, iterates, *plan.monce_options)
        del kept, key, iterates, of_losses
        options = plan.style_options[-2:]
        grad_sr = plan.style.backward(*of_style, gt, sr, *statistics, *options, **into)
        del gt, into
        plan.patches.add_backward(grad_sr, grad_query, query, state, sr, *plan.patches_options)
        return grad_sr, *(None,) * 5


def _differentiated(
    again: Again, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Tensor:
    """The gradient in a node's first input, computed by the operators."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs = again(*inputs)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    return torch.autograd.grad(
        [output for output, _ in pairs],
        inputs[:1],
        [grad for _, grad in pairs],
        create_graph=keep,
    )[0]


class Steps:
    """A loss's plans, by size, type and device. Neither copied nor pickled."""

    def __init__(self) -> None:
        self._plans: dict[Any, tuple[nn.Module, Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Steps:
        return Steps()

    def __reduce__(self) -> tuple[type[Steps], tuple[()]]:
        return Steps, ()

    def find(self, key: Any, owner: nn.Module) -> Any:
        """The plan for a key, if it is ``owner``'s: DataParallel's replicas share this object, but
        each has its own extractor."""
        known, plan = self._plans.get(key, (None, None))
        return plan if known is owner else None

    def keep(self, key: Any, owner: nn.Module, plan: Any) -> None:
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        self._plans[key] = owner, plan


def extract(loss: MGHFLoss, sr: Tensor, gt: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The features of images that have been checked, and whether nobody else has them: a module
    that is called may keep its result."""
    backend, dtype = current_backend(loss.backend), loss._likeness.dtype
    precision = product_precision(loss.precision, sr.device.type)
    key = ("extract", backend, precision, epoch(), sr.shape, sr.device, dtype)
    plan: _Extraction | None = loss._steps.find(key, loss.extractor)
    if plan is None or not plan.weights.are_current():
        plan = None if _capturing(sr) else _plan_extraction(loss, sr, backend, precision)
        if plan is not None:
            loss._steps.keep(key, loss.extractor, plan)
    if plan is None or _has_any_global_hook():
        sr, gt = sr.to(dtype), gt.to(dtype)
        with torch.no_grad():
            gt_features = loss._features(gt)
        return loss._features(sr), gt_features, False

    def again(sr: Tensor) -> tuple[Tensor]:
        return (loss._features(sr.to(dtype)),)

    differentiated = torch.is_grad_enabled() and sr.requires_grad
    sr_features, gt_features = _Extract.apply(sr, gt, plan, differentiated, again)
    return sr_features, gt_features, True


def _plan_extraction(
    loss: MGHFLoss, sr: Tensor, backend: str, precision: str
) -> _Extraction | None:
    """A plan, or None if the extractor is of an unsupported kind or refuses the image."""
    extractor = loss.extractor
    if type(extractor) is not DetailFeatureExtractor:
        return None
    stem = extractor.stem
    if not isinstance(stem, (nn.Conv2d, SqueezeStem)) or sr.shape[1] != extractor.in_channels:
        return None
    if min(sr.shape[2:]) < extractor.downscale:
        return None
    squeezes, unit = isinstance(stem, SqueezeStem), loss.input_range == "0,1"
    weights = _Weights(extractor.modules())
    blocks = []
    with torch.no_grad():
        for i, block in enumerate(extractor.blocks):
            assert isinstance(block, InvertibleBlock)
            if block.memory != "recompute":
                return None
            of_block = (
                block.weights_after(stem, from_unit_range=squeezes and unit)
                if i == 0
                else block.weights()
            )
            options = (of_block.activation, of_block.subnet, of_block.clamp)
            blocks.append((PackedWeights(of_block.tensors()), options))
    if not weights.are_current():  # hooks
        return None
    batch, _, height, width = sr.shape
    scale = extractor.downscale
    pixels = -(-height // scale), -(-width // scale)
    elements = batch * extractor.channels * pixels[0] * pixels[1]
    together = _go_together(sr, elements, loss._likeness.dtype, len(blocks))
    first, (_, subnet, _) = blocks[0]
    batch = 2 * batch if together else batch
    x = _of_shape(sr.new_empty(1, dtype=loss._likeness.dtype), batch, first[0].shape[1], *pixels)
    return _Extraction(
        weights=weights,
        squeeze=stem if isinstance(stem, SqueezeStem) else None,
        blocks=blocks,
        coupling=ops.OPS["coupling"].choose(backend, x, *first, subnet=subnet),
        together=together,
        dtype=loss._likeness.dtype,
        precision=precision,
        from_unit_range=unit and not squeezes,
    )


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _go_together(image: Tensor, elements: int, dtype: torch.dtype, blocks: int) -> bool:
    """Whether both images go through the blocks as one batch, given the elements of one image's
    stack of features."""
    if _on_cpu(image):
        return elements <= TOGETHER
    # The inputs of all blocks but the first, the features, and a block's workspace of their size.
    return 2 * (blocks + 1) * elements * dtype.itemsize <= TOGETHER_BYTES


def _of_shape(element: Tensor, *shape: int) -> Tensor:
    """A tensor of this shape for choosing a backend, without memory of that size."""
    return element.expand(shape)


def compare(
    loss: MGHFLoss, sr: Tensor, gt: Tensor, owned: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The reduced total and the weighted terms, (B,) each, of two stacks of features; a backward
    that retains no graph may overwrite ``gt`` if it is ``owned``."""
    backend, style, local = (
        current_backend(loss.backend),
        loss.content_style,
        loss.local_information,
    )
    grade = functools.partial(product_precision, device_type=sr.device.type)
    names = ("naive", *(name for name in loss._active if name != "naive"))
    of_style: tuple[Any, ...] = (0, 1.0, 1.0, 2, "channel", grade(style.precision))
    if len(names) > 1 and names != ("naive", "lip"):
        top_m = max(sr.shape[1] // 2, 1) if style.top_m is None else style.top_m
        of_style = (top_m, float(style.alpha), float(style.gamma), style.bins, style.gram)
        of_style += (grade(style.precision),)
    of_monce = (
        *(float(local.temperature), float(local.epsilon), local.iterations),
        *(float(local.negative_weight), local.cost, local.plan_gradient),
        grade(local.precision),
    )
    sizes = (sr.shape, sr.device, sr.dtype)
    weights = (loss._gammas, style.betas, loss.reduction)
    key = ("compare", backend, epoch(), sizes, names, weights, of_style, of_monce)
    plan: _Comparison | None = loss._steps.find(key, loss.extractor)
    if plan is None or (plan.weights is not None and not plan.weights.are_current()):
        if _capturing(sr):
            return loss._compare(sr, gt)
        plan = _plan_comparison(loss, sr, names, backend, of_style, of_monce)
        loss._steps.keep(key, loss.extractor, plan)

    def again(sr: Tensor, gt: Tensor) -> list[Tensor]:
        total, terms = loss._compare(sr, gt)
        return [total, *(terms[name] for name in names)]

    differentiated = torch.is_grad_enabled() and sr.requires_grad
    total, *terms = _Compare.apply(sr, gt, plan, differentiated, owned, again)
    return total, dict(zip(names, terms, strict=True))


def _plan_comparison(
    loss: MGHFLoss,
    sr: Tensor,
    names: tuple[str, ...],
    backend: str,
    of_style: tuple[Any, ...],
    of_monce: tuple[Any, ...],
) -> _Comparison:
    images, channels = sr.shape[:2]
    weighing = factors(loss._gammas, loss.content_style.betas) if loss.variant == "c" else {}
    weighed = [weighing.get(name, 1.0) for name in names]
    mean = loss.reduction == "mean"
    in_total = [factor / images if mean else factor for factor in weighed]
    into_terms = list(in_total)
    local: dict[str, Any] = {}
    if "lip" in names:
        projection: PatchProjection = loss.local_information._projection(sr)
        side, step = projection.patch_size, projection.stride
        patches = ((sr.shape[2] - side) // step + 1) * ((sr.shape[3] - side) // step + 1)
        into_terms[names.index("lip")] /= channels * patches
        linear = (projection.hidden, projection.output)
        parameters = tuple(t for layer in linear for t in (layer.weight, layer.bias))
        embedding = sr.new_empty(1, dtype=accumulation_dtype(sr.dtype))
        embedding = _of_shape(embedding, images * channels, patches, len(parameters[-1]))
        local = {
            "weights": _Weights(projection.modules()),
            "patches": ops.OPS["patches"].choose(backend, sr, *parameters).for_frozen_weights(),
            "patches_options": (*parameters, side, step, of_monce[-1]),
            "monce": ops.OPS["monce"].choose(backend, embedding, embedding),
            "monce_options": of_monce,
        }
    exact = sr.new_zeros(images, dtype=accumulation_dtype(sr.dtype))
    return _Comparison(
        names=names,
        mean=mean,
        style=ops.OPS["content_style"].choose(backend, sr, sr, gram=of_style[-2]),
        style_options=of_style,
        factors=None if weighed == [1.0] else exact.new_tensor(in_total).unsqueeze(1),
        gradients=exact.new_tensor(into_terms).unsqueeze(1),
        none=exact,
        **local,
    )
