"""The invertible block with frozen weights: forward, and the gradient of its input."""

from torch import Tensor

from benchmarks.cases import features, measured, standard_forms
from mghf_fast import functional
from mghf_fast.commands.table5.workloads import CHANNELS, paper_extractor
from mghf_fast.reference import coupling

(BLOCK,) = paper_extractor().blocks
WEIGHTS = BLOCK.weights()  # type: ignore[operator]


def ours(x: Tensor, precision: str = "auto") -> Tensor:
    return functional.invertible_block(x, WEIGHTS, precision=precision)


def reference(x: Tensor) -> Tensor:
    return coupling.invertible_block(x, WEIGHTS)


test_coupling = measured(
    "coupling",
    __name__,
    lambda shape: (features(shape),),
    standard_forms(ours, reference, graded=True),
    output=lambda shape: (shape.batch, CHANNELS, shape.size, shape.size),
)
