"""SnapFusion's image decoder (arXiv 2306.00980, section 3.2): half of the channels, taught by the whole decoder.

It is trained on latents that the model drew, and on nothing else: no picture is needed, and what it learns to decode is
what it will be given.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from catimage_accel.efficient_decoder import EfficientDecoderKL
from catimage_accel.quantize.quantization import weights_sha256
from catimage_accel.snapfusion.generation import generated_latents
from catimage_accel.snapfusion.preview import decode_scaled, decoded_pictures, grid
from catimage_accel.snapfusion.pruning import pruned_decoder
from catimage_accel.snapfusion.recipes import DecoderRecipe, read_recipe
from catimage_accel.snapfusion.run import Run
from catimage_accel.training.config import PRECISIONS, TrainConfig
from catimage_accel.training.loop import Trainer
from catimage_accel.training.process import check_alone
from catimage_accel.training.record import run_record

HELD_OUT_SHARE = 0.05
SHOWN = 8
SQUARED_WEIGHT = 4.0


def distill_decoder(
    vae: AutoencoderKL,
    student: EfficientDecoderKL,
    latents: Tensor,
    config: TrainConfig,
    folder: Path,
    device: torch.device,
    recipe: dict[str, object] | None = None,
) -> EfficientDecoderKL:
    """Train ``student``'s decoder to give what ``vae``'s gives; returns it, in float32, all else in it as it was.

    ``latents`` (n, C, h, w) are scaled as a UNet gives them. Their last 5%, one at least, are for validation only: PSNR
    in dB of the student's pictures against the whole decoder's, peak 255, and a sheet of both in ``folder/validation``.
    Goes on from ``folder``'s checkpoint. ValueError for latents that are too few, not finite or of other channels.
    """
    _check(latents, vae)
    held_out = max(1, round(HELD_OUT_SHARE * len(latents)))
    seen, unseen = latents[:-held_out], latents[-held_out:]
    teacher = copy.deepcopy(vae).eval().requires_grad_(False).to(device)
    student.requires_grad_(False)
    for part in (student.decoder, student.post_quant_conv):
        if part is not None:
            part.requires_grad_(True)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    frozen = {name: value.clone() for name, value in student.state_dict().items() if name not in trained}

    def validate(step: int) -> dict[str, float]:
        shown = unseen[:SHOWN].to(device)
        pictures = [*decoded_pictures(teacher, shown), *decoded_pictures(student, shown)]
        target = folder / "validation"
        target.mkdir(parents=True, exist_ok=True)
        grid(pictures, len(shown)).save(target / f"step-{step:06d}.png")
        return {"psnr": psnr_between(teacher, student, unseen.to(device))}

    digest = hashlib.sha256(latents.float().contiguous().numpy().tobytes()).hexdigest()[:16]
    told = {**(recipe or {}), "latents": digest}
    trainer = Trainer(student, config, folder, device, folder.name, recipe=told, validate=validate)
    teacher = teacher.to(PRECISIONS[config.precision])

    def loss_fn(_: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(seen), (config.batch_size,), generator=generator)
        given = seen[index].to(device)
        with torch.no_grad():
            wanted = decode_scaled(teacher, given)
        made = decode_scaled(student, given)
        return F.l1_loss(made, wanted) + SQUARED_WEIGHT * F.mse_loss(made, wanted)

    trainer.run(loss_fn)
    # The trainer brought all of it to its precision, which what was not trained is not to be rounded to.
    student.float().load_state_dict(frozen | trainer.ema_state())
    return student


def distill_decoder_recipe(path: Path, work: Path, device: torch.device, steps: int | None = None) -> Path:
    """Run the decoder recipe ``path``, or go on with it; returns the folder of the finished VAE.

    ValueError in one of several processes.
    """
    recipe = read_recipe(path, DecoderRecipe)
    check_alone("distill decoder")
    run = Run(path, work, device, recipe.model, recipe.training.precision_on(device))
    prompts = run.prompts(recipe.prompts, recipe.number, training=True)
    latents = generated_latents(
        run.model, prompts, work, device, unet=recipe.unet, steps=recipe.steps, sampler=recipe.sampler,
        guidance_scale=recipe.guidance_scale, seed=recipe.seed,
    )  # fmt: skip
    config = recipe.training.config(device, recipe.validate_every, steps)
    told = recipe.model_dump(exclude={"training"}) | {"vae weights": weights_sha256(run.model, "vae")[:16]}
    student = distill_decoder(run.vae, pruned_decoder(run.vae, recipe.keep), latents, config, run.folder, device, told)
    return run.write(student, told | run_record(run.folder, config, device), "vae")


@torch.no_grad()
def psnr_between(whole: AutoencoderKL, student: AutoencoderKL, latents: Tensor, batch: int = 16) -> float:
    """Mean over pictures of the PSNR in dB, peak 255, of ``student``'s pictures of ``latents`` against ``whole``'s."""
    values = []
    for part in latents.split(batch):
        wanted, made = (decode_scaled(vae, part).clamp(-1, 1) for vae in (whole, student))
        values.append(-10 * ((wanted - made) / 2).square().mean(dim=(1, 2, 3)).clamp(min=1e-12).log10())
    return float(torch.cat(values).mean())


def _check(latents: Tensor, vae: AutoencoderKL) -> None:
    if latents.ndim != 4 or latents.shape[1] != vae.config.latent_channels:
        raise ValueError(
            f"latents are {tuple(latents.shape)}; accepted: (n, {vae.config.latent_channels}, height, width)"
        )
    if len(latents) < 2:
        raise ValueError(f"latents are of {len(latents)} pictures; accepted: at least 2, one of them for validation")
    broken = ~torch.isfinite(latents).flatten(1).all(1)
    if broken.any():
        raise ValueError(f"{int(broken.sum())} of {len(latents)} latents have NaN or infinity; accepted: finite ones")
