"""Attention over the fused op, by diffusers' attention processors."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack, _len_torch_function_stack
from torch.utils._device import DeviceContext

from catimage_accel.accelerate.modules import named_like
from catimage_accel.accelerate.text_cache import TextCache
from catimage_accel.kernels import attention
from catimage_accel.kernels.attention import MAX_TRITON_HEAD_DIM

# torch.compile cannot trace a method looked up on a class that diffusers allows in graphs; ``super`` fails where a hook
# that bound the fused method outlives ``restore``.
plain_forward = Attention.forward


class FusedAttnProcessor(AttnProcessor2_0):
    """``AttnProcessor2_0`` over ``kernels.attention``, which projects a prompt once.

    A subclass, as pipelines ask for the type of a processor; made without arguments where diffusers makes new
    processors of the present type (``load_ip_adapter``).
    """

    def __init__(self, original: AttnProcessor2_0 | None = None) -> None:
        super().__init__()
        self.original = AttnProcessor2_0() if original is None else original
        self.text_cache = TextCache()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Arguments and result are those of ``AttnProcessor2_0``, which also runs where there is a mask, and where
        someone may be replacing torch's attention."""
        if attention_mask is not None or _overrides_torch():
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        keys, values = self._keys_and_values(attn, hidden_states, encoder_hidden_states)
        q, k, v = (projected.unflatten(-1, (attn.heads, -1)) for projected in (attn.to_q(hidden_states), keys, values))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        hidden_states = attention(q, k, v).flatten(2).to(q.dtype)

        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states if attn.rescale_output_factor == 1 else hidden_states / attn.rescale_output_factor

    def _keys_and_values(self, attn: Attention, hidden_states: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor]:
        if text is None:
            return attn.to_k(hidden_states), attn.to_v(hidden_states)
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        elif type(attn) is FusedAttention and not torch.compiler.is_compiling():
            return self.text_cache.keys_and_values(attn.to_k, attn.to_v, text)
        return attn.to_k(text), attn.to_v(text)


@named_like(Attention)
class FusedAttention(Attention):
    """An attention layer that calls a fused processor at once, and tells it that its projections were replaced.

    LoRA puts layers of its own in their place and may leave changed weights, which torch counted no change of, when it
    puts them back.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Arguments and result are those of ``Attention``."""
        if type(self.processor) is FusedAttnProcessor and not cross_attention_kwargs:
            # ``Attention`` would look up the processor's signature, which takes longer than a small kernel.
            return self.processor(self, hidden_states, encoder_hidden_states, attention_mask)
        return plain_forward(self, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("to_k", "to_v"):
            forget_text(self)


def _overrides_torch() -> bool:
    """Whether torch's functions are replaced, as diffusers' perturbed attention does by a ``TorchFunctionMode``."""
    if torch.compiler.is_compiling() or not _len_torch_function_stack():
        return False
    # ``torch.set_default_device`` is such a mode, too
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def forget_text(layer: Attention) -> None:
    """What the layer's processor keeps of prompts."""
    processor = getattr(layer, "processor", None)
    if type(processor) is FusedAttnProcessor:
        processor.text_cache.forget()


def head_dim(layer: Attention) -> int:
    """Of the queries."""
    return int(layer.inner_dim // layer.heads)


def swap_attention(component: Any) -> None:
    """Layers with the processor that diffusers sets, where the kernel takes their heads."""
    layers = dict(component.named_modules())
    processors = component.attn_processors
    for name, processor in processors.items():
        layer = layers[name.removesuffix(".processor")]
        if type(processor) is AttnProcessor2_0 and head_dim(layer) <= MAX_TRITON_HEAD_DIM:
            processors[name] = FusedAttnProcessor(processor)
        if type(layer) is Attention and type(processors[name]) is FusedAttnProcessor:
            layer.__class__ = FusedAttention
        forget_text(layer)
    component.set_attn_processor(processors)


def restore_attention(component: Any) -> None:
    """The original processor objects, those that ``unfuse_qkv_projections`` would bring back included."""
    component.set_attn_processor(_originals(component.attn_processors))
    before_fusing = getattr(component, "original_attn_processors", None)
    if before_fusing:
        component.original_attn_processors = _originals(before_fusing)


def _originals(processors: dict[str, Any]) -> dict[str, Any]:
    return {
        name: processor.original if type(processor) is FusedAttnProcessor else processor
        for name, processor in processors.items()
    }
