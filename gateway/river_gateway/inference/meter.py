"""Getting usage to the recorder: published and acknowledged before the client sees the end.

Events travel in groups. While one group is on its way to NATS and its acknowledgement back, and a moment longer, the
next gathers: a single request waits for one round trip, and a thousand at once share the work of a few.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from river_billing import streams
from river_billing.limits import GROUP_EVENTS_MAX
from river_gateway.bus import REFUSALS, BusError
from river_gateway.errors import UnavailableError
from river_gateway.limits import USAGE_BACKLOG_MAX, USAGE_RETRY_S, USAGE_ROUND_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_billing.events import UsageEvent
    from river_gateway.bus import Bus
    from river_gateway.telemetry import Telemetry

logger = logging.getLogger("river.gateway")


@dataclass(slots=True)
class _Round:
    """Events that travel together, and who waits until NATS has them or they are in the backlog."""

    events: list[UsageEvent] = field(default_factory=list["UsageEvent"])
    waiters: list[asyncio.Future[None]] = field(default_factory=list["asyncio.Future[None]"])

    def settle(self) -> None:
        """Lets everybody go on."""
        for waiter in self.waiters:
            if not waiter.done():  # Its request may have been cancelled.
                waiter.set_result(None)


class Meter:
    """Publishes usage events. While NATS is away they wait here, bounded, and requests go on being answered."""

    def __init__(self, bus: Bus, telemetry: Telemetry) -> None:
        self._bus = bus
        self._telemetry = telemetry
        self._round = _Round()
        self._round_wake = asyncio.Event()
        self._backlog: deque[UsageEvent] = deque()
        self._backlog_wake = asyncio.Event()

    def admit(self) -> None:
        """Refuses new work when what it uses could no longer be remembered.

        Raises:
            UnavailableError: the backlog is full.
        """
        if len(self._backlog) >= USAGE_BACKLOG_MAX:
            raise UnavailableError("usage cannot be recorded at the moment; try again")

    async def record(self, event: UsageEvent | None) -> None:
        """Returns once the event is stored, or once it is in the backlog because NATS cannot store it now."""
        if event is None:
            return
        if self._backlog:  # NATS is away, or has just come back.
            self.record_later(event)
            return
        gathering = self._round
        gathering.events.append(event)
        self._round_wake.set()
        waiter = asyncio.get_running_loop().create_future()
        gathering.waiters.append(waiter)
        await waiter

    def record_later(self, event: UsageEvent | None) -> None:
        """Leaves an event to the backlog; for places that cannot wait, such as a cancelled stream."""
        if event is not None:
            self._add_to_backlog([event])

    async def run(self) -> None:
        """Publishes what comes, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._publish_rounds(), name="usage rounds")
            tasks.create_task(self._drain(), name="usage backlog")

    async def close(self) -> bool:
        """Publishes all there is, once `run` has ended; False when some of it is lost."""
        current, self._round = self._round, _Round()
        self._add_to_backlog(current.events)
        current.settle()
        return await self.flush()

    async def flush(self) -> bool:
        """Publishes the backlog, oldest first; False when NATS refused and some of it is left."""
        while self._backlog:
            events = [
                self._backlog[index] for index in range(min(len(self._backlog), GROUP_EVENTS_MAX))
            ]
            try:
                await self._publish(events)
            except (BusError, UnavailableError, TimeoutError):
                return False
            # It only ever grows at its end, and nobody else takes from it.
            for _ in events:
                self._backlog.popleft()
            self._telemetry.usage_backlog.set(len(self._backlog))
        return True

    @property
    def waiting(self) -> int:
        """How many events NATS has not acknowledged."""
        return len(self._backlog)

    async def _publish_rounds(self) -> None:
        loop = asyncio.get_running_loop()
        next_at = 0.0
        while True:
            await self._round_wake.wait()
            if (wait_s := next_at - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            self._round_wake.clear()
            next_at = loop.time() + USAGE_ROUND_S
            current, self._round = self._round, _Round()
            left = list(current.events)
            try:
                for events in _groups(current.events):
                    await self._publish(events)
                    del left[: len(events)]
            except (BusError, UnavailableError, TimeoutError) as error:
                logger.warning("%d usage events wait: %s", len(left), error)
            finally:
                # Also when cancelled: then `close` has the last word.
                self._add_to_backlog(left)
                current.settle()

    async def _drain(self) -> None:
        while True:
            await self._backlog_wake.wait()
            self._backlog_wake.clear()
            while not await self.flush():  # noqa: ASYNC110 - polls NATS, not a variable
                await asyncio.sleep(USAGE_RETRY_S)

    async def _publish(self, events: Sequence[UsageEvent]) -> None:
        """Returns once all are stored, or given up because JetStream will never take them."""
        self._bus.require()
        try:
            await streams.publish_group(self._bus.jetstream, events)
        except REFUSALS as error:
            if len(events) == 1:
                self._drop(events[0], error)
                return
            for event in events:
                await self._publish([event])
        else:
            for event in events:
                self._telemetry.metered(event)

    def _add_to_backlog(self, events: Sequence[UsageEvent]) -> None:
        if events:
            self._backlog.extend(events)
            self._telemetry.usage_backlog.set(len(self._backlog))
            self._backlog_wake.set()

    def _drop(self, event: UsageEvent, error: BusError) -> None:
        """Gives up an event that JetStream will never take, rather than let all others wait behind it."""
        logger.error("usage event dropped: %s", error, extra={"request": event.event_id})
        self._telemetry.usage_dropped.inc()


def _groups(events: Sequence[UsageEvent]) -> list[Sequence[UsageEvent]]:
    """The events in as many messages as they need."""
    return [
        events[start : start + GROUP_EVENTS_MAX]
        for start in range(0, len(events), GROUP_EVENTS_MAX)
    ]
