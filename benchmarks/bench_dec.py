"""DECLoss over the 8 x 8 patches of the whole batch; two images of 512 x 512 have 8192."""

import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import SIZES, TRAINING, Shape, measured, standard_forms
from mghf_fast import functional
from mghf_fast.commands.table5.workloads import image_pair
from mghf_fast.ops.vocabulary import RMS_FLOOR
from mghf_fast.reference import dec

LARGE = Shape(2, 512)


def reference(sr: Tensor, gt: Tensor) -> Tensor:
    sr, gt = (F.unfold(x, 8, stride=8).mT.flatten(0, 1) for x in (sr, gt))
    return dec.dec(sr, gt, 34.0, 0.5, 1.5, "inside", "rmse", 1.0, RMS_FLOOR * sr.shape[1] ** 0.5)


test_dec = measured(
    "dec",
    __name__,
    lambda shape: image_pair(shape.size, shape.batch),
    standard_forms(functional.dec_loss, reference, images=False, compiled=(LARGE,)),
    shapes=(*SIZES, LARGE, TRAINING),
)
