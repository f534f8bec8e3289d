"""Latents that a model draws of prompts: what an image decoder is taught on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from catimage_accel.candidate import Candidate
from catimage_accel.quantize.quantization import weights_sha256
from catimage_accel.storage import file_sha256, write_tensors

CHUNK = 100


def generated_latents(
    model: Path,
    prompts: Sequence[str],
    cache: Path,
    device: torch.device,
    *,
    unet: str = "unet",
    steps: int = 10,
    sampler: str = "dpmsolver++",
    guidance_scale: float = 4.0,
    seed: int = 0,
) -> Tensor:
    """Final latents of ``prompts``, float32 (prompts, C, h, w), scaled as the UNet gives them.

    Drawn by the executor, from the seeds ``seed``, ``seed + 1``, ... They are kept in ``cache``, chunk by chunk, by all
    that they depend on, so that a run that was stopped goes on. What can't be drawn raises the error that stopped it.
    """
    from catimage_accel.executor import Executor, Job

    candidate = Candidate("generation", str(model), steps, sampler, guidance_scale, unet)
    made_by = json.dumps([_drawn_with(model, unet), steps, sampler, guidance_scale, seed])
    executor = Executor(device=device, resolve_model=lambda _: model)
    parts = []
    for start in track(range(0, len(prompts), CHUNK), f"drawing {len(prompts)} latents"):
        chunk = list(prompts[start : start + CHUNK])
        digest = hashlib.sha256(f"{made_by} {start} {json.dumps(chunk)}".encode()).hexdigest()[:16]
        path = cache / "generated" / f"{digest}.safetensors"
        if not path.exists():
            jobs = (
                Job(prompt, candidate, torch.Generator().manual_seed(seed + start + index), key=index)
                for index, prompt in enumerate(chunk)
            )
            found: dict[int, Tensor] = {}
            for finished in executor.run(jobs):
                if finished.error is not None:
                    raise finished.error
                assert finished.latents is not None
                found[finished.key] = finished.latents.cpu()
            write_tensors(path, {"latents": torch.stack([found[index] for index in range(len(chunk))])})
        parts.append(load_file(path)["latents"])
    return torch.cat(parts)


def _drawn_with(model: Path, unet: str) -> list[str]:
    """Digests of the files of ``model`` that its latents of a prompt depend on."""
    configs = [model / part / "config.json" for part in (unet, "vae", "text_encoder")]
    scheduler, words = model / "scheduler" / "scheduler_config.json", sorted((model / "tokenizer").glob("*"))
    files = [scheduler, *configs, *words, *sorted((model / "text_encoder").glob("*.safetensors"))]
    return [weights_sha256(model, unet), *(file_sha256(file) for file in files if file.is_file())]
