"""Normalisations over the fused ops, with what comes right before or after them taken in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from catimage_accel.accelerate.modules import is_hooked, takes_cpu_kernels, takes_kernels
from catimage_accel.kernels import cpu, group_norm, layer_norm
from catimage_accel.kernels.group_norm.layout import suits_cpu_kernel

if cpu.BUILT:  # the op itself: what a public function checks takes as long as a small norm
    from catimage_accel.kernels.group_norm.cpu import group_norm as cpu_group_norm


class FusedGroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` over ``kernels.group_norm``, with the SiLU that follows it where ``activation`` is "silu"."""

    activation: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is (batch, channels, ...)."""
        # A hook that bound this method may outlive ``restore``, which takes the attribute away.
        activation = getattr(self, "activation", None)
        weight = self.weight  # looked up once: a module finds its parameters slowly
        if takes_kernels(x, weight):
            return group_norm(x, self.num_groups, weight, self.bias, self.eps, activation=activation)
        if suits_cpu_kernel(x) and takes_cpu_kernels(x, weight):
            return cpu_group_norm(x, self.num_groups, weight, self.bias, self.eps, activation=activation)
        y = nn.functional.group_norm(x, self.num_groups, weight, self.bias, self.eps)
        return nn.functional.silu(y, inplace=not torch.is_grad_enabled()) if activation == "silu" else y


class FusedSiLU(nn.SiLU):
    """The SiLU of a block whose norms apply it to images: left to do are the block's other inputs (time embedding)."""

    norms_apply_it: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """``x`` has any shape; a 4D one is an image."""
        if x.ndim == 4 and getattr(self, "norms_apply_it", False):
            return x
        return nn.functional.silu(x, inplace=self.inplace)


class FusedLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension by ``kernels.layer_norm``."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is (..., width)."""
        weight = self.weight
        if takes_kernels(x, weight):
            return layer_norm(x, weight, self.bias, self.eps)
        # Without the layer of Python in ``nn.functional``: that is what looking for kernels costs here.
        return torch.layer_norm(x, self.normalized_shape, weight, self.bias, self.eps)


def takes_sums(norm: nn.Module) -> bool:
    """Whether a sum can move into the norm: it is fused, and nobody looks at what goes into it."""
    return type(norm) in (FusedGroupNorm, FusedLayerNorm) and not is_hooked(norm)


def shift_and_norm(norm: nn.Module, x: Tensor, shift: Tensor) -> Tensor:
    """``norm(x + shift)`` for a ``shift`` of (batch, channels)."""
    if isinstance(norm, FusedGroupNorm) and takes_sums(norm) and shift.shape == x.shape[:2]:
        weight = norm.weight
        if takes_kernels(x, shift, weight):
            return group_norm(x, norm.num_groups, weight, norm.bias, norm.eps, activation=norm.activation, shift=shift)
        if suits_cpu_kernel(x) and takes_cpu_kernels(x, shift, weight):
            return cpu_group_norm(
                x, norm.num_groups, weight, norm.bias, norm.eps, activation=norm.activation, shift=shift
            )
    normalised: Tensor = norm(x + shift[:, :, None, None])
    return normalised


def add_and_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """``norm(x + residual)``, and the sum."""
    if (
        isinstance(norm, FusedLayerNorm)
        and takes_kernels(x, residual, norm.weight)
        and takes_sums(norm)
        and x.shape == residual.shape
    ):
        return layer_norm(x, norm.weight, norm.bias, norm.eps, residual=residual)
    total = x + residual
    return norm(total), total
