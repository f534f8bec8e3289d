"""The model card: what the runs recorded and what was measured, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_INTRODUCTION = """\
# Model card: the "emoji" zoo

A small latent diffusion family that draws scenes of one to four emoji on a coloured background, 64x64
pixels, from English captions. It exists to show and test routing and acceleration without any download; it
is no use as a picture generator.

**Data.** Scenes composed from 108 Noto Color Emoji pictures (SIL OFL 1.1, `data/OFL.txt`), captioned by a
grammar: nouns, counts up to four, left of / right of / above / below / between, eight background colours.
Position, size, rotation up to 12 degrees (the autoencoder saw up to 20), mirroring, background shade and
texture are not in the caption and vary. One meaning in ten, by a hash of its nouns and counts, is held out
of all training; every figure below is on held-out meanings.

**Pieces.** `model/` is a `StableDiffusionPipeline` folder: tokenizer, CLIP text encoder, teacher UNet
(`unet`), AutoencoderKL, and a smaller UNet with the same text encoder (`unet_small`), trained on its own and for
three quarters of the time on one or two objects, since easy prompts are what it is for. Made of the teacher by
SnapFusion's methods are `unet_efficient`, without 12 of the teacher's blocks, `unet_student`, trained on for 8 steps,
and `vae_small`, whose decoder has half of the channels. `unet_guided` and `unet_guided_efficient`, of the shapes
of `unet` and `unet_efficient`, were taught by guidance distillation to draw without guidance what `unet_student` draws
with it, and `unet_guided_4`, of the shape of `unet`, to do so in 4 steps for 8. `judge/` is a CLIP trained separately
on rendered scenes; no picture is conditioned on it.
"""

_COMMANDS = """\
The first four are made by `catimage zoo train PART`, in the order tokenizer, autoencoder, teacher, small, judge, with
`--steps` as in the table; the others, in the order of the table, by `catimage distill` with the recipe of that name in
`zoo/recipes` (`finetune` for those that end in v, `guidance` for those that begin with guided, `architecture` for
efficient, `decoder`). Loss curves: `loss_curve` in `training.json`; the teacher's hold the place loss too (0.2 times
the distance between where a caption's noun is said to be and where it is).
"""


def model_card(training: dict[str, Any], figures: dict[str, Any]) -> str:
    """Markdown, from ``training.json`` and the figures of ``catimage zoo measure``."""
    lines = [_INTRODUCTION, "## Training\n", "| part | steps | batch | minutes | final loss | device | torch |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for part, run in training.items():
        config = run["config"]
        lines.append(
            f"| {part} | {config['steps']} | {config['batch_size']} | {run['seconds'] / 60:.0f} | "
            f"{run['final_loss']:.4f} | {run['device']} ({run['platform']}) | {run['torch']} |"
        )
    lines += ["", _COMMANDS]
    lines += [f"- {part}: {run['notes']}." for part, run in training.items() if "notes" in run]
    lines.append("")
    goals = {"rendered scenes": "95%", "teacher, DDIM, 50 steps": "80%"}
    number = figures["captions"]
    lines += [f"## Figures, {number} held-out captions\n",
              f"Decoder reconstruction: **{figures['decoder_psnr_db']} dB** PSNR (goal 28 dB).\n",
              "The judge picks the true caption among 16 (15 near misses):\n",
              "| pictures | share | goal |", "| --- | --- | --- |"]  # fmt: skip
    for name, row in figures["judge_accuracy_among_16"].items():
        lines.append(f"| {name} | {row['share']:.1%} ± {row['standard_error']:.1%} | {goals.get(name, '')} |")
    columns = list(next(iter(figures["judge_clip_score"].values())))
    lines += ["", "CLIPScore by the judge (cosine, 0 to 1), by the number of objects asked for:\n",
              "| pictures | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]  # fmt: skip
    for name, row in figures["judge_clip_score"].items():
        lines.append(f"| {name} | " + " | ".join(f"{row[column]:.3f}" for column in columns) + " |")
    lines += ["", f"Command: `catimage zoo measure CATALOG --number {number}`, seeds from 0, guidance scale 4.",
              "Standard errors are binomial.\n"]  # fmt: skip
    return "\n".join(lines)


def write_card(catalog: Path) -> Path:
    """Write ``catalog/MODEL_CARD.md`` from its ``training.json`` and ``figures.json``; returns the path."""
    training, figures = (json.loads((catalog / name).read_text()) for name in ("training.json", "figures.json"))
    path = catalog / "MODEL_CARD.md"
    path.write_text(model_card(training, figures), encoding="utf-8")
    return path
