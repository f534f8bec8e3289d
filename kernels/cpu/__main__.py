"""``python -m catimage_accel.kernels.cpu``: builds the library in its place."""

from __future__ import annotations

from catimage_accel.kernels.build import CPU

CPU.build()
