"""`main` runs an engine for good: a server process, started again whenever it dies.

This process holds no model and imports no vLLM, so there is nothing in it that can go wrong with them.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

import msgspec

from river_client.service import SettingsError
from river_engine import limits
from river_engine.lifeline import LIFELINE_VARIABLE
from river_engine.settings import EngineSettings, read_engine_settings

_log = logging.getLogger("river.engine")

PARENT_VARIABLE = "RIVER_ENGINE_PARENT"
ENDS_VARIABLE = "RIVER_ENGINE_ENDS"
"""How many server processes there were before; then, if the last died by itself, its exit code and the Unix time."""
EXIT_DEAD = 70
"""The server's core died: start it again."""
EXIT_AGAIN = 75
"""The server was told to end and to be started again."""
EXIT_UNFIT = 78
"""The server must not serve here: starting it again would not help."""


def main() -> None:
    """Runs until SIGTERM or SIGINT (exit 0), or until the server cannot be brought up (exit non-zero)."""
    try:
        settings = read_engine_settings()
    except SettingsError as error:
        sys.exit(f"{error}")
    given_id = settings.engine_id
    settings = msgspec.structs.replace(
        settings, engine_id=given_id or f"eng_{secrets.token_hex(8)}"
    )
    stop_within_s = settings.drain_s + limits.STOP_KILL_AFTER_S
    code = Supervisor(server_environment(settings), stop_within_s=stop_within_s).run()
    if not given_id:  # Nobody can come back under a random name.
        shutil.rmtree(settings.versions_dir, ignore_errors=True)
    sys.exit(code)


def server_environment(settings: EngineSettings) -> dict[str, str]:
    """The environment of the server process; what vLLM and torch read from theirs when they are imported."""
    environment = {
        **os.environ,
        "RIVER_ENGINE_ID": settings.engine_id,
        PARENT_VARIABLE: str(os.getpid()),
        LIFELINE_VARIABLE: "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
    }
    # Routes that load or drop adapters behind our back, or stop the engine: nobody may open them by an own environment.
    for name in ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SERVER_DEV_MODE"):
        environment.pop(name, None)
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if settings.on_cpu:
        # Core and worker in one process: half the memory, half the start.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # The sampler would be compiled at the first request, for seconds.
        environment["TORCH_COMPILE_DISABLE"] = "1"
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        environment["OMP_NUM_THREADS"] = str(settings.cpu_threads)
    return environment


class Supervisor:
    """Keeps one server process running; told to stop, it gives it `stop_within_s`.

    The first signal lets the server end its requests, a second one has it drop them.
    """

    def __init__(self, environment: dict[str, str], *, stop_within_s: float) -> None:
        self._environment = environment
        self._stop_within_s = stop_within_s
        self._stop = threading.Event()
        self._signals = 0

    def run(self) -> int:
        """The exit code of the engine."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        failures = ends = 0
        while True:
            started = time.monotonic()
            code = self._run_server()
            if self._stop.is_set():
                return 0
            if code == EXIT_UNFIT:
                return code
            ends += 1
            self._environment[ENDS_VARIABLE] = f"{ends}"
            if code == EXIT_AGAIN:
                _log.info("server starts again, as it was told")
                continue
            self._environment[ENDS_VARIABLE] += f" {code} {time.time():.0f}"
            failures = 1 if time.monotonic() - started > limits.HEALTHY_AFTER_S else failures + 1
            if failures > limits.START_FAILURES_MAX:
                _log.critical("server keeps dying", extra={"exit_code": code, "failures": failures})
                return 1
            delay_s = min(
                limits.RESTART_DELAY_FIRST_S * 2 ** (failures - 1), limits.RESTART_DELAY_MAX_S
            )
            _log.error("server died", extra={"exit_code": code, "restart_in_s": delay_s})
            if self._stop.wait(delay_s):
                return 0

    def _run_server(self) -> int:
        """Runs one server to its end; on a signal, asks it to stop and then makes it."""
        # Not with -m: processes that vLLM spawns import the main module again.
        command = [sys.executable, "-c", "from river_engine.server import main; main()"]
        server = subprocess.Popen(command, env=self._environment)
        stop_at: float | None = None
        passed_on = 0
        while True:
            try:
                return server.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                if not self._stop.is_set():
                    continue
            now = time.monotonic()
            if stop_at is None:
                stop_at = now + self._stop_within_s
            if now > stop_at:
                server.kill()
            elif passed_on < self._signals:
                passed_on += 1
                server.terminate()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        self._stop.set()


if __name__ == "__main__":
    main()
