"""A component of a model folder as an ONNX file: what every graph engine is built from."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from catimage_accel.engines.components import Component
from catimage_accel.engines.deepcache import enter, inside, leave
from catimage_accel.engines.loading import load_unet, load_vae, read_config
from catimage_accel.engines.onnx_weights import fold_quantized_weights, narrow_weights, onnx_type, type_scales
from catimage_accel.engines.protocol import ADDED_CONDITIONS
from catimage_accel.engines.unavailable import EngineUnavailable, why_missing
from catimage_accel.quantize.fake import fake_quantized

if TYPE_CHECKING:
    from catimage_accel.engines.cache import CacheEntry, EngineCache

__all__ = ["MODEL_FILE", "export", "export_key"]

MODEL_FILE = "model.onnx"
OPSET = 20  # the newest that torch.onnx.export(dynamo=False) writes
BF16_OPSET = 22  # the first whose Conv and InstanceNormalization take bfloat16; the other operators are as in 20
FORMAT = "1"  # of what is written here: another number makes engines of other code stale
FORMAT_OF_TYPED_SCALES = "2"
PROTOBUF_LIMIT = 2**31 - 2**24  # bytes; with room for the graph beside its weights

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES: dict[str, tuple[list[str], list[str]]] = {
    "unet": (["sample", "timestep", "encoder_hidden_states"], ["noise"]),
    "unet-deep": (["sample", "timestep", "encoder_hidden_states"], ["noise", "deep_features"]),
    "unet-shallow": (["sample", "timestep", "encoder_hidden_states", "deep_features"], ["noise"]),
    "vae_decoder": (["latents"], ["image"]),
}
_AXES = {4: {0: "rows", 2: "height", 3: "width"}, 3: {0: "rows", 1: "tokens"}, 2: {0: "rows"}, 1: {0: "rows"}}


def export(
    component: Component,
    cache: EngineCache,
    *,
    high_precision: str = "fp32",
    weight_bits: int = 8,
    external_over: int = PROTOBUF_LIMIT,
) -> CacheEntry:
    """The cache's entry with the component as ``model.onnx``, written at the first call.

    The graph is strongly typed: weights, ``sample``, ``encoder_hidden_states``, ``text_embeds``, ``deep_features``,
    ``latents`` and the outputs are of the component's precision ("int8" and "fp8": of ``high_precision``, which is
    also that of the layers that aren't quantized); ``timestep`` (rows,) and ``time_ids`` (rows, 6) are float32. Rows,
    heights, widths and tokens are dynamic, of any value the UNet takes. Quantized layers have QuantizeLinear and
    DequantizeLinear around them, their weights stored as 8-bit initializers; with ``weight_bits`` 7 INT8 ones lie in
    -64 to 64, for processors that add no more (``machine.int8_weight_bits``).

    Inputs and outputs: "unet" sample, timestep, encoder_hidden_states (SDXL's kind: and text_embeds, time_ids) ->
    noise; "unet-deep" also gives deep_features, which "unet-shallow" takes; "vae_decoder" latents (divided by the
    scaling factor) -> image. Weights of more than ``external_over`` bytes go to ``model.onnx.data`` beside it.

    Raises :class:`EngineUnavailable` if onnx is missing or the part has an operator that ONNX can't express;
    FileNotFoundError or ValueError for folders that can't be read.
    """
    if (missing := why_missing(("onnx",), "onnx")) is not None:
        raise EngineUnavailable(missing)
    if weight_bits not in (7, 8):
        raise ValueError(f"weight_bits is {weight_bits}; accepted: 7 or 8")
    key = export_key(component, high_precision, weight_bits)
    return cache.get_or_build(key, lambda folder: _write(component, high_precision, weight_bits, folder, external_over))


def export_key(component: Component, high_precision: str = "fp32", weight_bits: int = 8) -> Any:
    """The ``EngineKey`` of :func:`export`."""
    import diffusers

    from catimage_accel.engines.cache import EngineKey

    scales = component.scales
    return EngineKey(
        component.model_sha256, component.name, component.precision, "" if scales is None else scales.digest,
        profile="dynamic", runtime="onnx", runtime_version=f"torch {torch.__version__}, diffusers "
        f"{diffusers.__version__}", device="any", os="any",
        options=(
            ("format", FORMAT_OF_TYPED_SCALES if scales and high_precision != "fp32" else FORMAT),
            *((("high_precision", high_precision),) if scales else ()),
            *((("weight_bits", "7"),) if component.precision == "int8" and weight_bits == 7 else ()),
        ),
    )  # fmt: skip


def _write(component: Component, high_precision: str, weight_bits: int, folder: Path, external_over: int) -> None:
    import onnx

    if high_precision not in _DTYPES:
        raise ValueError(f"high_precision is {high_precision!r}; accepted: {', '.join(_DTYPES)}")
    dtype = _DTYPES[high_precision if component.scales else component.precision]
    module, inputs = _decoder(component, dtype) if component.name == "vae_decoder" else _unet(component, dtype)
    names, outputs = _NAMES[component.name]
    names = [*names, *(ADDED_CONDITIONS if len(inputs) > len(names) else [])]
    traced = folder / "traced"  # torch writes one file a weight there if the model is too large for one in all
    traced.mkdir()
    _trace(component, module, inputs, names, outputs, traced / MODEL_FILE)
    del module
    model = onnx.load(str(traced / MODEL_FILE))
    shutil.rmtree(traced)
    _keep_inputs(model, dict(zip(names, inputs, strict=True)))
    if component.scales is not None:
        if dtype != torch.float32:
            type_scales(model, dtype)  # first: weights become multiples of the scales that the graph has
        fold_quantized_weights(model)
        if component.precision == "int8" and weight_bits == 7:
            narrow_weights(model)
    if dtype == torch.bfloat16:
        model.opset_import[0].version = BF16_OPSET
    external = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > external_over
    onnx.save_model(
        model, str(folder / MODEL_FILE), save_as_external_data=external, all_tensors_to_one_file=True,
        location=f"{MODEL_FILE}.data" if external else None,
    )  # fmt: skip
    onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)


def _trace(
    component: Component, module: nn.Module, inputs: Sequence[Tensor], names: list[str], outputs: list[str], path: Path
) -> None:
    try:
        with torch.no_grad():
            results = module(*inputs)
    except RuntimeError as error:
        raise EngineUnavailable(
            f"no ONNX graph of {component.model / component.part} ({component.name}), which does not run on the odd "
            f"sizes that it is traced with: {' '.join(str(error).splitlines()[:1])}; use engine 'eager'"
        ) from error
    results = (results,) if isinstance(results, Tensor) else results
    shapes = {name: tensor.ndim for name, tensor in zip([*names, *outputs], [*inputs, *results], strict=True)}
    log = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *_: None  # on failure torch prints the whole graph, asked or not
    for name, symbolic in _SYMBOLICS.items():
        torch.onnx.register_custom_op_symbolic(name, symbolic, OPSET)
    try:
        # The tracer warns of every Python number it makes a constant: those here don't depend on the sizes that vary.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module, tuple(inputs), str(path), dynamo=False, opset_version=OPSET, input_names=names,
                output_names=outputs, dynamic_axes={name: _AXES[axes] for name, axes in shapes.items()},
            )  # fmt: skip
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EngineUnavailable(
            f"no ONNX graph of {component.model / component.part} ({component.name}): {reason}; accepted: parts of "
            "operators that ONNX has, others run with engine 'eager'"
        ) from error
    finally:
        torch._C._jit_onnx_log = log
        for name in _SYMBOLICS:
            torch.onnx.unregister_custom_op_symbolic(name, OPSET)


def _keep_inputs(model: Any, inputs: dict[str, Tensor]) -> None:
    """Declares the inputs that the graph does not use and torch left out: text, for outer blocks without attention."""
    from onnx import helper

    known = {value.name: value for value in model.graph.input}
    for name, tensor in inputs.items():
        if name not in known:
            shape = [_AXES[tensor.ndim].get(axis, size) for axis, size in enumerate(tensor.shape)]
            known[name] = helper.make_tensor_value_info(name, onnx_type(tensor.dtype), shape)
    del model.graph.input[:]
    model.graph.input.extend(known[name] for name in inputs)


def _unet(component: Component, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    """The UNet as a module of positional inputs, and such inputs."""

    config = read_config(component.model / component.unet / "config.json")
    unet = load_unet(component.model, component.unet, dtype)
    kind = config.get("addition_embed_type")
    if kind not in (None, "text_time") or config.get("class_embed_type") or config.get("num_class_embeds"):
        found = kind if kind not in (None, "text_time") else "class labels"
        raise EngineUnavailable(
            f"{component.model / component.unet} takes added conditions of kind {found!r}; accepted: none or "
            "'text_time', others run with engine 'eager'"
        )
    if component.scales is not None:
        unet = fake_quantized(unet, component.scales)
    _normalize_in_float32(unet, dtype)
    factor = 2**unet.num_upsamplers
    # Sides that halving rounds, so that the traced UNet looks at the sizes of its skips instead of doubling.
    sides = (2 * factor + 1, 2 * factor + 3)
    features = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    features = features if isinstance(features, int) else features[0]
    inputs = [
        torch.zeros((2, config["in_channels"], *sides), dtype=dtype), torch.tensor([999.0, 1.0]),
        torch.zeros((2, 3, features), dtype=dtype),
    ]  # fmt: skip
    added: list[Tensor] = []
    if kind == "text_time":
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        added = [torch.zeros((2, width), dtype=dtype), torch.zeros((2, 6))]
    if component.name == "unet":
        return _Whole(unet), [*inputs, *added]
    if component.name == "unet-deep":
        return _Deep(unet), [*inputs, *added]
    with torch.no_grad():
        known = _Deep(unet)(*inputs, *added)[1]
    return _Shallow(unet), [*inputs, torch.zeros_like(known), *added]


def _decoder(component: Component, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    vae = load_vae(component.model, dtype, component.vae)
    _normalize_in_float32(vae, dtype)
    return _Decoder(vae), [torch.zeros((2, vae.config.latent_channels, 5, 7), dtype=dtype)]


def _round_tensor(g: Any, x: Any, scale: Any, zero_point: Any, low: Any, high: Any) -> Any:
    return _round(g, x, torch.as_tensor(_constant(scale)), torch.zeros((), dtype=torch.int8))


def _round_channels(g: Any, x: Any, scale: Any, zero_point: Any, axis: Any, low: Any, high: Any) -> Any:
    steps = _constant(scale)
    return _round(g, x, steps, torch.zeros(len(steps), dtype=torch.int8), axis_i=int(_constant(axis)))


def _constant(value: Any) -> Any:
    node = value.node()
    return getattr(node, node.kindOf("value"))("value")


def _round(g: Any, x: Any, scale: Tensor, zero_point: Tensor, **axis: int) -> Any:
    inputs = [g.op("Constant", value_t=scale.float()), g.op("Constant", value_t=zero_point)]
    rounded = g.op("DequantizeLinear", g.op("QuantizeLinear", x, *inputs, **axis), *inputs, **axis)
    # torch's own take the result for float32, and cast every 16-bit tensor that meets it.
    return rounded.setType(x.type())


_SYMBOLICS = {
    "aten::fake_quantize_per_tensor_affine": _round_tensor, "aten::fake_quantize_per_channel_affine": _round_channels,
}  # fmt: skip


class _Whole(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, *added: Tensor) -> Tensor:
        return self.unet(sample, timestep, text, added_cond_kwargs=_added(added), return_dict=False)[0]


class _Deep(_Whole):
    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, *added: Tensor) -> Any:
        outer = enter(self.unet, sample, timestep, text, _added(added))
        features = inside(self.unet, outer)
        return leave(self.unet, outer, features), features


class _Shallow(_Whole):
    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, *more: Tensor) -> Tensor:
        features, *added = more
        return leave(self.unet, enter(self.unet, sample, timestep, text, _added(added)), features)


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]


def _added(tensors: Sequence[Tensor]) -> dict[str, Tensor] | None:
    return dict(zip(ADDED_CONDITIONS, tensors, strict=True)) if tensors else None


def _normalize_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    """16-bit GroupNorms take their means in float32, as PyTorch's do; ONNX's InstanceNormalization would not."""
    if dtype == torch.float32:
        return
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.GroupNorm:
                setattr(parent, name, _Float32GroupNorm(child))


class _Float32GroupNorm(nn.Module):
    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.float()).to(x.dtype)
