"""``mghf-fast visualize``: its options."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..choices import DEFAULT_PRESET, PRESETS

MAPS, LINKS, WIDTH = 8, 30, 1040


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to ``parser``."""
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="a picture (features, entropies, weights), or the ground truth and a super-resolved "
        "or degraded version of it (also the loss's terms and the transport plan)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("visualize.png"),
        metavar="FILE",
        help="a .png or a self-contained .html (default: %(default)s)",
    )
    parser.add_argument(
        "--extractor",
        metavar="PATH",
        help="a detail feature extractor's .safetensors (default: the one of MGHFLoss)",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=DEFAULT_PRESET,
        help="weights (default: %(default)s)",
    )
    parser.add_argument(
        "--crop",
        type=int,
        nargs=4,
        metavar=("LEFT", "TOP", "WIDTH", "HEIGHT"),
        help="the part to show, pixels (default: all, or the centre 512 x 512)",
    )
    parser.add_argument(
        "--maps",
        type=int,
        default=MAPS,
        metavar="N",
        help="feature maps that are shown, 2 to 64 (default: %(default)s)",
    )
    parser.add_argument(
        "--links",
        type=int,
        default=LINKS,
        metavar="N",
        help="links of the transport plan that are drawn, 1 to 500 (default: %(default)s)",
    )
    parser.add_argument(
        "--width",
        type=int,
        default=WIDTH,
        metavar="N",
        help="width of the drawing, pixels, 600 to 4000 (default: %(default)s)",
    )
    parser.add_argument(
        "--small", action="store_true", help="256 colours: a third of the size, a little banding"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> int:
    """Analyses, draws and writes.

    Raises:
        ValueError, OSError: the user's mistakes, each in a sentence.
    """
    if len(args.images) > 2:
        raise ValueError(f"one or two pictures are shown, got {len(args.images)}")
    for name, value, least, most in (
        ("--maps", args.maps, 2, 64),
        ("--links", args.links, 1, 500),
        ("--width", args.width, 600, 4000),
    ):
        if not least <= value <= most:
            raise ValueError(f"{name} is {value}; allowed are {least} to {most}")

    from ...losses.mghf import downscale_of
    from ...nn import DetailFeatureExtractor
    from . import analysis, figure, files, pictures

    files.check_target(args.out, args.force, args.images)
    shown, crop = pictures.load(args.images, None if args.crop is None else tuple(args.crop))
    extractor = (
        None if args.extractor is None else DetailFeatureExtractor.from_pretrained(args.extractor)
    )
    loss = analysis.make_loss(extractor, args.preset)
    found = analysis.analyse(loss, [picture.image for picture in shown], args.links)
    left, top, width, height = crop
    what = "the default extractor" if args.extractor is None else Path(args.extractor).name
    squeeze = downscale_of(loss.extractor)
    maps = f"{len(found.features[0])} feature maps"
    if squeeze > 1:
        maps += f" at 1/{squeeze} of the resolution"
    text = f"{width} x {height} pixels from ({left}, {top}), {what}, {maps}, preset {args.preset}."
    whom = "it" if len(shown) == 1 else "them"
    title = f"{' and '.join(picture.name for picture in shown)}, as MGHF sees {whom}"
    sections = figure.sections(shown, found, args.maps, args.width)
    files.Document(title, text, sections, args.width, args.small).save(args.out)
    print(f"Written: {args.out}")
    return 0
