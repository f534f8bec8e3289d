"""diffusers' layer skipping (its guiders for perturbed attention and skipped layers) on swapped modules."""

from __future__ import annotations

from dataclasses import replace

from diffusers.hooks import _helpers as known  # the registries have no public name
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0

from catimage_accel.accelerate.attention import FusedAttnProcessor
from catimage_accel.accelerate.transformer import FusedTransformerBlock


def register_layer_skip() -> None:
    """Tells diffusers' registries, which go by exact classes, that ours are skipped as those they stand in for."""
    processors, blocks = known.AttentionProcessorRegistry, known.TransformerBlockRegistry
    processors.register(FusedAttnProcessor, processors.get(AttnProcessor2_0))
    blocks.register(FusedTransformerBlock, replace(blocks.get(BasicTransformerBlock)))
