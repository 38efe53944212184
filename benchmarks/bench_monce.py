"""The patch contrast with its transport plan (at 512 x 512: 128 x 441 x 64), exact plan gradient.

Two eager forms: the log-domain reference, and the exponential domain unrolled under autograd.
"""

import torch
from torch import Tensor

from benchmarks.bench_sinkhorn import ITERATIONS, exponential_domain
from benchmarks.cases import PAPER, Form, embeddings, measured, standard_forms
from mghf_fast import functional
from mghf_fast.reference import monce

TEMPERATURE = 0.07


def reference(query: Tensor, key: Tensor) -> Tensor:
    return monce.monce(query, key, TEMPERATURE, 1.0, ITERATIONS, 1.0, "hard", "exact").mean()


def unrolled(query: Tensor, key: Tensor) -> Tensor:
    similarity = query @ key.mT
    contrast = torch.exp(similarity / TEMPERATURE)
    negatives = (exponential_domain(similarity) * contrast).sum(2) * (query.shape[1] - 1)
    positives = contrast.diagonal(dim1=1, dim2=2)
    return -torch.log(positives / (positives + negatives)).mean()


FORMS = standard_forms(
    functional.monce_loss,
    reference,
    images=False,
    compiled=(PAPER,),
    compiled_parts=["step"],
    graded=True,
) | {"eager exponential domain": Form(lambda: unrolled, "eager")}

test_monce = measured("monce", __name__, embeddings, FORMS, ops=("sinkhorn", "monce"))
