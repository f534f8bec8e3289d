"""diffusers' blocks with what goes into INT8 layers quantized by the kernel that computes it.

Each norm or activation below is read by layers of its own block and by nothing else, which is what makes it sound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from catimage_accel.accelerate.resnet import reason_against as reason_against_resnet
from catimage_accel.accelerate.transformer import reason_against as reason_against_transformer
from catimage_accel.engines.int8.layers import Int8Conv2d, Int8Linear
from catimage_accel.engines.text import _CachedCrossAttention
from catimage_accel.kernels import geglu, group_norm, layer_norm

__all__ = ["fuse"]

INT8 = (Int8Conv2d, Int8Linear)


class Int8GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that writes INT8 where it has an ``output_scale``."""

    output_scale: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, output_scale=self.output_scale)


class Int8LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` that writes INT8 where it has an ``output_scale``."""

    output_scale: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, output_scale=self.output_scale)

    def after_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of ``x + residual``, and that sum."""
        scale = self.output_scale
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual, output_scale=scale)


class Int8GEGLU(GEGLU):
    """``GEGLU`` that writes INT8 where it has an ``output_scale``."""

    output_scale: float | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return geglu(self.proj(hidden_states), output_scale=self.output_scale)


class Int8ResnetBlock2D(ResnetBlock2D):
    """A ``ResnetBlock2D`` whose norms quantize, and whose second convolution adds the residual."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        hidden = self.conv1(_norm_silu(self.norm1, input_tensor, self.conv1))
        shift = None
        if self.time_emb_proj is not None and temb is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        hidden = self.dropout(_norm_silu(self.norm2, hidden, self.conv2, shift))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        if isinstance(self.conv2, Int8Conv2d) and self.conv2.takes_residual:
            hidden = self.conv2(hidden, shortcut)
        else:
            hidden = shortcut + self.conv2(hidden)
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


class Int8TransformerBlock(BasicTransformerBlock):
    """A ``BasicTransformerBlock`` whose norms take the sums before them, and whose last layer adds the last one."""

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
        extra = cross_attention_kwargs or {}
        attended = self.attn1(self.norm1(hidden_states), attention_mask=attention_mask, **extra)
        normalised, hidden = self.norm2.after_sum(attended, hidden_states)
        attended = self.attn2(
            normalised, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **extra
        )
        normalised, hidden = self.norm3.after_sum(attended, hidden)
        gated, last = self.ff.net[0](normalised), self.ff.net[2]
        if isinstance(last, Int8Linear) and last.takes_residual:
            return last(gated, hidden)
        return last(gated) + hidden


def _norm_silu(norm: nn.GroupNorm, x: Tensor, layer: nn.Module, shift: Tensor | None = None) -> Tensor:
    scale = layer.x_scale if isinstance(layer, Int8Conv2d) else None
    return group_norm(
        x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation="silu", shift=shift, output_scale=scale
    )


def fuse(unet: nn.Module) -> dict[str, str]:
    """Swaps in the classes above, in place, where the layers that read a norm all want the same INT8 numbers of it.

    Returns the name of every INT8 layer whose input something before it quantizes, and that something's name. The
    other layers quantize their input themselves.
    """
    fused: dict[str, str] = {}
    names = {module: name for name, module in unet.named_modules()}
    for block in names:
        if type(block) is ResnetBlock2D and _is_plain_resnet(block):
            block.__class__ = Int8ResnetBlock2D
            pairs: Iterator[Any] = iter(((block.norm1, block.conv1), (block.norm2, block.conv2)))
            fused |= {names[conv]: names[norm] for norm, conv in pairs if isinstance(conv, INT8)}
        elif type(block) is BasicTransformerBlock and _is_plain_transformer(block):
            block.__class__ = Int8TransformerBlock
            feed_in, _, feed_out = block.ff.net
            feed_in.__class__ = Int8GEGLU
            if isinstance(feed_out, Int8Linear) and feed_out.input_scale is None:
                feed_in.output_scale = feed_out.x_scale
                fused[names[feed_out]] = names[feed_in]
            readers = ([block.attn1.to_q, block.attn1.to_k, block.attn1.to_v], [block.attn2.to_q], [feed_in.proj])
            for norm, layers in zip((block.norm1, block.norm2, block.norm3), readers, strict=True):
                norm.__class__ = Int8LayerNorm
                fused |= _quantize_for(norm, layers, names)
        elif (
            type(block) is Transformer2DModel
            and type(getattr(block, "norm", None)) is nn.GroupNorm
            and isinstance(block.proj_in, INT8)
        ):
            block.norm.__class__ = Int8GroupNorm
            fused |= _quantize_for(block.norm, [block.proj_in], names)
    return fused


def _quantize_for(
    norm: Int8GroupNorm | Int8LayerNorm, layers: Sequence[Any], names: dict[nn.Module, str]
) -> dict[str, str]:
    """Has the norm write INT8 if all ``layers`` take the same; SmoothQuant's factors go into its weight and bias."""
    first = layers[0]
    if not all(isinstance(layer, INT8) and layer.x_scale == first.x_scale for layer in layers):
        return {}
    factors = first.input_scale
    for layer in layers[1:]:
        if (layer.input_scale is None) != (factors is None):
            return {}
        if factors is not None and not torch.equal(layer.input_scale, factors):
            return {}
    if factors is not None:
        for name in ("weight", "bias"):
            own = getattr(norm, name)
            if own is not None:
                setattr(norm, name, nn.Parameter((own.float() * factors).to(own.dtype), requires_grad=False))
        if norm.weight is None:
            norm.weight = nn.Parameter(factors.to(first.out_dtype), requires_grad=False)
    norm.output_scale = first.x_scale
    return {names[layer]: names[norm] for layer in layers}


def _is_plain_resnet(block: ResnetBlock2D) -> bool:
    return (
        reason_against_resnet(block) is None
        and type(block.nonlinearity) is nn.SiLU
        and type(block.norm1) is nn.GroupNorm
        and type(block.norm2) is nn.GroupNorm
    )


def _is_plain_transformer(block: BasicTransformerBlock) -> bool:
    feed = list(block.ff.net)
    return (
        reason_against_transformer(block) is None
        and block._chunk_size is None
        and not block.only_cross_attention
        and all(type(norm) is nn.LayerNorm for norm in (block.norm1, block.norm2, block.norm3))
        and len(feed) == 3
        and type(feed[0]) is GEGLU
        and type(feed[1]) is nn.Dropout
        and all(_reads_by_projections(attention) for attention in (block.attn1, block.attn2))
    )


def _reads_by_projections(attention: Attention) -> bool:
    """Whether the layer's input goes through its projections only, so that these may be all that understands it."""
    return (
        type(attention.processor) in (AttnProcessor, AttnProcessor2_0, _CachedCrossAttention)
        and not attention.fused_projections
        and not attention.residual_connection
        and not any((attention.group_norm, attention.spatial_norm, attention.norm_cross))
    )
