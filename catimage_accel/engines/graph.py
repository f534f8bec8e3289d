"""The engine over built graphs: one class for every library that runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from catimage_accel.candidate import OWN_VAE
from catimage_accel.engines.cache import CacheEntry, EngineCache
from catimage_accel.engines.components import ShapeProfile
from catimage_accel.engines.deepcache import deep_rows
from catimage_accel.engines.eager import EagerEngine, SharedParts
from catimage_accel.engines.loading import check_model_folder, check_precision, latent_size, read_config
from catimage_accel.engines.planning import components_of
from catimage_accel.engines.protocol import DeepFeatures, TextBatch, TextState
from catimage_accel.engines.runner import Runner, Runtime
from catimage_accel.engines.unavailable import EngineUnavailable, tell_once
from catimage_accel.lora import UNetPart

__all__ = ["GraphEngine"]

_UNETS = ("unet", "unet-deep", "unet-shallow")


class GraphEngine:
    """A UNet and its decoders as graphs of a :class:`~.runner.Runtime`; the text encoders stay in PyTorch.

    Graphs take the text's state, so a :class:`TextState` has no keys and values. Batches larger than the
    runtime's largest are run in pieces. What the runtime can't do while it runs (a size it was not built for, a build
    that fails) the eager engine does in its place, to the same picture, and one warning says so. See
    :class:`~.protocol.Engine` for the calls.
    """

    def __init__(
        self,
        runtime: Runtime,
        model: Path,
        unet: UNetPart = "unet",
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        shared: SharedParts | None = None,
        quantization: Path | None = None,
        cache: EngineCache | None = None,
    ) -> None:
        """Builds the UNet for a batch of two, or takes it from ``cache``, and tries it.

        Raises :class:`EngineUnavailable` if the runtime can't; FileNotFoundError or ValueError, before any weight is
        read, for folders that can't be run.
        """
        self.runtime, self.name = runtime, runtime.name
        self.device = torch.device(device)
        self.dtype = check_precision(precision, self.device)
        check_model_folder(model, unet)
        if (reason := runtime.why_not(self.device)) is not None:
            raise EngineUnavailable(reason)
        self.shared = SharedParts(model, self.dtype, self.device) if shared is None else shared
        config = read_config(model / unet / "config.json")
        self.channels: int = config["in_channels"]
        self.sample_size = latent_size(config)
        self.scale_factor: int = self.shared.scale_factor
        self.profile = ShapeProfile(
            runtime.rows, *self.sample_size, self.shared.text.tokens, self.shared.text.features
        )
        self._source = (model, unet, precision, quantization)
        self._cache = EngineCache() if cache is None else cache
        components = components_of(model, unet, precision, quantization, self.device, deepcache=True)
        self._runners: dict[str, Runner] = {
            one.name: runtime.runner(one, self.profile, self._cache, self.device) for one in components
        }
        self._instead: EagerEngine | None = None
        self._given_up: set[str] = set()
        self._own_text: WeakKeyDictionary[TextBatch, TextBatch] = WeakKeyDictionary()
        self._deepcache = False
        self._try("unet")

    @property
    def given_up(self) -> frozenset[str]:
        """The components that PyTorch runs in the runtime's place, because the runtime failed at one."""
        return frozenset(self._given_up)

    @property
    def batch_invariant(self) -> bool:
        return self.runtime.batch_invariant and not self._given_up

    def prepare_deepcache(self) -> None:
        """Builds and tries the graphs that DeepCache needs; raises EngineUnavailable if the runtime can't."""
        if not self._deepcache:
            self._try("unet-shallow", deep_features=self._try("unet-deep")["deep_features"])
            self._deepcache = True

    def build(self, advance: Any = lambda _: None, *, deepcache: bool = False, vae: str = OWN_VAE) -> list[CacheEntry]:
        """Builds for all batch sizes now; ``advance`` is told what was built."""
        names = [*(_UNETS if deepcache else _UNETS[:1]), self._decoder(vae)]
        return [entry for name in names for entry in self._runners[name].build(advance)]

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str]) -> list[TextState]:
        encoded = self.shared.text.encode(prompts)
        return [TextState(prompt, one) for prompt, one in zip(prompts, encoded, strict=True)]

    def unconditional(self) -> TextState:
        return TextState("", self.shared.text.unconditional())

    @torch.inference_mode()
    def gather(self, states: Sequence[TextState]) -> TextBatch:
        return TextBatch.gather(states)

    @torch.inference_mode()
    def denoise(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: TextBatch,
        added: Mapping[str, Any] | None = None,
        *,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        names = _UNETS[:1] if deep is None else _UNETS[1:]
        if not self._given_up.intersection(names) and self._covers(sample):
            inputs = {
                "sample": sample.to(self.dtype), "timestep": timestep.float(), "encoder_hidden_states": text.hidden,
                **(added or {}),
            }  # fmt: skip
            try:
                if deep is None:
                    return self._run("unet", inputs)["noise"].float()
                return self._with_deep_features(inputs, deep).float()
            except EngineUnavailable as error:
                self._given_up.update(names)
                tell_once(f"{self.name} can't go on with {'/'.join(map(str, self._source[:2]))}: {error}; 'eager' does")
        return self._eager().denoise(sample, timestep, self._text_for_eager(text), added, deep=deep)

    @torch.inference_mode()
    def decode(self, latents: Tensor, vae: str = OWN_VAE) -> Tensor:
        name = self._decoder(vae)
        if name not in self._given_up and self._covers(latents):
            scaled = latents.float() / self.shared.vae(vae).config.scaling_factor
            try:
                return self._run(name, {"latents": scaled.to(self.device)})["image"].float()
            except EngineUnavailable as error:
                self._given_up.add(name)
                folder = self._source[0] / vae
                tell_once(f"{self.name} has no decoder for {folder}: {error}; PyTorch decodes in its place")
        return self.shared.decode(latents, vae)

    def _decoder(self, vae: str) -> str:
        """The name of the runner that decodes with ``vae``; the runner is made at the first call."""
        name = "vae_decoder" if vae == OWN_VAE else f"vae_decoder ({vae})"
        if name not in self._runners:
            decoder = components_of(*self._source, self.device, deepcache=False, vae=vae)[-1]
            self._runners[name] = self.runtime.runner(decoder, self.profile, self._cache, self.device)
        return name

    def _with_deep_features(self, inputs: dict[str, Tensor], deep: DeepFeatures) -> Tensor:
        """Rows at a refresh run the whole UNet, the others the outermost blocks with the features they have."""
        count = len(inputs["sample"])
        rows = deep_rows(deep, count)
        if len(rows) == count:
            results = self._run("unet-deep", inputs)
            deep.features = results["deep_features"].to(self.dtype)
            return results["noise"]
        assert deep.features is not None
        if not rows:
            return self._run("unet-shallow", {**inputs, "deep_features": deep.features})["noise"]
        fresh = torch.tensor(rows, device=self.device)
        held = torch.tensor(sorted(set(range(count)) - set(rows)), device=self.device)
        results = self._run("unet-deep", {name: value[fresh] for name, value in inputs.items()})
        noise = torch.empty_like(inputs["sample"], dtype=results["noise"].dtype)
        noise[fresh] = results["noise"]
        deep.features[fresh] = results["deep_features"].to(deep.features)
        features = deep.features[held]
        others = {name: value[held] for name, value in inputs.items()}
        noise[held] = self._run("unet-shallow", {**others, "deep_features": features})["noise"]
        return noise

    def _run(self, name: str, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        runner, limit = self._runners[name], self.profile.rows[-1]
        rows = len(next(iter(inputs.values())))
        if rows <= limit:
            return runner(inputs)
        pieces = [
            runner({key: value[start : start + limit] for key, value in inputs.items()})
            for start in range(0, rows, limit)
        ]
        return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}

    @torch.inference_mode()
    def _try(self, name: str, **more: Tensor) -> Mapping[str, Tensor]:
        """Two rows of noise, one guided image's; EngineUnavailable unless what comes out are numbers."""
        profile, generator = self.profile, torch.Generator().manual_seed(0)
        sample = torch.randn((2, self.channels, *self.sample_size), generator=generator)
        hidden = torch.randn((2, profile.tokens, profile.text_features), generator=generator)
        pooled = self.shared.text.pooled_features
        text = TextBatch(hidden, [], None if pooled is None else torch.randn((2, pooled), generator=generator))
        added = text.added_conditions(*(side * self.scale_factor for side in self.sample_size)) or {}
        inputs = {
            "sample": sample, "timestep": torch.tensor([999.0, 1.0]), "encoder_hidden_states": hidden, **added, **more,
        }  # fmt: skip
        results = self._run(name, {key: value.to(self.device) for key, value in inputs.items()})
        for key, value in results.items():
            if not bool(torch.isfinite(value).all()):
                raise EngineUnavailable(f"{name} in {self._source[2]} gives {key} that is not finite; try 'fp32'")
        return results

    def _covers(self, sample: Tensor) -> bool:
        """Whether the runtime takes this size; if not, says so once."""
        if self.runtime.any_size or tuple(sample.shape[2:]) == self.sample_size:
            return True
        tell_once(
            f"{self.name} was built for latents of {self.sample_size[0]}x{self.sample_size[1]}; those of "
            f"{sample.shape[2]}x{sample.shape[3]} are drawn by 'eager'"
        )
        return False

    def _eager(self) -> EagerEngine:
        if self._instead is None:
            model, unet, precision, quantization = self._source
            self._instead = EagerEngine(model, unet, precision, self.device, self.shared, quantization)
        return self._instead

    def _text_for_eager(self, text: TextBatch) -> TextBatch:
        if text not in self._own_text:
            self._own_text[text] = self._eager().with_layers(text)
        return self._own_text[text]
