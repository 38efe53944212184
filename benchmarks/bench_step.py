"""A whole loss step, MGHF-c and MGHF-n, and the VGG-16 perceptual loss that it is to replace."""

import functools

import torch

from benchmarks.cases import COMPILED, PAPER, QUICK, SIZES, TRAINING, Form, Shape, measured
from mghf_fast import MGHFLoss
from mghf_fast.commands.table5.workloads import (
    VGG16Perceptual,
    image_pair,
    paper_extractor,
    reference_mghf,
)

HALF = (QUICK, PAPER, TRAINING)


def forms(variant: str, compiled: tuple[Shape, ...]) -> dict[str, Form]:
    reference = functools.partial(reference_mghf, variant)

    def graded(precision: str) -> MGHFLoss:
        return MGHFLoss(variant, "2026", paper_extractor(), precision=precision)

    return {
        "mghf_fast": Form(functools.partial(graded, "auto"), "ours", graded=graded),
        "eager": Form(reference, "eager"),
        "eager channels_last": Form(
            reference, "eager", channels_last=True, shapes=(*SIZES[:4], TRAINING)
        ),
        "compile": Form(reference, "compile", compiled=True, shapes=compiled),
        "mghf_fast bfloat16": Form(
            lambda: MGHFLoss(variant, "2026", paper_extractor()).to(torch.bfloat16),
            "ours",
            dtype="bfloat16",
            shapes=HALF,
        ),
    }


def vgg16_channels_last() -> VGG16Perceptual:
    loss = VGG16Perceptual()
    loss.features.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return loss


VGG16 = {
    "VGG-16": Form(VGG16Perceptual, "peer"),
    "VGG-16 channels_last": Form(vgg16_channels_last, "peer", channels_last=True),
    "VGG-16 compile": Form(VGG16Perceptual, "peer", compiled=True, shapes=COMPILED),
}
ALL_TERMS = ("coupling", "content_style", "patches", "sinkhorn", "monce")


def images(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    return image_pair(shape.size, shape.batch)


test_mghf_c = measured(
    "mghf_c", __name__, images, forms("c", COMPILED) | VGG16, parts=["step"], ops=ALL_TERMS
)
test_mghf_n = measured(
    "mghf_n", __name__, images, forms("n", COMPILED), parts=["step"], ops=("coupling",)
)
