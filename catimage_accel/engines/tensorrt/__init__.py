"""TensorRT 10 and 11, and TensorRT-RTX: engines built from ONNX files, and what runs them.

An engine's weights are part of its key, so others (those with a LoRA merged in, for one) are another engine, built when
it is first used. Refitting an engine with new weights is not offered: NVIDIA's notes on TensorRT 11.3 tell of
refittable engines that lose biases without an error, and TensorRT-RTX 1.7 can't build them without a CUDA device.
"""

from catimage_accel.engines.tensorrt.runtime import RUNTIMES, TensorRTRuntime

__all__ = ["RUNTIMES", "TensorRTRuntime"]
