"""What a process that trains knows of itself and of those beside it."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from catimage_accel.training.process import check_alone, own_device, stopping_waits

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_waits_for_the_end_of_the_block(number: int) -> None:
    before = signal.signal(number, signal.default_int_handler)
    done = []
    try:
        with pytest.raises(KeyboardInterrupt), stopping_waits():  # noqa: PT012
            os.kill(os.getpid(), number)
            done.append("the block")
        assert done == ["the block"]
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stopping_waits():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_trains_too() -> None:
    """Python handles signals in the main thread alone, and refuses handlers elsewhere."""
    done = []

    def work() -> None:
        with stopping_waits():
            done.append("the block")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["the block"]


@pytest.mark.parametrize(
    ("launched", "given", "expected"),
    [
        ({}, "cuda", "cuda"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "cuda:3", "cuda:3"),
        ({"WORLD_SIZE": "8", "LOCAL_RANK": "0"}, "cuda", "cuda:0"),
        ({"WORLD_SIZE": "8", "LOCAL_RANK": "5"}, "cuda", "cuda:5"),
        ({"WORLD_SIZE": "16", "LOCAL_RANK": "5"}, "cuda:0", "cuda:5"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cpu", "cpu"),
    ],
    ids=["not launched", "launched alone", "the first of 8", "the sixth of 8", "of two machines", "on processors"],
)
def test_every_process_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, launched: dict[str, str], given: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # else it would be made the current one
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert own_device(torch.device(given)) == torch.device(expected)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU; accepted: up to 2 processes here"):
        own_device(torch.device("cuda"))


def test_what_runs_alone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_alone("distill decoder")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="distill decoder was launched in 2 processes; accepted: 1, without"):
        check_alone("distill decoder")
