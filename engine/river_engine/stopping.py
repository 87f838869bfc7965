"""When an engine takes nothing new, and when it leaves: told so by signals, or by an admin over NATS.

A signal ends the process for good, an admin's `restart` has it started again by its supervisor; both let what runs come
to its end first. An admin's `drain` only closes the door, and `undrain` opens it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import time

from river_engine.limits import DRAIN_CHECK_INTERVAL_S, RESTART_DRAIN_S
from river_engine.protocol import Control, Controlled
from river_engine.turns import Turnstile

_log = logging.getLogger("river.engine")


class Stopping:
    """What has been asked for. After a first signal requests have `drain_s` to end; a second one cuts them off."""

    def __init__(self, drain_s: float) -> None:
        self.asked = asyncio.Event()
        self.again = False
        """Whether the engine is to be started again when it has left."""
        self._drain_s = drain_s
        self._deadline = math.inf
        self._signals = 0

    def listen(self) -> None:
        """Hears signals from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def restart(self) -> None:
        """Has the engine leave and come back."""
        self.again = True
        self._deadline = time.monotonic() + RESTART_DRAIN_S
        self.asked.set()

    async def drained(self, turnstile: Turnstile) -> None:
        """Waits for the requests that are here, or for the end of their time."""
        while not turnstile.admission.is_idle() and time.monotonic() < self._deadline:  # noqa: ASYNC110 - its end is no event
            await asyncio.sleep(DRAIN_CHECK_INTERVAL_S)
        if not turnstile.admission.is_idle():
            _log.warning("requests cut off", extra={"count": turnstile.admission.turns_inside()})

    def _on_signal(self) -> None:
        self._signals += 1
        self.again = False
        within_s = self._drain_s if self._signals == 1 else 0.0
        self._deadline = min(self._deadline, time.monotonic() + within_s)
        self.asked.set()


class Controls:
    """Does what an admin asks for; setting `changed` has the engine's record say so at once."""

    def __init__(self, turnstile: Turnstile, stopping: Stopping, changed: asyncio.Event) -> None:
        self._turnstile = turnstile
        self._stopping = stopping
        self._changed = changed

    def do(self, asked: Control) -> Controlled:
        """What came of it."""
        turnstile = self._turnstile
        if self._stopping.asked.is_set():
            return Controlled(draining=True, refused="the engine is about to leave")
        _log.info("told to %s", asked.action)
        if asked.action == "undrain":
            turnstile.open()
        else:
            turnstile.close()
        if asked.action == "restart":
            self._stopping.restart()
        self._changed.set()
        return Controlled(draining=turnstile.draining)
