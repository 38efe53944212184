"""DINO-v2 as the embedder of :class:`mghf_fast.HFDiffLoss`, from torch.hub, timm or transformers.

    from mghf_fast.integrations import dino
    loss = mghf_fast.HFDiffLoss(embedder=dino.from_timm())

Each lets its library download the weights. Pass a model that is already loaded, or your own, to
:class:`Embedder`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_choice, check_integer, check_tensor

__all__ = ["Embedder", "from_hub", "from_timm", "from_transformers"]

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's pictures in [0, 1], as in DINO-v2's training."""
TOKENS = ("class", "patch")
RANGES = ("0,1", "-1,1")


class Embedder(nn.Module):
    """Images (B, 3, H, W) -> embeddings, by a frozen vision transformer in evaluation mode.

    An image is mapped to [0, 1], normalised by ImageNet's mean and deviation, and resized
    (bilinear, antialiased) to the nearest multiples of the model's patch. Gradients reach it.

    Args:
        model: a DINO-v2 from torch.hub (``forward_features`` returns a dictionary of tokens), a
            vision transformer from timm (it returns one tensor) or from transformers (a call
            returns ``last_hidden_state``). It is frozen and set to evaluation mode, not copied.
        tokens: ``"class"`` for the class token, (B, D), or ``"patch"`` for one embedding per
            patch, (B, T, D).
        input_range: range of the images, ``"0,1"`` or ``"-1,1"``, which is HF-Diff's.
        patch_size: the model's; ``None`` reads it from the model, with a default of 14.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        tokens: str = "class",
        input_range: str = "-1,1",
        patch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_choice("tokens", tokens, TOKENS)
        check_choice("input_range", input_range, RANGES)
        if patch_size is None:
            patch_size = _patch_size(model)
        check_integer("patch_size", patch_size, 1)
        self.tokens, self.input_range, self.patch_size = tokens, input_range, patch_size
        self.model = model
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name, values in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> Embedder:
        """Stays in evaluation mode: with dropout the same image would get another embedding."""
        return super().train(False)

    def prepared(self, image: Tensor) -> Tensor:
        """The model's input for an image."""
        check_tensor("image", image, "(B, 3, H, W)")
        if image.shape[1] != 3:
            raise ValueError(f"image must have 3 channels, got {image.shape[1]}")
        if self.input_range == "-1,1":
            image = (image + 1) / 2
        image = (image - self.mean) / self.deviation
        patch = self.patch_size
        size = [max(round(side / patch), 1) * patch for side in image.shape[2:]]
        if size == list(image.shape[2:]):
            return image
        return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), or (B, T, D) with ``tokens="patch"``.

        Raises:
            TypeError, ValueError: not an image with 3 channels; a model with unknown output.
        """
        x = self.prepared(image)
        forward_features = getattr(self.model, "forward_features", None)
        if callable(forward_features):
            found = forward_features(x)
            if isinstance(found, dict):
                key = "x_norm_clstoken" if self.tokens == "class" else "x_norm_patchtokens"
                return found[key]
            prefix = getattr(self.model, "num_prefix_tokens", 1)
        else:
            found = getattr(self.model(x), "last_hidden_state", None)
            prefix = 1 + getattr(getattr(self.model, "config", None), "num_register_tokens", 0)
        if not isinstance(found, Tensor) or found.dim() != 3:
            raise TypeError(
                f"model must give tokens (B, T, D) as torch.hub, timm or transformers do, got "
                f"{type(found).__name__} of {type(self.model).__name__}"
            )
        return found[:, 0] if self.tokens == "class" else found[:, prefix:]


def from_hub(
    name: str = "dinov2_vits14",
    repository: str = "facebookresearch/dinov2",
    *,
    tokens: str = "class",
    input_range: str = "-1,1",
    **options: Any,
) -> Embedder:
    """DINO-v2 by ``torch.hub.load(repository, name, **options)``."""
    model = torch.hub.load(repository, name, **options)
    return Embedder(model, tokens=tokens, input_range=input_range)


def from_timm(
    name: str = "vit_small_patch14_dinov2.lvd142m",
    *,
    tokens: str = "class",
    input_range: str = "-1,1",
    **options: Any,
) -> Embedder:
    """DINO-v2 by ``timm.create_model``, by default pretrained and for images of any size."""
    import timm

    options = {"pretrained": True, "num_classes": 0, "dynamic_img_size": True, **options}
    model = timm.create_model(name, **options)
    return Embedder(model, tokens=tokens, input_range=input_range)


def from_transformers(
    name: str = "facebook/dinov2-small",
    *,
    tokens: str = "class",
    input_range: str = "-1,1",
    **options: Any,
) -> Embedder:
    """DINO-v2 by ``transformers.AutoModel.from_pretrained(name, **options)``."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(name, **options)
    return Embedder(model, tokens=tokens, input_range=input_range)


def _patch_size(model: nn.Module) -> int:
    for owner in (model, getattr(model, "patch_embed", None), getattr(model, "config", None)):
        size = getattr(owner, "patch_size", None)
        if isinstance(size, (tuple, list)) and size:
            size = size[0]
        if isinstance(size, int):
            return size
    return 14
