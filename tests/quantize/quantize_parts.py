"""The tiny UNet, inputs for it, and files edited by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from catimage_accel.quantize import UNetInputs


def load_unet(folder: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval().requires_grad_(False)


def random_inputs(rows: int, seed: int = 0) -> UNetInputs:
    made = torch.Generator().manual_seed(seed)
    return UNetInputs(
        torch.randn(rows, 4, 16, 16, generator=made), torch.linspace(0, 999, rows),
        torch.randn(rows, 24, 32, generator=made),
    )  # fmt: skip


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
