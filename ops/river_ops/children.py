"""Child processes that never outlive us: started with a death signal, logged to a file, ended by process id."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from river_ops.limits import CHILD_STOP_TIMEOUT_S, LOG_TAIL_BYTES, READY_POLL_INTERVAL_S


class ChildError(RuntimeError):
    """A child did not become ready; the message ends with the tail of its log."""


@dataclass(slots=True)
class Child:
    """One program of the stack and how to start it again."""

    name: str
    argv: Sequence[str]
    log_path: Path
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    stop_signal: signal.Signals = signal.SIGTERM
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the program; call it from the main thread, whose end is what the death signal watches."""
        assert self.process is None or self.process.poll() is not None, f"{self.name} is running"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches us alone, so that parts stop in our order.
            )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait_until(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Polls `ready`.

        Raises:
            ChildError: the program ended or `timeout_s` passed first.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            self.require_running()
            if time.monotonic() > deadline:
                raise ChildError(f"{self.name} not ready in {timeout_s:.0f} s\n{self.log_tail()}")
            time.sleep(READY_POLL_INTERVAL_S)

    def require_running(self) -> None:
        """Raises `ChildError` with the end of the log when the program has ended."""
        if not self.running:
            code = self.process.returncode if self.process else None
            raise ChildError(f"{self.name} ended with code {code}\n{self.log_tail()}")

    def ask_to_stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(self.stop_signal)

    def stop(self, *, timeout_s: float = CHILD_STOP_TIMEOUT_S) -> None:
        """Asks the program to end, and kills it when it has not after `timeout_s`."""
        if self.process is None:
            return
        self.ask_to_stop()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log_tail(self) -> str:
        try:
            return self.log_path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        except FileNotFoundError:
            return ""


def dying_with_parent(argv: Sequence[str], death_signal: str = "KILL") -> list[str]:
    """`argv` so wrapped that the kernel signals it when its parent dies, however the parent dies."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", death_signal, *argv] if setpriv else list(argv)


def part_argv(part: str) -> list[str]:
    """The command line of `river serve <part>` in this Python."""
    return dying_with_parent([sys.executable, "-m", "river_ops.serve", part], "TERM")


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
