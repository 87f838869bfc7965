"""What rank 0 does for the group beside computing: it shows that it is there, and says when all is over."""

from __future__ import annotations

import logging
import os
import threading

from river_trainer import limits
from river_trainer.errors import GroupBrokenError
from river_trainer.sharding.group import Group
from river_trainer.sharding.messages import Idle, Stop

logger = logging.getLogger("river.trainer")


class Leader:
    """Leads the group from a thread of its own until `end`. A broken group ends the process: the journal has it all."""

    def __init__(self, group: Group) -> None:
        assert group.rank == 0
        self._group = group
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._lead, name="leader", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Sends everybody home, after the batch in hand. Blocking."""
        self._ended.set()
        self._thread.join()
        with self._group.turn:
            try:
                self._group.say(Stop())
            except GroupBrokenError:
                logger.warning("the other processes are gone already")
            self._group.leave()

    def _lead(self) -> None:
        while not self._ended.wait(limits.GROUP_PULSE_INTERVAL_S):
            try:
                with self._group.turn:
                    self._group.say(Idle())
            except GroupBrokenError:
                logger.critical("a process of the group is gone")
                os._exit(1)
