"""``accelerate`` and ``restore``."""

from __future__ import annotations

import warnings
from typing import Literal, TypeVar

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from catimage_accel.accelerate.attention import FusedAttention, FusedAttnProcessor, restore_attention, swap_attention
from catimage_accel.accelerate.modules import components
from catimage_accel.accelerate.norms import FusedGroupNorm, FusedLayerNorm, FusedSiLU
from catimage_accel.accelerate.report import attention_layers
from catimage_accel.accelerate.resnet import FusedResnetBlock2D, swap_resnets
from catimage_accel.accelerate.transformer import FusedGEGLU, FusedTransformerBlock, swap_transformers

Pipeline = TypeVar("Pipeline")

# Fused class -> the class it stands in for, and the attributes that its modules were given.
ORIGINALS: dict[type, tuple[type, tuple[str, ...]]] = {
    FusedAttention: (Attention, ()),
    FusedGEGLU: (GEGLU, ()),
    FusedGroupNorm: (nn.GroupNorm, ("activation",)),
    FusedLayerNorm: (nn.LayerNorm, ()),
    FusedResnetBlock2D: (ResnetBlock2D, ()),
    FusedSiLU: (nn.SiLU, ("norms_apply_it",)),
    FusedTransformerBlock: (BasicTransformerBlock, ()),
}


def accelerate(pipe: Pipeline, *, tier: Literal["lossless"] = "lossless") -> Pipeline:
    """Swaps the fused kernels into the UNet, ControlNets and image decoder of a pipeline, in place.

    Works on every pipeline whose ``unet`` is a diffusers ``UNet2DConditionModel`` (SD1.x, SD2.x, SDXL, text-to-image
    or other). Repeating it is harmless, and needed after something has set new attention processors, or has changed
    weights through ``tensor.data`` between calls of the UNet on one and the same text tensor (whose keys and values are
    kept). ``acceleration_report`` lists what was swapped; ``restore`` undoes it.

    Args:
        pipe: The pipeline.
        tier: "lossless": the same maths, only rounding differs.

    Returns:
        ``pipe``, the same object.

    Warns:
        UserWarning: Attention processors that someone set (IP-Adapter, custom) were left alone; names them.

    Raises:
        ValueError: ``tier`` is unknown, or the pipeline has no UNet of that kind.
    """
    if tier != "lossless":
        raise ValueError(f"tier is {tier!r}; accepted: 'lossless'")
    for _, component in components(pipe):
        swap_attention(component)
        swap_resnets(component)
        swap_transformers(component)
    foreign = {
        name: processor
        for name, layer in attention_layers(pipe)
        if type(processor := layer.processor) not in (AttnProcessor2_0, FusedAttnProcessor)
    }
    if foreign:
        kinds = ", ".join(sorted({type(processor).__name__ for processor in foreign.values()}))
        warnings.warn(
            f"left {len(foreign)} attention layers to the processors set on them ({kinds}): {', '.join(foreign)}",
            UserWarning,
            stacklevel=2,
        )
    return pipe


def restore(pipe: Pipeline) -> Pipeline:
    """Undoes ``accelerate``: the original processor objects and module classes; anything set since then stays.

    Returns:
        ``pipe``, the same object.

    Raises:
        ValueError: The pipeline has no ``UNet2DConditionModel``.
    """
    for _, component in components(pipe):
        restore_attention(component)
        for module in component.modules():
            if type(module) in ORIGINALS:
                original, attributes = ORIGINALS[type(module)]
                module.__class__ = original
                for name in attributes:
                    module.__dict__.pop(name, None)
    return pipe
