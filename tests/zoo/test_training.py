"""The training loop learns, resumes where it was killed, and gives what an uninterrupted run gives."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from catimage_accel.training.config import TrainConfig
from catimage_accel.training.loop import Trainer
from catimage_accel.training.record import write_record
from catimage_accel.zoo.scenes import SceneSpec, lay_out
from catimage_accel.zoo.training.judge import patch_labels
from catimage_accel.zoo.training.parts import train_part

CONFIG = TrainConfig(steps=40, batch_size=8, learning_rate=0.3, warmup=1, checkpoint_every=10, log_every=5)
CPU = torch.device("cpu")


def regression(folder, config, stop_at=None):
    """Fit y = 2x with one weight; raises KeyboardInterrupt at step ``stop_at``."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    trainer = Trainer(model, config, folder, CPU, "regression")

    def loss_fn(step, generator):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(config.batch_size, 1, generator=generator, dtype=torch.float32)
        return (model(x.bfloat16()).float() - 2 * x).square().mean()

    trainer.run(loss_fn)
    return trainer


def test_loss_falls_and_is_logged(tmp_path):
    trainer = regression(tmp_path, dataclasses.replace(CONFIG, steps=150))
    assert trainer.ema_state()["weight"].item() == pytest.approx(2, abs=0.15)
    assert len((tmp_path / "loss.jsonl").read_text().splitlines()) == 30


def test_a_run_killed_between_checkpoints_ends_as_if_it_had_not_been(tmp_path):
    whole = regression(tmp_path / "whole", CONFIG).ema_state()
    with pytest.raises(KeyboardInterrupt):
        regression(tmp_path / "cut", CONFIG, stop_at=17)
    resumed = regression(tmp_path / "cut", CONFIG).ema_state()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_learning_rate_rises_then_falls_to_zero():
    rates = [CONFIG.rate(step) for step in range(CONFIG.steps + 1)]
    assert rates[0] > 0
    assert max(rates) == CONFIG.learning_rate
    assert rates[-1] == 0
    assert rates[-5:] == sorted(rates[-5:], reverse=True)


def test_patch_labels_mark_the_object_where_it_is():
    scene = lay_out(SceneSpec((("dog", 1),), "pink"), np.random.default_rng(0))
    labels = patch_labels(scene)
    placed = scene.objects[0]
    assert labels[int(placed.y // 8), int(placed.x // 8)] == 0
    assert (labels == 108).sum() > 20


TRAIN_UNTIL_STOPPED = """
import sys, torch
from pathlib import Path
from torch import nn
from catimage_accel.zoo import cli
from catimage_accel.zoo.training import parts
from catimage_accel.training.config import TrainConfig
from catimage_accel.training.loop import Trainer

def train(part, work, device, steps):
    model = nn.Linear(1, 1)
    trainer = Trainer(model, TrainConfig(10**9, 1, 0.1, checkpoint_every=10**9), work, device, part)
    trainer.run(lambda step, generator: model(torch.ones(1, 1, dtype=torch.bfloat16)).float().sum())

parts.train_part = train
cli.train("judge", Path(sys.argv[1]), None, "cpu", 1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["a service manager's", "a shell's"])
def test_a_stop_signal_leaves_a_checkpoint(tmp_path, number):
    run = subprocess.Popen(
        [sys.executable, "-c", TRAIN_UNTIL_STOPPED, tmp_path], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    log = tmp_path / "loss.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(number)
    _, stderr = run.communicate(timeout=60)
    assert b"KeyboardInterrupt" in stderr
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as stream:
        assert int(stream.metadata()["step"]) >= 20


def test_the_record_of_a_run_has_its_loss_curve_and_counts_a_step_once(tmp_path):
    lines = [
        {"step": step, "loss": loss, "seconds": step} for step, loss in ((20, 5.0), (40, 4.0), (40, 3.0), (60, 2.0))
    ]
    (tmp_path / "loss.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_record(tmp_path, CONFIG, CPU)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["loss_curve"] == [[20, 5.0], [40, 3.0], [60, 2.0]]
    assert (run["final_loss"], run["seconds"]) == (2.0, 60)


def test_unknown_part_is_named_with_the_parts_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"'decoder'.*tokenizer, autoencoder, teacher, small, judge"):
        train_part("decoder", tmp_path, CPU)


def test_a_part_whose_needs_are_missing_says_which_command_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="catimage zoo train tokenizer"):
        train_part("judge", tmp_path, CPU)
