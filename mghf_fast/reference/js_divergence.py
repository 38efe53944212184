"""Jensen-Shannon divergence of two embeddings (HF-Diff section 3.3).

p = softmax(p_raw), q = softmax(q_raw) over the feature axis,   m = (p + q) / 2
JS = (KL(p | m) + KL(q | m)) / 2,   in nats, between 0 and ln 2
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import accumulation_dtype


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """(..., D) x 2 -> (...), in float32 (float64 for float64)."""
    dtype = accumulation_dtype(p.dtype)
    log_p, log_q = F.log_softmax(p.to(dtype), -1), F.log_softmax(q.to(dtype), -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
