"""Prints, one JSON line each, which Triton kernels ``torch.compile``'s decomposition shows, of all ops there are.

Runs in a process without TRITON_INTERPRET and needs no GPU: nothing is launched.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

from catimage_accel import kernels

OPS: dict[str, tuple[Any, ...]] = {
    "add_layer_norm": (*torch.randn(2, 3, 5, 8).unbind(), torch.ones(8), torch.zeros(8), 1e-5),
    "attention": (torch.randn(2, 20, 2, 40), torch.randn(2, 77, 2, 40), torch.randn(2, 77, 2, 40), 0.2),
    "geglu": (torch.randn(3, 5, 16),),
    "group_norm": (torch.randn(2, 8, 5, 6), 4, torch.ones(8), torch.zeros(8), 1e-5, True),
    "guided_step": (
        *torch.randn(3, 2, 4, 8, 8).unbind(), torch.randn(2, 5), torch.randn(2, 4, 8, 8), torch.ones(2),
        torch.tensor([0.0, 0.7]),
    ),
    "int8_conv": (
        torch.ones(2, 16, 5, 6, dtype=torch.int8), torch.ones(8, 16, 3, 3, dtype=torch.int8), 0.1, torch.ones(8),
        None, 1, 1, None, torch.float16, None,
    ),
    "int8_linear": (
        torch.ones(5, 16, dtype=torch.int8), torch.ones(8, 16, dtype=torch.int8), 0.1, torch.ones(8), None, None,
        torch.float16, None,
    ),
    "int8_quantize": (torch.randn(5, 16), 0.1, None),
    "layer_norm": (torch.randn(3, 5, 8), torch.ones(8), torch.zeros(8), 1e-5),
}  # fmt: skip


class Call(torch.nn.Module):
    """An op as a module, with what is no tensor bound."""

    def __init__(self, op: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.op, self.arguments = op, arguments

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        left = iter(tensors)
        result = self.op(*(next(left) if isinstance(a, torch.Tensor) else a for a in self.arguments))
        return result if isinstance(result, tuple) else (result,)


def kernel_name(kernel: Any) -> str:
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return str(kernel.__name__)


if __name__ == "__main__":
    for path in Path(kernels.__file__).parent.glob("*/triton.py"):
        import_module(f"catimage_accel.kernels.{path.parent.name}.triton")
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("catimage_accel::")]
    for name in sorted(name.removeprefix("catimage_accel::") for name in names):
        arguments = OPS[name]
        tensors = tuple(a for a in arguments if isinstance(a, torch.Tensor))
        call = Call(getattr(torch.ops.catimage_accel, name), arguments)
        graph, _ = aot_export_module(call, tensors, trace_joint=False)
        launched = [
            kernel_name(kernel_side_table.get_kernel(node.kwargs["kernel_idx"]))
            for node in graph.graph.nodes
            if "triton_kernel_wrapper" in str(node.target)
        ]
        print(json.dumps({"op": name, "kernels": launched}), flush=True)
