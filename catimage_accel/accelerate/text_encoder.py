"""CLIP's text encoders, as SD and SDXL have them: LayerNorm with the residual sum before it.

Their attention stays: it is causal, and the fused op has no mask. Their activation is one pass as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from catimage_accel.accelerate.modules import named_like
from catimage_accel.accelerate.norms import FusedLayerNorm, add_and_norm


@named_like(CLIPEncoderLayer)
class FusedEncoderLayer(CLIPEncoderLayer):
    """A ``CLIPEncoderLayer`` whose second norm adds the residual."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """Arguments and result are those of ``CLIPEncoderLayer``."""
        attended, _ = self.self_attn(
            hidden_states=self.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs
        )
        normalised, hidden_states = add_and_norm(self.layer_norm2, attended, hidden_states)
        return hidden_states + self.mlp(normalised)


def is_clip(encoder: nn.Module) -> bool:
    """Whether the encoder has layers of the kind."""
    return any(isinstance(module, CLIPEncoderLayer) for module in encoder.modules())


def is_causal_attention(module: nn.Module) -> bool:
    """Whether the module is an attention layer that the fused op does not fit."""
    return isinstance(module, CLIPAttention)


def swap_text_encoder(encoder: nn.Module) -> None:
    """Layers and norms of an encoder that is CLIP's."""
    for module in encoder.modules() if is_clip(encoder) else ():
        if type(module) is CLIPEncoderLayer:
            module.__class__ = FusedEncoderLayer
        elif type(module) is nn.LayerNorm:
            module.__class__ = FusedLayerNorm


def restore_text_encoder(encoder: nn.Module) -> None:
    """The layers' own class."""
    for module in encoder.modules():
        if type(module) is FusedEncoderLayer:
            module.__class__ = CLIPEncoderLayer
