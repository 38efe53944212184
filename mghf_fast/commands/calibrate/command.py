"""``mghf-fast calibrate``: its options and output. :mod:`mghf_fast.integrations.calibrate` says
what is measured, and why."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from ..choices import DEFAULT_EXTRACTOR, DEFAULT_PRESET, PRESETS, VARIANTS
from ..demo.settings import SCALE

PIXEL_LOSSES = {"l1": "l1_loss", "l2": "mse_loss"}
"""Option -> function of torch.nn.functional."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to ``parser``."""
    parser.add_argument(
        "low",
        type=Path,
        metavar="LR",
        help="a folder of the network's inputs; or of its outputs, which have the truths' size",
    )
    parser.add_argument(
        "high", type=Path, metavar="HR", help="a folder of the ground truths, by the same names"
    )
    parser.add_argument(
        "--network",
        metavar="MODULE:NAME",
        help="called without arguments to make the network (default: the demo's, for pairs of "
        f"scale {SCALE}; for pairs of equal size the gradient in the picture itself)",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="the network's: .safetensors, .pth or .pt"
    )
    parser.add_argument(
        "--ratio",
        type=float,
        default=1.0,
        metavar="X",
        help="wanted ratio of the loss's gradient length to the pixel loss's "
        "(default: %(default)s)",
    )
    parser.add_argument("--variant", choices=VARIANTS, default="c", help="default: %(default)s")
    parser.add_argument(
        "--preset", choices=PRESETS, default=DEFAULT_PRESET, help="default: %(default)s"
    )
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
        ("crop", 128, "side of a crop of the ground truth, pixels: use your training's"),
        ("batch", 4, "crops in a batch: use your training's"),
        ("batches", 8, "number of batches, whose median is reported"),
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
    import torch.nn.functional as F

    from ...integrations._criterion import Criterion
    from ...integrations.calibrate import measure
    from .network import load_weights, make_network
    from .pairs import draw, load

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
    found = measure(loss, network, crops, getattr(F, PIXEL_LOSSES[args.pixel]))

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
        # The weight is that of the median ratio; the median of an even number of weights would be
        # another.
        middle = found.weight(args.ratio) if values is weights else statistics.median(values)
        print(f"{text:<34} {middle:10.4g}   ({min(values):.4g} to {max(values):.4g})")
    print(f"weight: {found.weight(args.ratio):.3g}")
    return 0
