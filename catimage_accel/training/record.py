"""What is told of a finished run: settings, machine, versions, seconds, the loss curve."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import torch

from catimage_accel.storage import write_atomic
from catimage_accel.training.config import TrainConfig

CURVE_POINTS = 50
RECORD_FILE = "run.json"
MACHINE_FILE = "machine.json"


def write_machine(folder: Path, device: torch.device) -> None:
    """Keep in ``folder`` what trains: a record written anew later, elsewhere, still tells it."""
    write_atomic(folder / MACHINE_FILE, (json.dumps(_machine(device), indent=2) + "\n").encode())


def run_record(folder: Path, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """The record of the run in ``folder``, ready for JSON; its loss curve has at most 50 points."""
    logged = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    # a killed run logs the steps since its checkpoint twice: the later of two lines counts
    rows = {row["step"]: row for row in logged}
    losses = [(step, row["loss"]) for step, row in rows.items() if "loss" in row]
    scores = [(step, row["clip_score"]) for step, row in rows.items() if "clip_score" in row]
    last = rows[losses[-1][0]]
    stride = -(-len(losses) // CURVE_POINTS)
    kept = folder / MACHINE_FILE
    record = {
        "config": dataclasses.asdict(config),
        **(json.loads(kept.read_text()) if kept.exists() else _machine(device)),
        "seconds": last["seconds"],
        "final_loss": last["loss"],
        "loss_curve": losses[stride - 1 :: stride],
    }
    return record | ({"clip_scores": scores} if scores else {})


def _machine(device: torch.device) -> dict[str, str]:
    """``torch`` runs where ``device`` is."""
    threads = torch.get_num_threads()
    on_cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    return {"device": name, "platform": platform.machine(), "torch": torch.__version__}


def write_record(folder: Path, config: TrainConfig, device: torch.device) -> None:
    """Write ``run.json`` into the run's folder."""
    (folder / RECORD_FILE).write_text(json.dumps(run_record(folder, config, device), indent=2) + "\n")
