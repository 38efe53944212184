"""``mghf-fast calibrate``: the weight of the loss beside a pixel loss, for a network and a folder
of pairs. What is measured, and why, stands in :mod:`mghf_fast.integrations.calibrate`."""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...losses.mghf import DEFAULT_EXTRACTOR, DEFAULT_PRESET, PRESETS, VARIANTS

PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
SHIPPED_SCALE = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to ``parser``."""
    parser.add_argument(
        "low",
        type=Path,
        metavar="LR",
        help="a folder of the network's inputs; or, of the ground truths' size, of its outputs",
    )
    parser.add_argument(
        "high", type=Path, metavar="HR", help="a folder of the ground truths, by the same names"
    )
    parser.add_argument(
        "--network",
        metavar="MODULE:NAME",
        help="what is called, without arguments, for the network (default: the demo's, if the "
        f"pairs are of scale {SHIPPED_SCALE}; for pairs of one size the gradient in the picture)",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="the network's: .safetensors, .pth or .pt"
    )
    parser.add_argument(
        "--ratio",
        type=float,
        default=1.0,
        metavar="X",
        help="how many times as long as the pixel loss's the gradient shall be "
        "(default: %(default)s)",
    )
    parser.add_argument("--variant", choices=VARIANTS, default="c", help="default: %(default)s")
    parser.add_argument("--preset", choices=tuple(PRESETS), default=DEFAULT_PRESET)
    parser.add_argument(
        "--extractor",
        default=DEFAULT_EXTRACTOR,
        metavar="NAME|PATH",
        help="as MGHFLoss takes it, or a .safetensors (default: %(default)s)",
    )
    parser.add_argument(
        "--pixel", choices=tuple(PIXEL_LOSSES), default="l1", help="default: %(default)s"
    )
    for name, default, text in (
        ("crop", 128, "side of a crop of the ground truth, pixels: take your training's"),
        ("batch", 4, "crops in a batch: take your training's"),
        ("batches", 8, "batches, of which the median is taken"),
        ("seed", 0, "decides the crops"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )


def run(args: argparse.Namespace) -> int:
    """Measures and prints.

    Raises:
        ValueError, OSError: the user's mistakes, each in a sentence.
    """
    from ...integrations._criterion import Criterion
    from ...integrations.calibrate import measure

    for name in ("crop", "batch", "batches"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    if not args.ratio > 0:
        raise ValueError(f"--ratio must be above 0, got {args.ratio:g}")
    pictures, scale = load(args.low, args.high, args.crop)
    name, network = make_network(args.network, scale, args.batch, args.crop)
    if args.weights is not None:
        load_weights(network, args.weights)
    loss = Criterion(args.variant, args.preset, args.extractor)
    crops = draw(pictures, scale, args.crop, args.batch, args.batches, args.seed)
    found = measure(loss, network, crops, PIXEL_LOSSES[args.pixel])

    title, pixel = f"MGHF-{args.variant}", args.pixel.upper()
    settings = args.extractor if args.variant == "n" else f"{args.extractor}, {args.preset}"
    print(f"{title} ({settings}) beside {pixel}, in {name}")
    print(f"{args.batches} batches of {args.batch} crops of {args.crop} pixels, scale {scale}")
    weights = [args.ratio / ratio for ratio in found.ratios]
    for text, values in (
        (f"length of {pixel}'s gradient", found.pixel),
        (f"length of {title}'s, weight 1", found.loss),
        (f"{title} over {pixel}, weight 1", found.ratios),
        ("cosine of the angle between them", found.cosine),
        (f"weight for a ratio of {args.ratio:g}", weights),
    ):
        middle = statistics.median(values)
        print(f"{text:<34} {middle:10.4g}   ({min(values):.4g} to {max(values):.4g})")
    print(f"weight: {found.weight(args.ratio):.3g}")
    return 0


def load(low: Path, high: Path, crop: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """The pairs that have room for a crop, (3, h, w) and (3, H, W) of uint8, and their scale.

    Raises:
        ValueError, OSError: no pairs, sides that are no common multiple, crops that do not fit.
    """
    from ..evaluate.pictures import pair, read

    pairs: list[tuple[Tensor, Tensor]] = []
    scale: int | None = None
    for found in pair(low, high):
        lr, hr = (
            torch.from_numpy(read(path)[0].copy()).permute(2, 0, 1) for path in (found.sr, found.hr)
        )
        here = hr.shape[1] // lr.shape[1]
        if here < 1 or hr.shape[1:] != (here * lr.shape[1], here * lr.shape[2]):
            raise ValueError(
                f"{found.name}: HR must be a whole multiple of LR, got "
                f"{hr.shape[2]} x {hr.shape[1]} for {lr.shape[2]} x {lr.shape[1]}"
            )
        if scale is not None and here != scale:
            raise ValueError(f"every pair must be of one scale; {found.name} is of {here}")
        scale = here
        if min(hr.shape[1:]) >= crop:
            pairs.append((lr, hr))
    assert scale is not None  # pair() gives at least one
    if crop % scale:
        raise ValueError(f"--crop must be a multiple of the scale {scale}, got {crop}")
    if not pairs:
        raise ValueError(f"--crop {crop} fits none of the pictures; take a smaller one")
    return pairs, scale


def draw(
    pairs: list[tuple[Tensor, Tensor]], scale: int, crop: int, batch: int, batches: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of random crops in [0, 1], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    side = crop // scale
    for _ in range(batches):
        lows, highs = [], []
        for _ in range(batch):
            low, high = pairs[below(len(pairs))]
            top, left = (below(size - side + 1) for size in low.shape[1:])
            lows.append(low[:, top : top + side, left : left + side])
            top, left = scale * top, scale * left
            highs.append(high[:, top : top + crop, left : left + crop])
        yield torch.stack(lows) / 255, torch.stack(highs) / 255


class Picture(nn.Module):
    """The picture itself as what is trained: its parameter, of zeros, is added to the input."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = x + self.change
        return changed


def make_network(call: str | None, scale: int, batch: int, crop: int) -> tuple[str, nn.Module]:
    """The network, and what it is called in the report.

    Raises:
        ValueError: it cannot be had from ``call``; or none is named and none ships for the scale.
    """
    if call is None:
        if scale == 1:
            return "the pixels of the pictures", Picture(batch, 3, crop, crop)
        if scale != SHIPPED_SCALE:
            raise ValueError(
                f"the network that ships is for scale {SHIPPED_SCALE}, the pairs are of {scale}: "
                "name yours with --network"
            )
        from ..demo.network import START_NAME, shipped_start

        return f"the parameters of {START_NAME}", shipped_start()
    module, _, name = call.partition(":")
    if not module or not name:
        raise ValueError(f"--network must be MODULE:NAME, got {call!r}")
    sys.path.insert(0, "")  # a module of the current folder, as `python -m` finds it
    try:
        network = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"--network {call}: {error}") from error
    finally:
        sys.path.remove("")
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"--network {call} must give a torch.nn.Module, got {type(network).__name__}"
        )
    return f"the parameters of {call}", network


def load_weights(network: nn.Module, path: Path) -> None:
    """Loads a file's tensors, or those that trainers put under ``params_ema`` or ``params``.

    Raises:
        ValueError: the file is no file of weights, or of another network.
        OSError: the system does not give it.
    """
    with path.open("rb"):  # what the system says of a missing file is clearer
        pass
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for key in ("params_ema", "params", "state_dict"):
                if isinstance(state, dict) and key in state:
                    state = state[key]
                    break
        network.load_state_dict(state)  # type: ignore[arg-type]
    except Exception as error:  # unpicklers and load_state_dict raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--weights {path}: {reason}") from error
