"""A UNet's layers on INT8 kernels: which of them, their weights, and norms that quantize for them."""
