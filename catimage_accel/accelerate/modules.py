"""Which models of a pipeline are accelerated, and what swapped modules ask of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from catimage_accel.kernels import cpu
from catimage_accel.kernels.dispatch import TRITON_INTERPRETS, is_traced

COMPONENTS = ("unet", "controlnet", "vae")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

Class = TypeVar("Class", bound=type)


def components(pipe: Any) -> Iterator[tuple[str, Any]]:
    """The pipeline's models that are accelerated, by path; what ``torch.compile`` wraps is unwrapped.

    Raises:
        ValueError: The pipeline has no ``UNet2DConditionModel``.
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet = unwrapped(getattr(pipe, "unet", None))
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(
            f"pipe is a {type(pipe).__name__} with unet {type(unet).__name__}; "
            "accepted: a diffusers pipeline whose unet is a UNet2DConditionModel"
        )
    found = ((path, unwrapped(model)) for path, model in _models(pipe))
    return ((path, model) for path, model in found if hasattr(model, "set_attn_processor"))


def text_encoders(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    """By path; what ``torch.compile`` wraps is unwrapped."""
    for name in TEXT_ENCODERS:
        model = unwrapped(getattr(pipe, name, None))
        if isinstance(model, nn.Module):
            yield name, model


UNET = "unet"
DECODER = "vae.decoder"


def denoisers_and_decoder(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    """UNet, ControlNets and the decoder's network, by path, as they stand in the pipeline."""
    for path, model in _models(pipe):
        if path == "vae":
            path, model = DECODER, getattr(unwrapped(model), "decoder", None)
        if isinstance(model, nn.Module):
            yield path, model


def _models(pipe: Any) -> Iterator[tuple[str, Any]]:
    for name in COMPONENTS:
        model = getattr(pipe, name, None)
        nets = getattr(unwrapped(model), "nets", None)  # MultiControlNetModel
        if isinstance(nets, nn.ModuleList):
            yield from ((f"{name}.nets.{index}", net) for index, net in enumerate(nets))
        else:
            yield name, model


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``Module.compile`` was called on the model."""
    return unwrapped(model) is not model or model._compiled_call_impl is not None


def unwrapped(model: Any) -> Any:
    """The model inside of what ``torch.compile`` made of it."""
    return getattr(model, "_orig_mod", model)


def named_like(original: type) -> Callable[[Class], Class]:
    """Gives a class the name of the one that it stands in for.

    diffusers finds modules by the names of their classes (``compile_repeated_blocks``, ``device_map``); pickle goes by
    ``__qualname__``, which stays.
    """

    def rename(cls: Class) -> Class:
        cls.__name__ = original.__name__
        return cls

    return rename


def is_hooked(module: nn.Module) -> bool:
    """Whether someone sees or replaces what goes in or out of the module."""
    # Each by its name: torch.compile does not trace a walk over ``vars``.
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def takes_kernels(x: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels may run on these tensors.

    They do on CUDA tensors (and under Triton's interpreter) that share a dtype which autocast leaves alone. Elsewhere
    torch's own ops decide, and asking for ours would only cost time; but see ``takes_cpu_kernels``.
    """
    if not (x.is_cuda or TRITON_INTERPRETS) or torch.is_autocast_enabled(x.device.type):
        return False
    return all(other is None or other.dtype == x.dtype for other in others)


def takes_cpu_kernels(x: Tensor, *others: Tensor | None) -> bool:
    """Whether C++ kernels for the CPU, of ops that have one, may run on these tensors.

    They do where they are built, on tensors that share a dtype which autocast leaves alone, where nobody asks for
    derivatives or compiles or traces the call.
    """
    return (
        cpu.BUILT
        and x.device.type == "cpu"
        and x.dtype in cpu.DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_traced()
        and all(other is None or other.dtype == x.dtype for other in others)
    )
