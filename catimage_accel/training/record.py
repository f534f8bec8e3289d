"""What is told of a finished run: settings, machine, versions, seconds, the loss curve."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from catimage_accel.storage import write_atomic
from catimage_accel.training.config import TrainConfig

CURVE_POINTS = 50
RECORD_FILE = "run.json"
MACHINE_FILE = "machine.json"
LOG_FILE = "loss.jsonl"


def write_machine(folder: Path, device: torch.device) -> None:
    """Keep in ``folder`` what trains: a record written anew later, elsewhere, still tells it."""
    write_atomic(folder / MACHINE_FILE, (json.dumps(_machine(device), indent=2) + "\n").encode())


def begin_log(folder: Path, step: int) -> None:
    """Readies the log of the run in ``folder`` that goes on after ``step``.

    It loses the half line that a power cut may have left, and what an earlier run, or this one before it was killed,
    said of the steps that are to come.
    """
    path = folder / LOG_FILE
    if not path.exists():
        return
    found = path.read_bytes()
    kept = b"".join(line for line, row in _lines(found) if row["step"] <= step)
    if kept != found:
        write_atomic(path, kept)


def run_record(folder: Path, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """The record of the run in ``folder``, ready for JSON; its loss curve has at most 50 points, none of a lost log."""
    log = folder / LOG_FILE
    # what was killed before its log was rid of such lines has steps twice: the later of two lines counts
    rows = {row["step"]: row for _, row in _lines(log.read_bytes() if log.exists() else b"")}
    losses = [(step, row["loss"]) for step, row in rows.items() if "loss" in row]
    scores = [(step, row["clip_score"]) for step, row in rows.items() if "clip_score" in row]
    last = rows[losses[-1][0]] if losses else {"seconds": None, "loss": None}
    stride = max(1, -(-len(losses) // CURVE_POINTS))
    kept = folder / MACHINE_FILE
    record = {
        "config": dataclasses.asdict(config),
        **(json.loads(kept.read_text()) if kept.exists() else _machine(device)),
        "seconds": last["seconds"],
        "final_loss": last["loss"],
        "loss_curve": losses[stride - 1 :: stride],
    }
    return record | ({"clip_scores": scores} if scores else {})


def _lines(log: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a log and what they say; what is no row is left out."""
    for line in log.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(row, dict) and "step" in row:
            yield line, row


def _machine(device: torch.device) -> dict[str, str]:
    """``torch`` runs where ``device`` is."""
    threads = torch.get_num_threads()
    on_cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    return {"device": name, "platform": platform.machine(), "torch": torch.__version__}


def write_record(folder: Path, config: TrainConfig, device: torch.device) -> None:
    """Write ``run.json`` into the run's folder."""
    (folder / RECORD_FILE).write_text(json.dumps(run_record(folder, config, device), indent=2) + "\n")
