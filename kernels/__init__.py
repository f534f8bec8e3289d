"""Fused ops of diffusion UNets. Each is a folder: the public op, its validation, its reference and its kernels."""

from catimage_accel.kernels.attention import attention
from catimage_accel.kernels.geglu import geglu
from catimage_accel.kernels.group_norm import group_norm
from catimage_accel.kernels.guided_step import guided_step
from catimage_accel.kernels.int8_conv import int8_conv
from catimage_accel.kernels.int8_linear import int8_linear
from catimage_accel.kernels.int8_quantize import int8_quantize
from catimage_accel.kernels.layer_norm import layer_norm

__all__ = [
    "attention", "geglu", "group_norm", "guided_step", "int8_conv", "int8_linear", "int8_quantize", "layer_norm",
]  # fmt: skip
