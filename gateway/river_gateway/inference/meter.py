"""Getting usage to the recorder: published and acknowledged before the client sees the end.

Events travel in groups. While one group is on its way to NATS and its acknowledgement back, and a moment longer, the
next gathers: a single request waits for one round trip, and a thousand at once share the work of a few.

While NATS is away, groups go to the spool on local disk instead, and from there to NATS when it is back, in their
order: whatever comes meanwhile goes behind them. When the spool is full, or the disk fails, new requests are refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from river_billing import streams
from river_billing.limits import GROUP_EVENTS_MAX
from river_gateway.bus import REFUSALS, BusError
from river_gateway.errors import UnavailableError
from river_gateway.limits import USAGE_ADOPT_INTERVAL_S, USAGE_RETRY_S, USAGE_ROUND_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_billing.events import UsageEvent
    from river_gateway.bus import Bus
    from river_gateway.inference.spool import Spool
    from river_gateway.telemetry import Telemetry

logger = logging.getLogger("river.gateway")


@dataclass(slots=True)
class _Round:
    """Events that travel together, and who waits until NATS has them or the disk."""

    events: list[UsageEvent] = field(default_factory=list["UsageEvent"])
    waiters: list[asyncio.Future[None]] = field(default_factory=list["asyncio.Future[None]"])

    def settle(self) -> None:
        """Lets everybody go on."""
        for waiter in self.waiters:
            if not waiter.done():  # Its request may have been cancelled.
                waiter.set_result(None)


class Meter:
    """Publishes usage events. While NATS is away they wait on disk, bounded, and requests go on being answered."""

    def __init__(self, bus: Bus, telemetry: Telemetry, spool: Spool) -> None:
        self._bus = bus
        self._telemetry = telemetry
        self._spool = spool
        self._round = _Round()
        self._round_wake = asyncio.Event()
        self._backlog_wake = asyncio.Event()
        # On their way to the disk, or there because it fails.
        self._unwritten: deque[UsageEvent] = deque()
        self._unwritten_lock = asyncio.Lock()
        self._disk_fails = False

    def admit(self) -> None:
        """Refuses new work when what it uses could no longer be remembered.

        Raises:
            UnavailableError: the spool is full, or cannot be written to.
        """
        if self._spool.full or self._disk_fails:
            raise UnavailableError("usage cannot be recorded at the moment; try again")

    async def record(self, event: UsageEvent | None) -> None:
        """Returns once the event is stored, or on local disk because NATS cannot store it now."""
        if event is None:
            return
        gathering = self._round
        gathering.events.append(event)
        self._round_wake.set()
        waiter = asyncio.get_running_loop().create_future()
        gathering.waiters.append(waiter)
        await waiter

    def record_later(self, event: UsageEvent | None) -> None:
        """Leaves an event to the next round; for places that cannot wait, such as a cancelled stream."""
        if event is not None:
            self._round.events.append(event)
            self._round_wake.set()

    async def run(self) -> None:
        """Publishes what comes, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._publish_rounds(), name="usage rounds")
            tasks.create_task(self._drain(), name="usage backlog")

    async def close(self) -> bool:
        """Publishes all there is or leaves it on disk, once `run` has ended; False when some of it is lost."""
        current, self._round = self._round, _Round()
        self._unwritten.extend(current.events)
        current.settle()
        if not await self.flush():
            await self._write_down()
        lost = len(self._unwritten)
        self._spool.close()
        return not lost

    async def flush(self) -> bool:
        """Publishes the backlog, oldest first; False when NATS refused and some of it is left."""
        try:
            while events := await asyncio.to_thread(self._spool.head, GROUP_EVENTS_MAX):
                await self._publish(events)
                await asyncio.to_thread(self._spool.advance, len(events))
                self._show()
            async with self._unwritten_lock:
                while self._unwritten:
                    events = list(islice(self._unwritten, GROUP_EVENTS_MAX))
                    await self._publish(events)
                    self._forget(len(events))
        except (BusError, UnavailableError, OSError):
            return False
        self._show()
        return True

    @property
    def waiting(self) -> int:
        """How many events NATS has not acknowledged, but for those on their way."""
        return self._spool.waiting + len(self._unwritten)

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
                try:
                    if not self.waiting:
                        for events in _groups(current.events):
                            await self._publish(events)
                            del left[: len(events)]
                except (BusError, UnavailableError, TimeoutError) as error:
                    logger.warning("%d usage events wait: %s", len(left), error)
                finally:
                    # Also when cancelled: then `close` has the last word.
                    self._unwritten.extend(left)
                if self._unwritten:
                    await self._write_down()
            finally:
                current.settle()

    async def _write_down(self) -> None:
        """Brings to the disk what waits in memory; while that fails, it stays there and nothing new is admitted."""
        async with self._unwritten_lock:
            events = list(self._unwritten)
            try:
                await asyncio.to_thread(self._spool.append, events)
            except OSError as error:
                self._disk_fails = True
                logger.error("usage cannot be written to the spool: %s", error)  # noqa: TRY400 - it says all
            else:
                self._disk_fails = False
                self._forget(len(events))
        self._show()
        self._backlog_wake.set()

    async def _drain(self) -> None:
        while True:
            await asyncio.to_thread(self._spool.adopt)
            self._show()
            while not await self.flush():
                if self._unwritten:  # The disk may have room again.
                    await self._write_down()
                await asyncio.sleep(USAGE_RETRY_S)
            self._disk_fails = False
            with suppress(TimeoutError):
                await asyncio.wait_for(self._backlog_wake.wait(), USAGE_ADOPT_INTERVAL_S)
            self._backlog_wake.clear()

    def _forget(self, count: int) -> None:
        for _ in range(count):
            self._unwritten.popleft()

    def _show(self) -> None:
        self._telemetry.usage_backlog.set(self.waiting)

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
