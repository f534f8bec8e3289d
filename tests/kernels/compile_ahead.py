"""Compiles the Triton kernels for real chips and prints, one JSON line each, what they use of a chip.

Runs in a process without TRITON_INTERPRET and needs no GPU: ``python compile_ahead.py {common|rest}``
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from catimage_accel.kernels.tuning import launch_config

DEVICE = torch.device("meta")
CAPABILITIES = (80, 90, 120)
HEAD_DIMS = {
    "common": [("fp16", 40), ("fp16", 64), ("fp16", 80), ("fp16", 160), ("fp32", 64)],
    "rest": [
        *(("fp16", head_dim) for head_dim in (8, 72, 96, 112, 128, 192, 224, 256)),
        *(("bf16", head_dim) for head_dim in (40, 64, 128)),
        *(("fp32", head_dim) for head_dim in (8, 40, 80, 96, 128, 160, 192, 256)),
    ],
}  # "common" is what SD1.x, SD2.x and SDXL have
INT8_MMA = r"(wgmma\.mma_async|mma)\.sync\.[^\n]*\.s32\.s8\.s8"  # int32 sums of INT8 products in a tensor core
INT8_SCALES = ("x_scale", "output_scale", "inverse_output_scale")
IN, OUT = dict.fromkeys(("in_features", "channels"), "by 16"), dict.fromkeys(("out_features", "out_channels"), "by 16")
INT8_SIZES = {  # launch configs' "aligned", whether the blocks divide the sums, which sizes are divisible by 16
    "common": {"": (2, True, IN | OUT)},
    "rest": {
        ", sums end inside a block": (2, False, IN | OUT), ", odd results": (1, True, IN), ", odd": (1, False, {}),
    },
}  # fmt: skip
# A kernel, its launch: a pointer's type for every name that ends in _ptr, "fp32" for floats; other names are int32.
Case = tuple[str, Any, dict[str, str], dict[str, Any]]


def attention_cases(part: str) -> Iterator[Case]:
    module = import_module("catimage_accel.kernels.attention.triton")
    pointers = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
    for dtype, head_dim in HEAD_DIMS[part]:
        for even_keys in (False,) if part == "common" else (False, True):
            width, rest = module.column_blocks(head_dim)
            config = launch_config("attention", DEVICE, itemsize=4 if dtype == "fp32" else 2, head_dim=head_dim)
            yield (
                f"attention {dtype} head_dim {head_dim}" + " even" * even_keys,
                module.attention_kernel,
                dict.fromkeys(pointers, f"*{dtype}") | {"scale_log2": "fp32"},
                {"HEAD_DIM": head_dim, "WIDTH": width, "REST": rest, "EVEN_KEYS": even_keys, **config},
            )


def group_norm_cases() -> Iterator[Case]:
    module = import_module("catimage_accel.kernels.group_norm.triton")
    pointers = dict.fromkeys(("x_ptr", "shift_ptr", "y_ptr", "weight_ptr", "bias_ptr"), "*bf16")
    types = pointers | {"partials_ptr": "*fp32", "moments_ptr": "*fp32"}
    types |= {"eps": "fp32", "inverse_output_scale": "fp32"}
    nchw = launch_config("group_norm", DEVICE, channels_last=1, pixels=4096)
    nhwc = launch_config("group_norm", DEVICE, channels_last=2, pixels=4096)
    combine = {"CHUNK": nchw["CHUNK"], "BLOCK": nchw["COMBINE"], "num_warps": 4}
    yield "group_norm combine", module.combine_kernel, types, combine
    for shift in (False, True):
        flags = {"HAS_SHIFT": shift, "HAS_WEIGHT": True, "HAS_BIAS": True, "SILU": True, "QUANTIZED": False}
        shifted = " with shift" * shift
        yield f"group_norm moments nchw{shifted}", module.moments_nchw_kernel, types, nchw | flags
        yield f"group_norm moments nhwc{shifted}", module.moments_nhwc_kernel, types, nhwc | flags
        yield f"group_norm apply nchw{shifted}", module.apply_nchw_kernel, types, nchw | flags
        yield f"group_norm apply nhwc{shifted}", module.apply_nhwc_kernel, types, nhwc | flags
    types["y_ptr"], flags["QUANTIZED"] = "*i8", True
    yield "group_norm apply nchw to INT8", module.apply_nchw_kernel, types, nchw | flags
    yield "group_norm apply nhwc to INT8", module.apply_nhwc_kernel, types, nhwc | flags


def layer_norm_cases() -> Iterator[Case]:
    module = import_module("catimage_accel.kernels.layer_norm.triton")
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "y_ptr", "total_ptr"), "*bf16")
    types = pointers | dict.fromkeys(("eps", "inverse_output_scale"), "fp32")
    flags = {"HAS_RESIDUAL": True, "HAS_WEIGHT": True, "HAS_BIAS": True}
    for width in (320, 640, 1280, 2048, 4096, 8192, 16384):
        launch = launch_config("layer_norm", DEVICE, width=width) | flags
        launch["BLOCK_WIDTH"] = triton.next_power_of_2(width)
        yield f"layer_norm {width}", module.layer_norm_kernel, types, launch | {"QUANTIZED": False}
        to_int8 = types | {"y_ptr": "*i8"}
        yield f"layer_norm {width} to INT8", module.layer_norm_kernel, to_int8, launch | {"QUANTIZED": True}


def geglu_cases() -> Iterator[Case]:
    module = import_module("catimage_accel.kernels.geglu.triton")
    for dtype in ("bf16", "fp32"):
        for written in (dtype, "i8"):
            types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{written}", "inverse_output_scale": "fp32"}
            launch = launch_config("geglu", DEVICE, width=1280) | {"QUANTIZED": written == "i8"}
            yield f"geglu {dtype} to {written}", module.geglu_kernel, types, launch


def guided_step_cases() -> Iterator[Case]:
    module = import_module("catimage_accel.kernels.guided_step.triton")
    noise = {"cond_ptr": "*fp16", "uncond_ptr": "*fp16", "guidance_ptr": "*fp32", "partials_ptr": "*fp32"}
    latents = dict.fromkeys(("sample_ptr", "history_ptr", "next_ptr", "denoised_ptr", "coefficients_ptr"), "*fp32")
    types = noise | latents | {"rescale_ptr": "*fp32"}
    flags = {"GUIDED": True, "RESCALED": True, "HAS_HISTORY": True}
    yield "guided_step moments", module.moments_kernel, types, {"BLOCK": module.BLOCK, "num_warps": 4}
    yield "guided_step step", module.step_kernel, types, {"BLOCK": module.BLOCK, "LANES": 64, "num_warps": 4, **flags}


def int8_cases(part: str) -> Iterator[Case]:
    """Products whose sizes the blocks divide ("common", as SD1.5's and SDXL's) or not, down to single bytes."""
    types = {"x_ptr": "*i8", "weight_ptr": "*i8", "weight_scale_ptr": "*fp32", "bias_ptr": "*fp16",
             "residual_ptr": "*fp16", "out_ptr": "*fp16", **dict.fromkeys(INT8_SCALES, "fp32")}  # fmt: skip
    flags = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "QUANTIZED": True}
    kernels = {
        "int8_linear": [("", {})],
        "int8_conv": [
            (f" {size}x{size} stride {stride}", {"KERNEL_HEIGHT": size, "KERNEL_WIDTH": size, "STRIDE": stride})
            for size, stride in ((3, 1), (3, 2), (1, 1))
        ],
    }
    for op, shapes in kernels.items():
        kernel = getattr(import_module(f"catimage_accel.kernels.{op}.triton"), f"{op}_kernel")
        for rows in (16, 128, 8192) if op == "int8_linear" else (128, 8192):
            for name, shape in shapes:
                for sizes, (aligned, even, divisible) in INT8_SIZES[part].items():
                    launch = launch_config(op, DEVICE, aligned=aligned, rows=rows) | flags | shape
                    yield f"{op}{name}, {rows} rows{sizes}", kernel, types, launch | {"EVEN_K": even} | divisible


def int8_quantize_cases() -> Iterator[Case]:
    module = import_module("catimage_accel.kernels.int8_quantize.triton")
    types = {"x_ptr": "*bf16", "input_scale_ptr": "*fp32", "y_ptr": "*i8", "inverse_scale": "fp32"}
    for scaled in (False, True):
        launch = launch_config("int8_quantize", DEVICE, numel=2**20) | {"HAS_INPUT_SCALE": scaled}
        yield "int8_quantize" + " with SmoothQuant" * scaled, module.int8_quantize_kernel, types, launch


def cases(part: str) -> Iterator[Case]:
    yield from attention_cases(part)
    yield from int8_cases(part)
    if part == "common":
        yield from group_norm_cases()
        yield from layer_norm_cases()
        yield from geglu_cases()
        yield from guided_step_cases()
        yield from int8_quantize_cases()


def compile_case(case: Case, capability: int) -> dict[str, Any]:
    name, kernel, types, launch = case
    constexprs = {key: value for key, value in launch.items() if key in kernel.arg_names and value != "by 16"}
    signature = {key: "constexpr" if key in constexprs else types.get(key, "i32") for key in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (key, kind) in enumerate(signature.items())
        if kind[0] == "*" or key.endswith("stride") or launch.get(key) == "by 16"
    }
    options = {key: launch[key] for key in ("num_warps", "num_stages") if key in launch}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return {
        "case": name, "capability": capability, **found,
        "shared": compiled.metadata.shared, "wgmma": "wgmma" in compiled.asm["ptx"],
        "int8_mma": bool(re.search(INT8_MMA, compiled.asm["ptx"])),
    }  # fmt: skip


if __name__ == "__main__":
    for case in cases(sys.argv[1]):
        for capability in CAPABILITIES:
            print(json.dumps(compile_case(case, capability)), flush=True)
