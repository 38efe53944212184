"""Projection of the 32 x 32 patches of 128 feature maps to unit embeddings."""

from torch import Tensor

from benchmarks.cases import features, measured, standard_forms
from mghf_fast import functional
from mghf_fast.commands.table5.workloads import CHANNELS, PATCH_SIZE, STRIDE, projection_weights
from mghf_fast.reference import patches

WEIGHTS = projection_weights()


def ours(x: Tensor, precision: str = "auto") -> Tensor:
    return functional.patch_projection(
        x, *WEIGHTS, patch_size=PATCH_SIZE, stride=STRIDE, precision=precision
    )


def reference(x: Tensor) -> Tensor:
    return patches.patch_projection(x, *WEIGHTS, PATCH_SIZE, STRIDE)


test_patches = measured(
    "patches",
    __name__,
    lambda shape: (features(shape),),
    standard_forms(ours, reference, graded=True),
    output=lambda shape: (shape.batch * CHANNELS, shape.patches, 64),
)
