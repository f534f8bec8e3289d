"""The definition of ``attention``, through torch's own fused op."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """See :func:`catimage_accel.kernels.attention`."""
    # torch wants (batch, heads, sequence, head_dim); transposed views cost no copy.
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)
