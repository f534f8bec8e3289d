"""What a built engine can run on: the names of a device's instruction set, and of the system."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

from catimage_accel.kernels.device import device_name

__all__ = ["bfloat16_arithmetic", "device_key", "int8_weight_bits", "os_key"]

# What compiled code chooses between, as /proc/cpuinfo calls it: x86-64, then AArch64.
_INSTRUCTION_SETS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8", "avx_ne_convert",
    "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "avx10_2",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme",
)  # fmt: skip


def device_key(device: torch.device) -> str:
    """What an engine built for ``device`` depends on.

    "sm_90" for a CUDA device; for the processor "cpu: " with its name and those of its instruction sets that compiled
    code may use.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return " ".join([f"{device.type}: {device_name(device)}", *_instruction_sets()])


def os_key() -> str:
    """The system and its architecture: "linux x86_64"."""
    return f"{platform.system()} {platform.machine()}".lower()


def int8_weight_bits() -> int:
    """How many bits of INT8 weights the processor's libraries add up rightly: 8, or 7 on x86 without VNNI.

    There they add pairs of products in 16 bits (``vpmaddubsw``), where those of large weights with large activations
    saturate. ONNX Runtime and OpenVINO advise seven bits for such processors, and use the instruction all the same.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return 8
    return 8 if {"avx_vnni", "avx512_vnni", "amx_int8", "avx10_2"}.intersection(_instruction_sets()) else 7


def bfloat16_arithmetic() -> bool:
    """Whether the processor multiplies bfloat16 numbers itself; where the system doesn't tell, it is taken not to.

    oneDNN says that it supports them on any AVX-512, where it imitates them several times slower than float32.
    """
    return bool({"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "svebf16"}.intersection(_instruction_sets()))


@cache
def _instruction_sets() -> tuple[str, ...]:
    """Those of ``_INSTRUCTION_SETS`` that the processor has; where the system doesn't tell, the one torch found."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return (torch.backends.cpu.get_cpu_capability().lower(),)
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").partition(":")[2].split()
    return tuple(name for name in _INSTRUCTION_SETS if name in flags)
