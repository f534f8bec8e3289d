"""Cross-attention that reads keys and values computed once a prompt instead of once a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from catimage_accel.engines.protocol import KeyValue, TextBatch

__all__ = ["Attend", "CachedText", "attend"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries, keys, values) -> their mixture, all of (rows, tokens, heads, head_dim)."""


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's: what ``kernels.attention`` is by definition, but that package is slow to import."""
    return F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (query, key, value))).transpose(1, 2)


class CachedText:
    """The cross-attention layers of one UNet, taught to read the keys and values of ``current``.

    Building it replaces the processors of the layers it understands; ``current`` must be set to the batch's
    :class:`TextBatch` before the UNet is called. Layers with projections of their own making (added keys, norms of
    queries, a processor that isn't diffusers' plain one) are left as they are and read ``encoder_hidden_states``.
    """

    def __init__(self, unet: nn.Module, attend: Attend = attend) -> None:
        from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

        plain = (AttnProcessor, AttnProcessor2_0)
        self.current: TextBatch | None = None
        self._layers = [
            module
            for module in unet.modules()
            if isinstance(module, Attention) and isinstance(module.processor, plain) and _is_plain_cross(module)
        ]
        for index, layer in enumerate(self._layers):
            layer.set_processor(_CachedCrossAttention(self, index, attend))

    def keys_values(self, hidden: Tensor) -> list[KeyValue]:
        """Every layer's keys and values, (prompts, tokens, heads, head_dim), of ``hidden`` (prompts, tokens, dim)."""
        heads = [(layer, (*hidden.shape[:2], layer.heads, -1)) for layer in self._layers]
        return [(layer.to_k(hidden).view(shape), layer.to_v(hidden).view(shape)) for layer, shape in heads]


class _CachedCrossAttention:
    def __init__(self, text: CachedText, index: int, attend: Attend) -> None:
        self._text, self._attend = text, attend
        self._index = index

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        assert self._text.current is not None
        key, value = self._text.current.layers[self._index]
        rows, positions, _ = hidden_states.shape
        query = attn.to_q(hidden_states).view(rows, positions, attn.heads, -1)
        return attn.to_out[0](self._attend(query, key, value).reshape(rows, positions, -1))


def _is_plain_cross(attn: Any) -> bool:
    extras = (attn.group_norm, attn.spatial_norm, attn.norm_cross, attn.norm_q, attn.norm_k, attn.added_kv_proj_dim)
    return (
        attn.is_cross_attention
        and not any(extras)
        and not attn.residual_connection
        and attn.rescale_output_factor == 1.0
        and attn.to_out is not None
    )
