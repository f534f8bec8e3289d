"""``accelerate`` and ``restore``, and what the former does to one model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal, TypeVar

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from catimage_accel.accelerate import deep_blocks, deep_cache
from catimage_accel.accelerate.attention import FusedAttention, FusedAttnProcessor, restore_attention, swap_attention
from catimage_accel.accelerate.forwards import check_forwards, compile_mode, restore_forwards, swap_forwards
from catimage_accel.accelerate.layer_skip import register_layer_skip
from catimage_accel.accelerate.modules import components, text_encoders
from catimage_accel.accelerate.norms import FusedGroupNorm, FusedLayerNorm, FusedSiLU
from catimage_accel.accelerate.report import attention_layers
from catimage_accel.accelerate.resnet import FusedResnetBlock2D, swap_resnets
from catimage_accel.accelerate.transformer import FusedGEGLU, FusedTransformerBlock, swap_transformers

Pipeline = TypeVar("Pipeline")
Originals = Mapping[type, tuple[type, tuple[str, ...]]]

# Fused class -> the class it stands in for, and the attributes that its modules were given.
ORIGINALS: Originals = {
    FusedAttention: (Attention, ()),
    FusedGEGLU: (GEGLU, ()),
    FusedGroupNorm: (nn.GroupNorm, ("activation",)),
    FusedLayerNorm: (nn.LayerNorm, ()),
    FusedResnetBlock2D: (ResnetBlock2D, ()),
    FusedSiLU: (nn.SiLU, ("norms_apply_it",)),
    FusedTransformerBlock: (BasicTransformerBlock, ()),
    **deep_blocks.ORIGINALS,
}


def accelerate(
    pipe: Pipeline,
    *,
    tier: Literal["lossless", "high", "fast"] = "lossless",
    compile: bool | str = False,
    cuda_graphs: bool = False,
) -> Pipeline:
    """Swaps the fused kernels into the UNet, ControlNets, decoder and CLIP text encoders of a pipeline, in place.

    Works on every pipeline whose ``unet`` is a diffusers ``UNet2DConditionModel`` (SD1.x, SD2.x, SDXL, text-to-image
    or other). Repeating it is harmless, and needed after something has set new attention processors, or has changed
    weights through ``tensor.data`` between calls of the UNet on one and the same text tensor (whose keys and values are
    kept); the last call's options hold. ``acceleration_report`` lists what was swapped; ``restore`` undoes it, and
    comes first where diffusers knows classes of its own only (``unet.set_default_attn_processor``).

    Args:
        pipe: The pipeline.
        tier: "lossless": the same maths, only rounding differs. "high" and "fast" also keep what lies deep in the
            UNet for 2 and 3 steps (DeepCache, arXiv 2312.00858), never for a loop's last, and draw other pictures, a
            little worse on the built-in teacher (the README says how much). Loops of fewer than 20 steps keep it for 2
            at most, of fewer than 10 not at all.
        compile: True, or a mode of ``torch.compile``: compiles UNet, ControlNets and decoder in place, each as one
            graph (``fullgraph=True``), without wrapping them: types and ``state_dict`` keys stay. A first call takes a
            minute or more; another batch or picture size compiles once more, then for any; LoRA that comes or goes
            compiles anew. Goes with ``enable_model_cpu_offload`` called after it, not with sequential or group
            offloading. Past torch's limit of compilations calls run uncompiled, with one warning.
        cuda_graphs: Replays UNet and ControlNets from CUDA graphs, captured at the first call with each size, which
            saves the time between kernels where they are short (small pictures, small batches, fast devices). With
            ``compile=True`` the graphs are ``torch.compile``'s, as in its mode "reduce-overhead". Without, whatever
            changes the models (LoRA, offloading, a move) captures anew; the prompt is projected in every step.

    Returns:
        ``pipe``, the same object.

    Warns:
        UserWarning: Attention processors that someone set (IP-Adapter, custom) were left alone; names them.

    Raises:
        ValueError: An option is unknown, contradicts another, or does not fit the pipeline (CUDA graphs on the CPU or
            with a tier that keeps features, a model that is compiled or hooked already), or the pipeline has no UNet of
            that kind. Nothing was swapped.
    """
    deep_cache.interval_of(tier)
    mode = compile_mode(compile, cuda_graphs)
    models = list(components(pipe))
    check_forwards(pipe, tier, mode, cuda_graphs)
    register_layer_skip()
    for _, encoder in text_encoders(pipe):
        from catimage_accel.accelerate.text_encoder import swap_text_encoder  # transformers is slow to import

        swap_text_encoder(encoder)
    for _, component in models:
        _restore_classes(component, deep_blocks.ORIGINALS)
        fuse(component)
    swap_forwards(pipe, tier, mode, cuda_graphs)
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


def fuse(component: nn.Module) -> None:
    """Swaps the fused kernels into one model; attention layers whose processors someone set stay as they are."""
    swap_attention(component)
    swap_resnets(component)
    swap_transformers(component)


def restore(pipe: Pipeline) -> Pipeline:
    """Undoes ``accelerate``: the original processor objects and module classes; anything set since then stays.

    Returns:
        ``pipe``, the same object.

    Raises:
        ValueError: The pipeline has no ``UNet2DConditionModel``.
    """
    models = list(components(pipe))
    restore_forwards(pipe)
    for _, encoder in text_encoders(pipe):
        from catimage_accel.accelerate.text_encoder import restore_text_encoder

        restore_text_encoder(encoder)
        _restore_classes(encoder)
    for _, component in models:
        restore_attention(component)
        _restore_classes(component)
    return pipe


def _restore_classes(component: nn.Module, originals: Originals = ORIGINALS) -> None:
    for module in component.modules():
        if type(module) in originals:
            original, attributes = originals[type(module)]
            module.__class__ = original
            for name in attributes:
                module.__dict__.pop(name, None)
