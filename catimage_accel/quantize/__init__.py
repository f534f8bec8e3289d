"""Post-training quantization of UNets: scales, fake quantization, and how NVIDIA ModelOpt finds them."""

from catimage_accel.quantize.fake import FakeQuantizedConv2d, FakeQuantizedLinear, fake_quantized
from catimage_accel.quantize.quantization import LayerQuantization, Quantization, weights_sha256

__all__ = [
    "FakeQuantizedConv2d",
    "FakeQuantizedLinear",
    "LayerQuantization",
    "Quantization",
    "fake_quantized",
    "weights_sha256",
]
