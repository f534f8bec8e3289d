"""The transformer blocks: LayerNorm with the residual sum before it, and the gated activation."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from catimage_accel.accelerate.modules import named_like
from catimage_accel.accelerate.norms import FusedLayerNorm, add_and_norm
from catimage_accel.kernels import geglu

NORMS = ("norm1", "norm2", "norm3")
# The function itself, as in ``attention``.
plain_forward = BasicTransformerBlock.forward


@named_like(GEGLU)
class FusedGEGLU(GEGLU):
    """``GEGLU`` over ``kernels.geglu``; the projection, which LoRA may wrap, stays the module it is."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Arguments and result are those of ``GEGLU``."""
        if args or kwargs:
            return GEGLU.forward(self, hidden_states, *args, **kwargs)
        return geglu(self.proj(hidden_states))


@named_like(BasicTransformerBlock)
class FusedTransformerBlock(BasicTransformerBlock):
    """A ``BasicTransformerBlock`` whose second and third norm add the residual."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """As of ``BasicTransformerBlock``, whose own code runs what is out of the ordinary."""
        extra = cross_attention_kwargs or {}
        if hidden_states.ndim != 3 or self._chunk_size is not None or "gligen" in extra or "scale" in extra:
            return plain_forward(
                self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        context = encoder_hidden_states if self.only_cross_attention else None
        attended = self.attn1(
            self.norm1(hidden_states), encoder_hidden_states=context, attention_mask=attention_mask, **extra
        )
        normalised, hidden_states = add_and_norm(self.norm2, attended, hidden_states)
        attended = self.attn2(
            normalised, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **extra
        )
        normalised, hidden_states = add_and_norm(self.norm3, attended, hidden_states)
        return self.ff(normalised) + hidden_states


def reason_against(block: BasicTransformerBlock) -> str | None:
    """Why the block keeps its own code, if it does."""
    if block.norm_type != "layer_norm":
        return f"its norm_type is {block.norm_type!r}"
    if block.pos_embed is not None:
        return "it has positional embeddings"
    if hasattr(block, "fuser"):
        return "it has GLIGEN's attention"
    if block.attn2 is None:
        return "it has one attention layer"
    return None


def swap_transformers(component: nn.Module) -> None:
    """Blocks, their LayerNorms, and all gated activations."""
    for module in component.modules():
        if type(module) is GEGLU:
            module.__class__ = FusedGEGLU
        elif type(module) in (BasicTransformerBlock, FusedTransformerBlock):
            for norm in (getattr(module, name, None) for name in NORMS):
                if type(norm) is nn.LayerNorm:
                    norm.__class__ = FusedLayerNorm
            if reason_against(module) is None:
                module.__class__ = FusedTransformerBlock
