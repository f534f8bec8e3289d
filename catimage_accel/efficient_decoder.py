"""An AutoencoderKL whose decoder is narrower than its encoder: SnapFusion's efficient image decoder.

In a picture of few steps the decoder's share of the time is large. Nothing else of the model needs to change for a
narrower one, the encoder included, which image-to-image pipelines use (arXiv 2306.00980, section 3.2).
"""

from __future__ import annotations

from typing import Any

# A pipeline folder names this module; diffusers looks in it for the base class that tells how to load the class named.
from diffusers import AutoencoderKL, ModelMixin  # noqa: F401
from diffusers.models.autoencoders.vae import Decoder

from catimage_accel.extended_config import extends_config

__all__ = ["EfficientDecoderKL"]


@extends_config
class EfficientDecoderKL(AutoencoderKL):
    """``AutoencoderKL`` with two more config keys, saved and loaded as it is.

    ``decoder_block_out_channels`` are the decoder's channels, from the picture inwards, as many as
    ``block_out_channels``; ``decoder_norm_num_groups`` divides them all. None means those of the encoder.
    """

    def __init__(
        self,
        decoder_block_out_channels: tuple[int, ...] | None = None,
        decoder_norm_num_groups: int | None = None,
        **config: Any,
    ) -> None:
        super().__init__(**config)
        channels = tuple(decoder_block_out_channels or self.config.block_out_channels)
        groups = decoder_norm_num_groups or self.config.norm_num_groups
        if len(channels) != len(self.config.block_out_channels):
            raise ValueError(
                f"decoder_block_out_channels is {channels}; accepted: {len(self.config.block_out_channels)} of them, "
                "one a block"
            )
        if any(number < 1 or number % groups for number in channels):
            raise ValueError(
                f"decoder_block_out_channels is {channels}; accepted: multiples of decoder_norm_num_groups, {groups}"
            )
        self.register_to_config(decoder_block_out_channels=channels, decoder_norm_num_groups=groups)
        self.decoder = Decoder(
            in_channels=self.config.latent_channels, out_channels=self.config.out_channels,
            up_block_types=self.config.up_block_types, block_out_channels=channels,
            layers_per_block=self.config.layers_per_block, norm_num_groups=groups, act_fn=self.config.act_fn,
            mid_block_add_attention=self.config.mid_block_add_attention,
        )  # fmt: skip
