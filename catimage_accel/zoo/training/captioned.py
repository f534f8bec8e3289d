"""The training scenes as latents with captions, for whatever denoiser is trained on them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from catimage_accel.storage import write_tensors
from catimage_accel.training.config import computes_in_bf16
from catimage_accel.zoo.captions import caption
from catimage_accel.zoo.scenes import Scene, SceneSpec
from catimage_accel.zoo.training.autoencoder import encode
from catimage_accel.zoo.training.data import rendered, scene, spec

SCENES = 96_000


class CaptionedScenes:
    """The first ``scenes`` training scenes: ``specs``, and ``latents`` (scenes, C, 16, 16), scaled means in bf16.

    ``weight`` tells how often a scene is taken, against others. The renderings and latents are kept in ``cache``.
    """

    def __init__(
        self, cache: Path, vae: AutoencoderKL, weight: Callable[[SceneSpec], float], scenes: int = SCENES
    ) -> None:
        self.name = f"scenes-{scenes}-{weight.__name__}"
        self.latents = _latents(cache, vae, scenes)
        self.specs = [spec(index, "train") for index in range(scenes)]
        self.weights = torch.tensor([weight(said) for said in self.specs])

    @cached_property
    def layouts(self) -> list[Scene]:
        """Where the objects of each scene are."""
        return [scene(index, "train") for index in range(len(self.specs))]

    def choose(self, size: int, generator: torch.Generator) -> Tensor:
        """Indices of ``size`` scenes, int64."""
        return torch.multinomial(self.weights, size, generator=generator)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Clean latents, float32 (size, C, 16, 16), and one caption each."""
        index = self.choose(size, generator)
        words = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        return self.latents[index].float(), [caption(self.specs[i], words) for i in index.tolist()]


def _latents(cache: Path, vae: AutoencoderKL, scenes: int) -> Tensor:
    """Scaled latent means of the training scenes, bf16 (scenes, channels, 16, 16); kept in ``cache``, by VAE."""
    digest = hashlib.sha256()
    for weight in vae.state_dict().values():
        digest.update(weight.cpu().float().numpy().tobytes())
    path = cache / f"latents-{scenes}-{digest.hexdigest()[:12]}.safetensors"
    if not path.exists():
        pictures = rendered(scenes, "train", cache)
        dtype = torch.bfloat16 if computes_in_bf16(vae.device) else torch.float32
        encoder = copy.deepcopy(vae).to(dtype)  # who gave the VAE goes on using it
        latents = (encode(encoder, pictures) * vae.config.scaling_factor).to(torch.bfloat16)
        write_tensors(path, {"latents": latents})
    return load_file(path)["latents"]
