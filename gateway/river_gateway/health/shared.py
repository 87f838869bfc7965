"""The last half hour of all gateways, which each of them knows: a slot of ten seconds from each, in a KV bucket.

Gateways are many and keep nothing, so whoever shows a page has to know what the others saw. Each writes its slot under
a key of its own when it ends, and follows those of all. A slot that is read twice counts once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from river_gateway.bus import BusError, NoBucketError
from river_gateway.errors import UnavailableError
from river_gateway.health.moments import Moment
from river_gateway.health.readings import read
from river_gateway.health.slots import SLOT_S, Failure, Slot
from river_gateway.health.window import Window
from river_gateway.limits import (
    HEALTH_BUCKET_MAX_BYTES,
    HEALTH_FAILURES_SHOWN,
    HEALTH_KEPT_S,
    HEALTH_SILENCE_S,
    WATCH_RETRY_S,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from river_gateway.bus import Bus, Change
    from river_gateway.health.readings import Readings

logger = logging.getLogger("river.gateway")

HEALTH_BUCKET = "health"
SLOTS_KEPT = int(HEALTH_KEPT_S / SLOT_S)
_LATE_S = 2 * SLOT_S
"""After this, a slot that a gateway has not told is one that it did not live through."""


class SharedHealth:
    """Of this gateway (`window`) and all others. `failing` says which engines this one leaves alone."""

    def __init__(
        self,
        bus: Bus,
        gateway_id: str,
        failing: Callable[[], list[str]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.window = Window(gateway_id, clock)
        self._bus = bus
        self._failing = failing
        self._clock = clock
        self._unsent: deque[Slot] = deque(maxlen=SLOTS_KEPT)
        self._moments: dict[int, Moment] = {}
        self._failures: deque[Failure] = deque(maxlen=HEALTH_FAILURES_SHOWN)
        self._read: tuple[tuple[int, int], Readings] | None = None
        self._heard = 0

    # ---- What is known -----------------------------------------------------------------------------------------------

    def moments(self) -> list[Moment]:
        """The last `SLOTS_KEPT` slots that all gateways have had time to tell, oldest first; some may be empty."""
        newest = self._newest()
        return [
            self._moments.get(number, Moment())
            for number in range(newest - SLOTS_KEPT + 1, newest + 1)
        ]

    def readings(self) -> Readings:
        """What they say, worked out once however many look at it."""
        now = (self._newest(), self._heard)
        if self._read is None or self._read[0] != now:
            self._read = now, read(self.moments())
        return self._read[1]

    def _newest(self) -> int:
        return int((self._clock() - _LATE_S) / SLOT_S)

    def failures(self) -> list[Failure]:
        """The last ones of all gateways, newest first."""
        return sorted(self._failures, key=lambda failure: failure.at, reverse=True)

    # ---- Telling and hearing -----------------------------------------------------------------------------------------

    async def tell(self) -> None:
        """Tells each slot when it has ended, until cancelled; while NATS is away, when it is back."""
        while True:
            await asyncio.sleep(SLOT_S - self._clock() % SLOT_S + 0.05)
            for slot in self.window.take_ended():
                told = msgspec.structs.replace(slot, failing=self._failing())
                self.hear(told)
                self._unsent.append(told)
            try:
                await self._send()
            except (BusError, UnavailableError, TimeoutError) as error:
                logger.debug("health not told: %r", error)

    async def _send(self) -> None:
        while self._unsent:
            slot = self._unsent[0]
            await self._bus.keep(
                HEALTH_BUCKET,
                f"{slot.gateway_id}.{slot.number}",
                msgspec.msgpack.encode(slot),
                kept_s=HEALTH_KEPT_S,
                size_max_bytes=HEALTH_BUCKET_MAX_BYTES,
            )
            self._unsent.popleft()

    async def watch(self) -> None:
        """Follows what all gateways tell, until cancelled."""
        while True:
            try:
                async with self._bus.watching(HEALTH_BUCKET, HEALTH_SILENCE_S) as changes:
                    await self._apply(changes)
            except NoBucketError:
                pass  # Nobody has lived for ten seconds yet.
            except BusError as error:
                logger.debug("watching %s: %s", HEALTH_BUCKET, error)
            await asyncio.sleep(WATCH_RETRY_S)

    async def _apply(self, changes: AsyncIterator[Change | None]) -> None:
        async for change in changes:
            if change is None or change.value is None:
                continue
            try:
                self.hear(msgspec.msgpack.decode(change.value, type=Slot))
            except msgspec.DecodeError as error:
                logger.warning("unreadable record %s in bucket health: %s", change.key, error)

    def hear(self, slot: Slot) -> None:
        """Takes in what a gateway tells, and lets go of what is too old."""
        newest = int(self._clock() / SLOT_S)
        oldest = newest - SLOTS_KEPT - 2
        if not oldest <= slot.number <= newest + 1:
            return
        for number in [number for number in self._moments if number < oldest]:
            del self._moments[number]
        if self._moments.setdefault(slot.number, Moment()).add(slot):
            self._failures.extend(slot.failures)
            self._heard += 1
