"""Swaps the fused kernels into a diffusers pipeline, in place, and back.

Nothing is rebuilt: an attention layer gets another processor, a GroupNorm or SiLU module another class. Parameters,
hooks, names and ``state_dict`` keys stay the objects they were, so weights loaded, moved or trained meanwhile stay, and
what was swapped can be told from the modules alone, whichever pipelines share them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from catimage_accel.kernels import attention, group_norm
from catimage_accel.kernels.attention import MAX_TRITON_HEAD_DIM

__all__ = ["AccelerationReport", "accelerate", "acceleration_report", "restore"]

Pipeline = TypeVar("Pipeline")
COMPONENTS = ("unet", "vae")


@dataclass(frozen=True)
class AccelerationReport:
    """What runs on the fused kernels. Names are module paths, from the pipeline's component on."""

    attention: tuple[str, ...]
    group_norm: tuple[str, ...]
    group_norm_silu: tuple[str, ...]
    left_alone: dict[str, str]  # module path -> why


def accelerate(pipe: Pipeline, *, tier: Literal["lossless"] = "lossless") -> Pipeline:
    """Swaps fused attention and GroupNorm(+SiLU) into the UNet and the image decoder of a pipeline, in place.

    Works on every pipeline whose ``unet`` is a diffusers ``UNet2DConditionModel`` (SD1.x, SD2.x, SDXL, text-to-image
    or other). Repeating it is harmless, and needed after something has set new attention processors.
    ``acceleration_report`` lists what was swapped; ``restore`` undoes it.

    Args:
        pipe: The pipeline.
        tier: "lossless": the same maths, only rounding differs.

    Returns:
        ``pipe``, the same object.

    Warns:
        UserWarning: Attention processors that someone set (IP-Adapter, custom) were left alone; names them.

    Raises:
        ValueError: ``tier`` is unknown, or the pipeline has no UNet of that kind.
    """
    if tier != "lossless":
        raise ValueError(f"tier is {tier!r}; accepted: 'lossless'")
    for component in dict(_components(pipe)).values():
        _swap_attention(component)
        _swap_norms(component)
    foreign = {
        name: processor
        for name, layer in _attention_layers(pipe)
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


def restore(pipe: Pipeline) -> Pipeline:
    """Undoes ``accelerate``: the original processor objects and module classes; anything set since then stays.

    Returns:
        ``pipe``, the same object.

    Raises:
        ValueError: The pipeline has no ``UNet2DConditionModel``.
    """
    for _, component in _components(pipe):
        component.set_attn_processor(
            {
                name: processor.original if type(processor) is FusedAttnProcessor else processor
                for name, processor in component.attn_processors.items()
            }
        )
        for module in component.modules():
            if type(module) is FusedGroupNorm:
                module.__class__ = nn.GroupNorm
                module.__dict__.pop("activation", None)
            elif type(module) is FusedSiLU:
                module.__class__ = nn.SiLU
                module.__dict__.pop("norms_apply_it", None)
    return pipe


def acceleration_report(pipe: Any) -> AccelerationReport:
    """What of a pipeline runs on the fused kernels at this moment, and what does not and why.

    Raises:
        ValueError: The pipeline has no ``UNet2DConditionModel``.
    """
    attention_names = []
    left_alone = {}
    for name, layer in _attention_layers(pipe):
        if type(layer.processor) is FusedAttnProcessor:
            attention_names.append(name)
        elif type(layer.processor) is not AttnProcessor2_0:
            left_alone[name] = f"its processor is a {type(layer.processor).__name__}"
        elif _head_dim(layer) > MAX_TRITON_HEAD_DIM:
            left_alone[name] = f"its head_dim, {_head_dim(layer)}, is above {MAX_TRITON_HEAD_DIM}"
        else:
            left_alone[name] = "not accelerated"
    norms: dict[str | None, list[str]] = {None: [], "silu": []}
    for root, component in _components(pipe):
        for name, module in component.named_modules():
            if type(module) is FusedGroupNorm:
                norms[module.activation].append(f"{root}.{name}")
            elif isinstance(module, nn.GroupNorm):
                plain = type(module) is nn.GroupNorm
                left_alone[f"{root}.{name}"] = "not accelerated" if plain else f"it is a {type(module).__name__}"
    return AccelerationReport(tuple(attention_names), tuple(norms[None]), tuple(norms["silu"]), left_alone)


class FusedAttnProcessor(AttnProcessor2_0):
    """``AttnProcessor2_0`` over ``kernels.attention``.

    A subclass, as pipelines ask for the type of a processor; made without arguments where diffusers makes new
    processors of the present type (``load_ip_adapter``).
    """

    def __init__(self, original: AttnProcessor2_0 | None = None) -> None:
        super().__init__()
        self.original = AttnProcessor2_0() if original is None else original

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
        """Arguments and result are those of ``AttnProcessor2_0``, which also runs where there is a mask."""
        if attention_mask is not None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)

        q, k, v = (
            projected.unflatten(-1, (attn.heads, -1))
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
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
        return hidden_states / attn.rescale_output_factor


class FusedGroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` over ``kernels.group_norm``, with the SiLU that follows it where ``activation`` is "silu"."""

    activation: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is (batch, channels, ...)."""
        # A hook that bound this method may outlive ``restore``, which takes the attribute away.
        activation = getattr(self, "activation", None)
        # Under autocast, and for mixed dtypes, torch's own op decides what to compute in.
        if torch.is_autocast_enabled(x.device.type) or (self.weight is not None and self.weight.dtype != x.dtype):
            y = super().forward(x)
            return nn.functional.silu(y) if activation == "silu" else y
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, activation=activation)


class FusedSiLU(nn.SiLU):
    """The SiLU of a block whose norms apply it to images: left to do are the block's other inputs (time embedding)."""

    norms_apply_it: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """``x`` has any shape; a 4D one is an image."""
        if x.ndim == 4 and getattr(self, "norms_apply_it", False):
            return x
        return nn.functional.silu(x, inplace=self.inplace)


def _components(pipe: Any) -> Iterator[tuple[str, Any]]:
    """The pipeline's models that are accelerated, by name; what ``torch.compile`` wraps is unwrapped."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    models = {name: getattr(pipe, name, None) for name in COMPONENTS}
    models = {name: getattr(model, "_orig_mod", model) for name, model in models.items()}
    if not isinstance(models["unet"], UNet2DConditionModel):
        raise ValueError(
            f"pipe is a {type(pipe).__name__} with unet {type(models['unet']).__name__}; "
            "accepted: a diffusers pipeline whose unet is a UNet2DConditionModel"
        )
    return ((name, model) for name, model in models.items() if hasattr(model, "set_attn_processor"))


def _attention_layers(pipe: Any) -> Iterator[tuple[str, Attention]]:
    for root, component in _components(pipe):
        for name, module in component.named_modules():
            if isinstance(module, Attention):
                yield f"{root}.{name}", module


def _head_dim(layer: Attention) -> int:
    return int(layer.inner_dim // layer.heads)


def _swap_attention(component: Any) -> None:
    layers = dict(component.named_modules())
    processors = component.attn_processors
    for name, processor in processors.items():
        layer = layers[name.removesuffix(".processor")]
        if type(processor) is AttnProcessor2_0 and _head_dim(layer) <= MAX_TRITON_HEAD_DIM:
            processors[name] = FusedAttnProcessor(processor)
    component.set_attn_processor(processors)


def _swap_norms(component: nn.Module) -> None:
    owners = Counter(id(child) for module in component.modules() for child in module.children())
    for module in component.modules():
        norms, silu = _norms_before_silu(module)
        if (
            norms
            and type(silu) is nn.SiLU
            and owners[id(silu)] == 1
            and all(type(norm) in (nn.GroupNorm, FusedGroupNorm) for norm in norms)
            and not any(_is_hooked(part) for part in (*norms, silu))
        ):
            for norm in norms:
                norm.__class__ = FusedGroupNorm
                norm.activation = "silu"
            silu.__class__ = FusedSiLU
            silu.norms_apply_it = True
    for module in component.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = FusedGroupNorm


def _norms_before_silu(module: nn.Module) -> tuple[list[Any], Any]:
    """The norms of a block whose results go through the block's activation and nowhere else, and that activation."""
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    # "scale_shift" puts the time embedding between the second norm and the activation.
    if type(module) is ResnetBlock2D and module.time_embedding_norm != "scale_shift":
        return [module.norm1, module.norm2], module.nonlinearity
    if type(module) in (UNet2DConditionModel, Encoder, Decoder):
        return [module.conv_norm_out], module.conv_act
    return [], None


def _is_hooked(module: nn.Module) -> bool:
    """Whether someone sees or replaces what goes in or out of the module."""
    return "forward" in vars(module) or any(
        value for name, value in vars(module).items() if name.endswith("_hooks") and "state_dict" not in name
    )
