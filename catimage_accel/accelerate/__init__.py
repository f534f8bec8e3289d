"""Swaps the fused kernels into a diffusers pipeline, in place, and back.

Nothing is rebuilt: an attention layer gets another processor, other modules another class. Parameters, hooks, names and
``state_dict`` keys stay the objects they were, so weights loaded, moved or trained meanwhile stay, and what was swapped
can be told from the modules alone, whichever pipelines share them.
"""

from __future__ import annotations

from catimage_accel.accelerate.report import AccelerationReport, acceleration_report
from catimage_accel.accelerate.swap import accelerate, fuse, restore

__all__ = ["AccelerationReport", "accelerate", "acceleration_report", "fuse", "restore"]
