"""Which implementation of an op runs: the rules every op shares."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch

from catimage_accel.kernels import cpu, cuda
from catimage_accel.kernels.build import CPU, CUDA, Library

Impl = Literal["reference", "triton", "cuda", "cpu", "int_mm"]
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Constants, not functions: torch.compile cannot trace a look into the environment.
TRITON_INSTALLED = find_spec("triton") is not None  # CPU builds of torch come without it
_TRUE = ("1", "true", "yes", "on", "y")
# Triton's interpreter takes CPU tensors.
TRITON_INTERPRETS = TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE


def choose_impl(
    impl: str | None,
    name: str,
    x: torch.Tensor,
    *others: torch.Tensor | None,
    triton_dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES,
    cuda_dtypes: tuple[torch.dtype, ...] = (),
    cpu_dtypes: tuple[torch.dtype, ...] = (),
    libraries: tuple[Impl, ...] = (),
    measured: Callable[[], str | None] | None = None,
) -> Impl:
    """The implementation to run on validated arguments.

    Args:
        impl: What the caller asked for; ``None`` is the best available: on CUDA tensors of a dtype it takes cuda where
            or a library where that was measured to be the fastest, else triton; on CPU tensors cpu, where it is built,
            takes such arguments and nobody compiles or traces the call (who does makes one kernel of several ops); else
            the reference.
        name: Name of the argument ``x``, for messages.
        x: The argument whose device and dtype decide.
        others: The op's other tensors. If any of them or ``x`` needs a gradient the reference runs whatever ``impl``
            says, as only torch's own ops are differentiable.
        triton_dtypes: What ``x`` may be for the op's Triton kernels.
        cuda_dtypes: What the op's CUDA kernels take; empty where it has none for such arguments.
        cpu_dtypes: The same of its C++ kernels for the CPU.
        libraries: Further implementations that take such arguments, through torch's own ops.
        measured: Tells which implementation was measured to be the fastest for such arguments, if any was.

    Raises:
        ValueError: ``impl`` is unknown, or is missing here, or takes no such device or dtype.
    """
    native = (*(("cuda",) if cuda_dtypes else ()), *(("cpu",) if cpu_dtypes else ()))
    impls = ("reference", "triton", *native, *libraries)
    if impl is not None and impl not in impls:
        raise ValueError(f"impl is {impl!r}; accepted: {', '.join(map(repr, impls))} or None (best available)")
    if impl == "triton":
        if not TRITON_INSTALLED:
            raise ValueError("impl is 'triton', but triton is not installed: pip install catimage-accel[triton]")
        if x.dtype not in triton_dtypes:
            raise ValueError(f"{name} has dtype {x.dtype}; impl 'triton' accepts {', '.join(map(str, triton_dtypes))}")
        if not x.is_cuda and not TRITON_INTERPRETS:
            raise ValueError(f"{name} is on {x.device}; impl 'triton' accepts CUDA tensors")
    if impl == "cuda":
        _check_native(impl, CUDA, cuda.BUILT, name, x, cuda_dtypes)
    if impl == "cpu":
        _check_native(impl, CPU, cpu.BUILT, name, x, cpu_dtypes)
    if impl == "reference" or needs_gradient(x, *others):
        return "reference"
    if impl is not None:
        return cast(Impl, impl)
    rivals = (*(("cuda",) if cuda.BUILT and x.dtype in cuda_dtypes else ()), *libraries)
    if measured is not None and rivals and x.is_cuda and (found := measured()) in rivals:
        return cast(Impl, found)
    if x.is_cuda and x.dtype in triton_dtypes and TRITON_INSTALLED:
        return "triton"
    return "cpu" if cpu.BUILT and x.device.type == "cpu" and x.dtype in cpu_dtypes and not is_traced() else "reference"


def _check_native(
    impl: str, library: Library, built: bool, name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    if not built:
        raise ValueError(f"impl is {impl!r}, but its kernels are not built: {library.how_to_build}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {x.dtype}; impl {impl!r} accepts {', '.join(map(str, dtypes))}")
    if not (x.is_cuda if impl == "cuda" else x.is_cpu):
        raise ValueError(f"{name} is on {x.device}; impl {impl!r} accepts {library.kind} tensors")


def is_traced() -> bool:
    """Whether ``torch.compile``, ``torch.export`` or ``torch.jit.trace`` is looking at what is called."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def wrap_triton(kernel: Any) -> Any:
    """``torch.library.wrap_triton``, but for interpreted kernels, which torch 2.11 refuses: those launch as they are.

    Its name is that of torch's, which looks for calls to it in the source of a ``triton_op``.
    """
    return kernel if TRITON_INTERPRETS else torch.library.wrap_triton(kernel)


def register_triton_op(name: str, fn: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers ``fn``, which launches wrapped Triton kernels, as ``torch.ops.catimage_accel.<name>``.

    A ``triton_op``, so that ``torch.compile`` sees the kernels; an opaque custom op under Triton's interpreter, whose
    kernels cannot be traced.

    Args:
        name: Name of the op.
        fn: The implementation; its annotations are the op's schema; it mutates no argument.
        fake: The same signature on tensors without data: shapes, dtypes and strides of the results.
    """
    register = torch.library.custom_op if TRITON_INTERPRETS else torch.library.triton_op
    op = register(f"catimage_accel::{name}", fn, mutates_args=())
    op.register_fake(fake)
    return op
