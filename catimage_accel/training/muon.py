"""Muon for processors that imitate bfloat16, where torch's takes most of a training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SHARE_OF_ADAMW = 0.2  # the root mean square of AdamW's updates, which Muon's are scaled to (arXiv 2502.16982)


class Float32Muon(torch.optim.Muon):
    """``torch.optim.Muon`` that orthogonalises in float32, not bfloat16.

    With Nesterov's momentum and updates of AdamW's size, torch's ``adjust_lr_fn="match_rms_adamw"``; its state is
    torch's, so that a checkpoint of either is one of the other.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every matrix with a gradient; what ``closure`` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                buffer = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                update = orthogonal(
                    matrix.grad.lerp(buffer, momentum), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-rate * SHARE_OF_ADAMW * math.sqrt(max(matrix.shape)))
        return loss


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T, by Newton and Schulz's quintic iteration.

    Singular values come to lie between 0.5 and 1.5 (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = coefficients
    wide = matrix.float() if matrix.shape[0] <= matrix.shape[1] else matrix.float().T
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * (gram @ gram)) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
