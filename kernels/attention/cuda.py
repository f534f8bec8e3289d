"""``attention`` by the CUDA kernel of ``csrc/``, as ``torch.ops.catimage_accel_cuda.attention``."""

from __future__ import annotations

import torch
from torch import Tensor

from catimage_accel.kernels.cuda import load

load()


@torch.library.register_fake("catimage_accel_cuda::attention")
def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """See :func:`catimage_accel.kernels.attention`; arguments are validated already."""
    if scale <= 0:  # the kernel's running maximum is that of the scores before they are scaled
        q, scale = (-q, -scale) if scale < 0 else (0 * q, 1.0)
    out: Tensor = torch.ops.catimage_accel_cuda.attention(q, k, v, scale)
    return out
