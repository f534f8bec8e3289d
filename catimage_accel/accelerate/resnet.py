"""The convolutional blocks: GroupNorm with the SiLU after it and the time embedding before it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from catimage_accel.accelerate.modules import is_hooked, named_like
from catimage_accel.accelerate.norms import FusedGroupNorm, FusedSiLU, shift_and_norm


@named_like(ResnetBlock2D)
class FusedResnetBlock2D(ResnetBlock2D):
    """A ``ResnetBlock2D`` whose second norm adds the time embedding."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Arguments and result are those of ``ResnetBlock2D``, whose own code runs what is out of the ordinary."""
        if temb is None or self.training or args or kwargs:
            return ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)
        hidden = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        hidden = self.nonlinearity(shift_and_norm(self.norm2, hidden, shift))
        hidden = self.conv2(self.dropout(hidden))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        hidden = shortcut + hidden
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


def reason_against(block: ResnetBlock2D) -> str | None:
    """Why the block keeps its own code, if it does. Blocks without a time embedding (decoders) have nothing to fuse."""
    if block.time_embedding_norm != "default":
        return f"its time_embedding_norm is {block.time_embedding_norm!r}"
    if block.upsample is not None or block.downsample is not None:
        return "it resamples"
    return None


def swap_resnets(component: nn.Module) -> None:
    """Blocks, all GroupNorms, and the SiLUs that follow them and nothing else."""
    owners = Counter(id(child) for module in component.modules() for child in module.children())
    for module in component.modules():
        norms, silu = _norms_before_silu(module)
        if (
            norms
            and type(silu) is nn.SiLU
            and owners[id(silu)] == 1
            and all(type(norm) in (nn.GroupNorm, FusedGroupNorm) for norm in norms)
            and not any(is_hooked(part) for part in (*norms, silu))
        ):
            for norm in norms:
                norm.__class__ = FusedGroupNorm
                norm.activation = "silu"
            silu.__class__ = FusedSiLU
            silu.norms_apply_it = True
    for module in component.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = FusedGroupNorm
        elif type(module) is ResnetBlock2D and module.time_emb_proj is not None and reason_against(module) is None:
            module.__class__ = FusedResnetBlock2D


def _norms_before_silu(module: nn.Module) -> tuple[list[Any], Any]:
    """The norms of a block whose results go through the block's activation and nowhere else, and that activation."""
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from catimage_accel.efficient_unet import EfficientUNet

    # "scale_shift" puts the time embedding between the second norm and the activation.
    if type(module) in (ResnetBlock2D, FusedResnetBlock2D) and module.time_embedding_norm != "scale_shift":
        return [module.norm1, module.norm2], module.nonlinearity
    if type(module) in (UNet2DConditionModel, EfficientUNet, Encoder, Decoder):
        return [module.conv_norm_out], module.conv_act
    return [], None
