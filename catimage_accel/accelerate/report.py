"""What of a pipeline runs on the fused kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from catimage_accel.accelerate import resnet, transformer
from catimage_accel.accelerate.attention import FusedAttention, FusedAttnProcessor, head_dim
from catimage_accel.accelerate.compiled import CompiledForward
from catimage_accel.accelerate.forwards import deep_cache_interval, swapped_forwards
from catimage_accel.accelerate.modules import components, text_encoders
from catimage_accel.accelerate.norms import FusedGroupNorm, FusedLayerNorm, takes_sums
from catimage_accel.accelerate.resnet import FusedResnetBlock2D
from catimage_accel.accelerate.text_cache import says_all
from catimage_accel.accelerate.transformer import NORMS, FusedGEGLU, FusedTransformerBlock
from catimage_accel.kernels.attention import MAX_TRITON_HEAD_DIM


@dataclass(frozen=True)
class AccelerationReport:
    """What runs on the fused kernels. Names are module paths, from the pipeline's component on."""

    attention: tuple[str, ...]
    text_cache: tuple[str, ...]  # those of ``attention`` that project a prompt once, however many the steps
    group_norm: tuple[str, ...]
    group_norm_silu: tuple[str, ...]
    group_norm_shift: tuple[str, ...]  # those of the two above that add a time embedding
    layer_norm: tuple[str, ...]
    layer_norm_residual: tuple[str, ...]  # those of ``layer_norm`` that add a residual
    geglu: tuple[str, ...]
    compiled: dict[str, str]  # path of a whole model -> mode of torch.compile
    cuda_graphs: tuple[str, ...]  # whole models that CUDA graphs replay on a CUDA device
    deep_cache_interval: int  # steps that the UNet's deep features serve at most; 1 where each step makes its own
    left_alone: dict[str, str]  # module path -> why


def acceleration_report(pipe: Any) -> AccelerationReport:
    """What of a pipeline runs on the fused kernels at this moment, and what does not and why.

    Raises:
        ValueError: The pipeline has no ``UNet2DConditionModel``.
    """
    found = _Found()
    for root, component in components(pipe):
        found.new_texts = getattr(component.config, "encoder_hid_dim_type", None) in NEW_TEXTS
        if found.new_texts:
            found.left_alone[f"{root}.encoder_hid_proj"] = "it makes a new text in each call, which is projected anew"
        for name, module in component.named_modules():
            _look_at(module, f"{root}.{name}", found)
    for root, encoder in text_encoders(pipe):
        _look_at_text_encoder(root, encoder, found)
    forwards = dict(swapped_forwards(pipe))
    return AccelerationReport(
        compiled={path: forward.mode for path, forward in forwards.items() if isinstance(forward, CompiledForward)},
        cuda_graphs=tuple(path for path, forward in forwards.items() if forward.captures_graphs),
        deep_cache_interval=deep_cache_interval(pipe),
        left_alone=found.left_alone,
        **{kind: tuple(names) for kind, names in found.fused.items()},
    )


KINDS = (
    "attention", "text_cache", "group_norm", "group_norm_silu", "group_norm_shift", "layer_norm",
    "layer_norm_residual", "geglu",
)  # fmt: skip


NEW_TEXTS = ("text_proj", "text_image_proj", "image_proj")
CAUSAL = "its attention has a causal mask, which the kernel has not"


@dataclass
class _Found:
    fused: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    left_alone: dict[str, str] = field(default_factory=dict)
    new_texts: bool = False


def attention_layers(pipe: Any) -> Iterator[tuple[str, Attention]]:
    """By path."""
    for root, component in components(pipe):
        for name, module in component.named_modules():
            if isinstance(module, Attention):
                yield f"{root}.{name}", module


def _look_at(module: nn.Module, path: str, found: _Found) -> None:
    if isinstance(module, Attention):
        _look_at_attention(module, path, found)
    elif type(module) is FusedGroupNorm:
        found.fused["group_norm" if module.activation is None else "group_norm_silu"].append(path)
    elif type(module) is FusedGEGLU:
        found.fused["geglu"].append(path)
    elif isinstance(module, nn.GroupNorm | GEGLU):
        found.left_alone[path] = _not_swapped(module, nn.GroupNorm, GEGLU)
    elif isinstance(module, ResnetBlock2D):
        _look_at_resnet(module, path, found)
    elif isinstance(module, BasicTransformerBlock):
        _look_at_transformer(module, path, found)


def _look_at_attention(layer: Attention, path: str, found: _Found) -> None:
    if type(layer.processor) is FusedAttnProcessor:
        found.fused["attention"].append(path)
        if type(layer) is not FusedAttention or not layer.is_cross_attention or layer.norm_cross or found.new_texts:
            return
        if says_all(layer.to_k) and says_all(layer.to_v):
            found.fused["text_cache"].append(path)
        else:
            found.left_alone[f"{path}.to_k"] = "it or to_v is wrapped or hooked, as by LoRA: it projects in each call"
    elif type(layer.processor) is not AttnProcessor2_0:
        found.left_alone[path] = f"its processor is a {type(layer.processor).__name__}"
    elif head_dim(layer) > MAX_TRITON_HEAD_DIM:
        found.left_alone[path] = f"its head_dim, {head_dim(layer)}, is above {MAX_TRITON_HEAD_DIM}"
    else:
        found.left_alone[path] = "not accelerated"


def _look_at_resnet(block: ResnetBlock2D, path: str, found: _Found) -> None:
    if block.time_emb_proj is None:
        return
    if type(block) is not FusedResnetBlock2D:
        found.left_alone[path] = resnet.reason_against(block) or _not_swapped(block, ResnetBlock2D)
    elif takes_sums(block.norm2):
        found.fused["group_norm_shift"].append(f"{path}.norm2")
    else:
        found.left_alone[path] = "its second norm is hooked or replaced"


def _look_at_transformer(block: BasicTransformerBlock, path: str, found: _Found) -> None:
    for name in NORMS:
        norm = getattr(block, name, None)
        if type(norm) is FusedLayerNorm:
            found.fused["layer_norm"].append(f"{path}.{name}")
        elif norm is not None:
            found.left_alone[f"{path}.{name}"] = _not_swapped(norm, nn.LayerNorm)
    if type(block) is not FusedTransformerBlock:
        found.left_alone[path] = transformer.reason_against(block) or _not_swapped(block, BasicTransformerBlock)
    elif block._chunk_size is not None:
        found.left_alone[path] = "it feeds forward in chunks"
    else:
        sums = [f"{path}.{name}" for name in NORMS[1:] if takes_sums(getattr(block, name))]
        found.fused["layer_norm_residual"] += sums


def _look_at_text_encoder(root: str, encoder: nn.Module, found: _Found) -> None:
    from catimage_accel.accelerate.text_encoder import FusedEncoderLayer, is_causal_attention, is_clip

    if not is_clip(encoder):
        found.left_alone[root] = f"it is a {type(encoder).__name__}"
        return
    for name, module in encoder.named_modules():
        path = f"{root}.{name}"
        if is_causal_attention(module):
            found.left_alone[path] = CAUSAL
        elif type(module) is FusedLayerNorm:
            found.fused["layer_norm"].append(path)
        elif isinstance(module, nn.LayerNorm):
            found.left_alone[path] = _not_swapped(module, nn.LayerNorm)
        elif type(module) is FusedEncoderLayer and takes_sums(module.layer_norm2):
            found.fused["layer_norm_residual"].append(f"{path}.layer_norm2")


def _not_swapped(module: nn.Module, *originals: type) -> str:
    return "not accelerated" if type(module) in originals else f"it is a {type(module).__name__}"
