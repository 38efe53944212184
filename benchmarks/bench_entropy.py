"""Histogram entropy of 128 feature maps; it has no gradient."""

from torch import Tensor

from benchmarks.cases import features, measured, standard_forms
from mghf_fast import functional
from mghf_fast.reference import entropy


def reference(x: Tensor) -> Tensor:
    return entropy.channel_entropy(x, 256)


test_entropy = measured(
    "entropy",
    __name__,
    lambda shape: (features(shape),),
    standard_forms(functional.channel_entropy, reference),
    parts=["forward"],
)
