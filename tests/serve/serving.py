"""`catimage serve` as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

COMMAND = "from catimage_accel.cli import app; app()"
STARTUP_SECONDS = 120


@dataclass
class Server:
    """A running `catimage serve`."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def worker_pids(self) -> list[int]:
        """The process ids of its workers, which a fork server of its own starts."""
        children = _children(self.process.pid)
        return [pid for child in children for pid in _children(child)]

    def metric(self, name: str) -> float:
        """One sample of /metrics, e.g. "catimage_queue_depth" or with its labels."""
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def says(self, text: str, seconds: float = 10.0) -> bool:
        """Whether it writes a line with ``text``; a line may be read here after the answer that it came before."""
        deadline = time.monotonic() + seconds
        while not (found := any(text in line for line in self.lines)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        self.process.send_signal(with_signal)
        return self.process.wait(60)


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


def start_server(catalog: Path, *options: str, **environment: str) -> Server:
    """Starts one and waits until it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", "--catalog", str(catalog), "--port", "0", *options],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    server = Server(process)
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.lines.append(line.rstrip())
            if found := re.search(r"http://\S+", line):
                server.url = server.url or found[0]
            if "catimage: ready" in line:
                ready.set()

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + STARTUP_SECONDS
    while not ready.wait(0.2):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError("the server did not start:\n" + "\n".join(server.lines))
    return server
