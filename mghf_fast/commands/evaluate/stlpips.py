"""Shift-tolerant LPIPS (Ghildyal and Liu, ECCV 2022), from the weights in ``stlpips_pytorch``.

    d(x, y) = sum over five layers of mean over pixels of  w . (u(x) - u(y))^2,   u = f / |f|

with f a layer's features, |f| their length over the channels of a pixel, and w >= 0 weights tuned
on human judgements. The networks are AlexNet and VGG-16, trained on ImageNet, with each strided
step replaced by one of stride 1 and a blur that downsamples.

Only that package's weight files are read; its code, which does not run, imports torchvision,
IPython and torchsummary, none of which the distance needs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _checks as check

PACKAGE = "stlpips_pytorch"
NETS = ("alex", "vgg")

# A layer list: "relu" and "pool" (a maximum of the given side, at stride 1) are steps; "blur"
# halves the resolution; a number pair is a convolution's kernel and padding. After each "tap" the
# features are compared.
_ALEX = (
    (11, 2), "blur", "relu", "tap",
    "pool3", "blur", (5, 2), "relu", "tap",
    "pool3", "blur", (3, 1), "relu", "tap",
    (3, 1), "relu", "tap",
    (3, 1), "relu", "tap",
)  # fmt: skip
_VGG = (
    (3, 1), "relu", (3, 1), "relu", "tap",
    "pool2", "blur", (3, 1), "relu", (3, 1), "relu", "tap",
    "pool2", "blur", (3, 1), "relu", (3, 1), "relu", (3, 1), "relu", "tap",
    "pool2", "blur", (3, 1), "relu", (3, 1), "relu", (3, 1), "relu", "tap",
    "pool2", "blur", (3, 1), "relu", (3, 1), "relu", (3, 1), "relu", "tap",
)  # fmt: skip
LAYERS = {"alex": _ALEX, "vgg": _VGG}
SMALLEST_SIDE = 48
"""Minimum side of an image in pixels; smaller ones leave the last layers too few to pad."""


def unavailable_reason() -> str | None:
    """Why the distance cannot be computed here, or None."""
    if importlib.util.find_spec(PACKAGE) is None:
        return (
            f"the package {PACKAGE} is not installed, which carries the weights of shift-tolerant "
            f"LPIPS: pip install {PACKAGE}, or pip install 'mghf_fast[evaluate]'"
        )
    return None


def weights_file(net: str) -> Path:
    """The weights of ``net`` in the installed package.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says what to install.
        FileNotFoundError: the installed package lacks the file.
    """
    if (reason := unavailable_reason()) is not None:
        raise ModuleNotFoundError(reason, name=PACKAGE)
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / "weights" / "vST0.0" / f"{net}_shift_tolerant.pth"
    if not path.is_file():
        raise FileNotFoundError(f"{PACKAGE} is installed without {path}")
    return path


class ShiftTolerantLPIPS(nn.Module):
    """Shift-tolerant LPIPS with frozen weights.

    Args:
        net: ``"alex"`` (the usual judge) or ``"vgg"``.

    Raises:
        ModuleNotFoundError: ``stlpips_pytorch`` is not installed.
    """

    shift: Tensor
    scale: Tensor
    blur: Tensor

    def __init__(self, net: str = "alex") -> None:
        super().__init__()
        check.check_choice("net", net, NETS)
        state = torch.load(weights_file(net), map_location="cpu", weights_only=True)
        kernels = [n for n in state if n.startswith("net.") and n.endswith(".weight")]
        self.net, self._layers = net, LAYERS[net]
        self.kernels = nn.ParameterList(state[name] for name in kernels)
        self.biases = nn.ParameterList(state[n.replace(".weight", ".bias")] for n in kernels)
        # These 1x1 convolutions follow dropout only during their tuning.
        self.judgements = nn.ParameterList(state[f"lin{i}.model.1.weight"] for i in range(5))
        self.register_buffer("shift", state["scaling_layer.shift"], persistent=False)
        self.register_buffer("scale", state["scaling_layer.scale"], persistent=False)
        binomial = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("blur", binomial[:, None] * binomial[None] / 16, persistent=False)
        self.requires_grad_(False)

    def features(self, image: Tensor, layers: int = 5) -> list[Tensor]:
        """The features of an image, (B, 3, H, W) in [0, 1], in the first ``layers`` layers."""
        check.check_tensor("image", image, "(B, 3, H, W)")
        if image.shape[1] != 3 or min(image.shape[2:]) < SMALLEST_SIDE:
            raise ValueError(
                f"image must be (B, 3, H, W) with sides of at least {SMALLEST_SIDE} pixels, got "
                f"{tuple(image.shape)}"
            )
        x = (image * 2 - 1 - self.shift) / self.scale
        if x.device.type == "cpu":  # convolutions are 1.7 times as fast in this layout
            x = x.contiguous(memory_format=torch.channels_last)
        taps: list[Tensor] = []
        convolution = 0
        for step in self._layers:
            if step == "relu":
                x = F.relu(x)
            elif step == "tap":
                taps.append(x)
                if len(taps) == layers:
                    break
            elif step == "blur":
                kernel = self.blur.to(x.dtype).expand(x.shape[1], 1, 3, 3)
                x = F.pad(x, (2, 2, 2, 2), mode="reflect")
                x = F.conv2d(x, kernel, stride=2, groups=x.shape[1])
            elif isinstance(step, str):  # pool2 or pool3
                x = F.max_pool2d(x, int(step[-1]), stride=1)
            else:
                weight, bias = self.kernels[convolution], self.biases[convolution]
                x = F.conv2d(x, weight, bias, padding=step[1])
                convolution += 1
        return taps

    def compare(self, sr: list[Tensor], gt: list[Tensor]) -> Tensor:
        """The distance between two images' features, (B,)."""
        total = sr[0].new_zeros(sr[0].shape[0])
        for layer, (s, g) in enumerate(zip(sr, gt, strict=True)):
            s, g = (f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10) for f in (s, g))
            weight = self.judgements[layer].flatten()
            total = total + ((s - g).square().mean((2, 3)) @ weight)
        return total

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """(B, 3, H, W) each, in [0, 1] -> (B,), 0 for equal images; lower is more similar."""
        check.check_pair("sr", sr, "gt", gt)
        return self.compare(self.features(sr), self.features(gt))
