"""Post-training quantization of UNets: scales, fake quantization, and how NVIDIA ModelOpt finds them."""

from catimage_accel.quantize.calibrate import calibrate
from catimage_accel.quantize.fake import FakeQuantizedConv2d, FakeQuantizedLinear, fake_quantized
from catimage_accel.quantize.inputs import UNetInputs
from catimage_accel.quantize.quantization import (
    LayerQuantization,
    Quantization,
    check_checkpoint,
    weights_sha256,
)
from catimage_accel.quantize.recipes import RECIPES
from catimage_accel.quantize.report import QuantizationReport, quantize_unet
from catimage_accel.quantize.sensitivity import keep_sensitive, layer_errors, output_error

__all__ = [
    "RECIPES",
    "FakeQuantizedConv2d",
    "FakeQuantizedLinear",
    "LayerQuantization",
    "Quantization",
    "QuantizationReport",
    "UNetInputs",
    "calibrate",
    "check_checkpoint",
    "fake_quantized",
    "keep_sensitive",
    "layer_errors",
    "output_error",
    "quantize_unet",
    "weights_sha256",
]
