"""TensorRT 10 and 11, and TensorRT-RTX: engines built from ONNX files, and what runs them."""

from catimage_accel.engines.tensorrt.runtime import RUNTIMES, TensorRTRuntime

__all__ = ["RUNTIMES", "TensorRTRuntime"]
