"""What an admin has told this trainer to do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from river_engine.protocol import Control, Controlled

logger = logging.getLogger("river.trainer")


class Controls:
    """`wake` is called whenever something has changed; setting `changed` has the trainer's record say so at once."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.draining = False
        """Whether nothing new is begun."""
        self.leaving = False
        """Whether the process is to end when it has told what it has done, and to be started again."""
        self.changed = asyncio.Event()
        self._wake = wake

    def do(self, asked: Control) -> Controlled:
        """What came of it."""
        if self.leaving:
            return Controlled(draining=True, refused="the trainer is about to leave")
        logger.info("told to %s", asked.action)
        self.draining = asked.action != "undrain"
        self.leaving = asked.action == "restart"
        self.changed.set()
        self._wake()
        return Controlled(draining=self.draining)
