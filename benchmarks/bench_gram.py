"""Gram matrices of 128 feature maps."""

from torch import Tensor

from benchmarks.cases import features, measured, standard_forms
from mghf_fast import functional
from mghf_fast.commands.table5.workloads import CHANNELS
from mghf_fast.reference import gram


def reference(x: Tensor) -> Tensor:
    return gram.gram_matrix(x, 1 / x[0].numel())


test_gram = measured(
    "gram",
    __name__,
    lambda shape: (features(shape),),
    standard_forms(functional.gram_matrix, reference, graded=True),
    output=lambda shape: (shape.batch, CHANNELS, CHANNELS),
)
