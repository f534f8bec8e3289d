"""The training loop: gradient accumulation, several processes, divergence, resuming, validation."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from catimage_accel.training.config import TrainConfig
from catimage_accel.training.loop import Trainer, TrainingDiverged
from catimage_accel.training.record import run_record

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    steps=12, batch_size=4, learning_rate=0.05, warmup=1, checkpoint_every=4, log_every=4, precision="fp32"
)


def regression(
    folder: Path, config: TrainConfig = CONFIG, spoil: Callable[[int, Tensor], Tensor] = lambda _, loss: loss, **kwargs
) -> Trainer:
    """Fit y = Ax with one matrix; ``spoil(batch, loss)`` may change the loss."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    trainer = Trainer(model, config, folder, CPU, "regression", **kwargs)

    def loss_fn(batch: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(config.batch_size, 3, generator=generator)
        return spoil(batch, (model(x) - x[:, :2].flip(1)).square().mean())

    trainer.run(loss_fn)
    return trainer


def test_accumulated_batches_are_averaged(tmp_path: Path) -> None:
    """Two batches a step, or one batch that is both of them: the same weights."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    config = dataclasses.replace(CONFIG, steps=3)
    whole = Trainer(model, config, tmp_path / "whole", CPU, "whole")

    def both(step: int, _: torch.Generator) -> Tensor:
        generators = [torch.Generator().manual_seed(2 * step + part) for part in (0, 1)]
        x = torch.cat([torch.randn(4, 3, generator=generator) for generator in generators])
        return (model(x) - x[:, :2].flip(1)).square().mean()

    whole.run(both)
    parts = regression(tmp_path / "parts", dataclasses.replace(config, accumulation=2))
    for name, value in whole.ema_state().items():
        torch.testing.assert_close(parts.ema_state()[name], value)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path: Path, poison: str) -> None:
    kept: list[bytes] = []

    def spoil(batch: int, loss: Tensor) -> Tensor:
        if batch < 6:
            return loss
        kept.append((tmp_path / "checkpoint.safetensors").read_bytes())
        if poison == "loss":
            return loss * float("nan")
        zero = (loss - loss.detach()).abs()  # finite, with an infinite derivative of its root
        return loss + zero.sqrt()

    with pytest.raises(TrainingDiverged, match=r"at step 6 .*checkpoint\.safetensors.*learning_rate below 0\.05"):
        regression(tmp_path, spoil=spoil)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == kept[0]
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "checkpoint.safetensors").values())


def test_validation_sees_the_averaged_weights_and_leaves_the_trained_ones(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    model = nn.Linear(3, 2)
    config = dataclasses.replace(CONFIG, validate_every=5, ema_decay=0.5)

    def validate(step: int) -> dict[str, float]:
        assert not model.training
        seen.append(model.weight.detach().clone())
        return {"score": step / 8}

    trainer = Trainer(model, config, tmp_path, CPU, "regression", validate=validate)
    trainer.run(lambda _, generator: model(torch.randn(4, 3, generator=generator)).square().mean())
    assert model.training
    assert len(seen) == 3  # at 5, 10 and the end
    torch.testing.assert_close(seen[-1], trainer.ema_state()["weight"])
    assert not torch.equal(seen[-1], model.weight)
    torch.testing.assert_close(model.weight.detach(), trainer.master[0])
    rows = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert {row["step"]: row["score"] for row in rows if "score" in row} == {5: 0.625, 10: 1.25, 12: 1.5}
    assert {row["step"] for row in rows if "loss" in row} == {4, 8, 12}


def test_validation_sees_the_start_weights_share_too(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def train(folder: str, start_weight: float) -> tuple[Tensor, Tensor]:
        model = nn.Linear(3, 2, bias=False)
        nn.init.ones_(model.weight)
        trainer = Trainer(
            model, dataclasses.replace(CONFIG, validate_every=12), tmp_path / folder, CPU, "regression",
            validate=lambda _: seen.append(model.weight.detach().clone()) or {}, start_weight=start_weight,
        )  # fmt: skip
        trainer.run(lambda _, generator: model(torch.randn(4, 3, generator=generator)).square().mean())
        return trainer.ema_state()["weight"], trainer.master[0]

    plain, trained = train("plain", 0.0)
    mixed, as_trained = train("mixed", 0.25)
    torch.testing.assert_close(mixed, 0.75 * plain + 0.25)
    torch.testing.assert_close(seen[-1], mixed)
    assert torch.equal(as_trained, trained)
    resumed, _ = train("mixed", 0.5)  # the finished run, with another share
    torch.testing.assert_close(resumed, 0.5 * plain + 0.5)


def test_a_model_without_trainable_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        Trainer(nn.Linear(1, 1).requires_grad_(False), CONFIG, tmp_path, CPU, "frozen")


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_loop import regression

    def spoil(batch, loss):
        if batch == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    regression(Path(sys.argv[1]), spoil=spoil)
"""


def test_a_run_killed_outright_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    script = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "cut"], timeout=120)
    assert done.returncode == -signal.SIGKILL
    whole, resumed = regression(tmp_path / "whole"), regression(tmp_path / "cut")
    assert all(torch.equal(value, resumed.ema_state()[name]) for name, value in whole.ema_state().items())


@pytest.mark.parametrize(
    ("where", "signalled"),
    [
        pytest.param(torch.optim.AdamW, True, id="Ctrl-C between the optimizers"),
        pytest.param(torch.optim.AdamW, False, id="an error between the optimizers"),
        pytest.param(None, True, id="SIGTERM after the last of the change"),
    ],
)
def test_a_step_is_saved_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: type | None, signalled: bool
) -> None:
    """The bias is trained by AdamW, then the matrix by Muon: between the two the weights are of no step."""
    whole = regression(tmp_path / "whole")
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) != 7:
            return
        if not signalled:
            raise MemoryError
        os.kill(os.getpid(), signal.SIGINT if where else signal.SIGTERM)

    owner, name = (Trainer, "_to_model") if where is None else (where, "step")
    inner = getattr(owner, name)

    def then_stop(self, *given, **named):
        result = inner(self, *given, **named)
        stop()
        return result

    monkeypatch.setattr(owner, name, then_stop)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt if signalled else MemoryError):
            regression(tmp_path / "cut")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(calls) == 7
    monkeypatch.undo()
    with safe_open(tmp_path / "cut" / "checkpoint.safetensors", "pt") as stream:
        assert stream.metadata()["step"] == ("7" if signalled else "4")  # an error keeps the last checkpoint
    resumed = regression(tmp_path / "cut")
    for name, value in load_file(resumed.checkpoint).items():
        assert torch.equal(value, load_file(whole.checkpoint)[name]), name


def test_what_a_step_does_not_use_is_not_moved_by_it(tmp_path: Path) -> None:
    """As a search leaves blocks out now and then: momentum alone would go on moving them."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    before: list[Tensor] = []

    def loss_fn(batch: int, generator: torch.Generator) -> Tensor:
        if batch % 3 == 2:  # the batch before did without the second layer
            assert all(torch.equal(p, was) for p, was in zip(model[1].parameters(), before, strict=True))
        before[:] = [p.detach().clone() for p in model[1].parameters()]
        made = model[0](torch.randn(4, 3, generator=generator))
        return (made if batch % 3 == 1 else model[1](made)).square().mean()

    trainer = Trainer(model, CONFIG, tmp_path, CPU, "some unused", some_unused=True)
    start = trainer.master[-1].clone()
    trainer.run(loss_fn)
    assert not torch.equal(trainer.master[-1], start)


def test_a_half_written_log_is_gone_on_from(tmp_path: Path) -> None:
    """A power cut leaves half a line; the next run's first line must not be glued to it."""
    regression(tmp_path, dataclasses.replace(CONFIG, steps=8))
    log = tmp_path / "loss.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    regression(tmp_path)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [4, 12]
    log.unlink()
    regression(tmp_path)
    record = run_record(tmp_path, CONFIG, CPU)
    assert (record["loss_curve"], record["final_loss"], record["seconds"]) == ([], None, None)


def test_a_run_begun_anew_has_no_curve_of_the_one_before(tmp_path: Path) -> None:
    """What a broken checkpoint's message advises: delete it."""
    regression(tmp_path)
    (tmp_path / "checkpoint.safetensors").unlink()
    config = dataclasses.replace(CONFIG, steps=4)
    regression(tmp_path, config)
    rows = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    record = run_record(tmp_path, config, CPU)
    assert [row["step"] for row in rows] == [4]
    assert record["loss_curve"] == [(4, rows[0]["loss"])]


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        {"ACCELERATE_DYNAMO_BACKEND": "inductor"},
    ],
    ids=["its accumulation", "its precision", "its compiler"],
)
def test_what_accelerate_is_configured_to_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """`accelerate launch` hands its configuration to the processes in the environment."""
    plain = regression(tmp_path / "plain").ema_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = regression(tmp_path / "configured")
    assert trainer.accelerator.mixed_precision == "no"
    assert trainer.accelerator.state.dynamo_plugin.backend == "NO"
    assert all(torch.equal(value, plain[name]) for name, value in trainer.ema_state().items())


def test_processes_launched_for_another_kind_of_training_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP would keep a part of the weights in each process; the master weights here are whole."""
    Accelerator(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="regression: launched with FSDP; accepted: processes without DeepSpeed, FSDP"):
        regression(tmp_path)
    assert not tmp_path.joinpath("checkpoint.safetensors").exists()


PARALLEL = """
    import sys
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from torch import nn
    from catimage_accel.training.config import TrainConfig
    from catimage_accel.training.loop import Trainer

    out = Path(sys.argv[1])
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    config = TrainConfig(**{config})
    trainer = Trainer(model, config, out, torch.device("cpu"), "parallel")

    def loss_fn(batch, generator):
        x = torch.randn(config.batch_size, 3, generator=generator)
        return (trainer.forward(x) - x[:, :2].flip(1)).square().mean()

    trainer.run(loss_fn)
    save_file(trainer.ema_state(), out / f"{{trainer.accelerator.process_index}}.safetensors")
"""


def test_two_processes_do_what_one_does_with_twice_the_batches(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=4)
    script = tmp_path / "parallel.py"
    script.write_text(textwrap.dedent(PARALLEL).format(config=dataclasses.asdict(config)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    subprocess.run([*launch, str(script), str(tmp_path)], check=True, timeout=180)
    one = regression(tmp_path / "one", dataclasses.replace(config, accumulation=2)).ema_state()
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    for name, value in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)
