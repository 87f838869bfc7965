"""What the recorder takes out of the event stream: batches of about as many events as a transaction should hold."""

# nats-py leaves the keyword arguments of its methods untyped.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from nats.aio.msg import Msg
from nats.js import JetStreamContext

from river_billing import limits, metrics
from river_billing.errors import RejectedEventError
from river_billing.events import AnyEvent, UsageEvent
from river_billing.streams import decode
from river_billing.usage import check

logger = logging.getLogger("river.recorder")


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message and the events that it brought."""

    message: Msg
    events: list[AnyEvent]


class Intake:
    """Reads one consumer of the stream, until `stop` is set."""

    def __init__(
        self, subscription: JetStreamContext.PullSubscription, stop: asyncio.Event
    ) -> None:
        self._subscription = subscription
        self._stop = stop
        self._events_per_message = float(limits.GROUP_EVENTS_MAX)
        self._pause_s = 0.0

    async def batches(self) -> AsyncGenerator[list[Delivery]]:
        """Batches, empty ones too; the next is fetched and decoded while the caller works on the one before.

        What has been fetched when `stop` is set is still yielded.
        """
        fetching: asyncio.Task[list[Delivery]] | None = asyncio.create_task(self._fetch())
        try:
            while fetching is not None:
                batch = await fetching
                last = self._stop.is_set()
                fetching = None if last else asyncio.create_task(self._fetch())
                yield batch
        finally:
            if fetching is not None:
                await _give_back(fetching)

    async def _fetch(self) -> list[Delivery]:
        if self._pause_s:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), self._pause_s)
        wanted = int(limits.BATCH_EVENTS_MAX / self._events_per_message) + 1
        wanted = min(wanted, limits.BATCH_MESSAGES_MAX)
        try:
            messages = await self._subscription.fetch(wanted, timeout=limits.FETCH_TIMEOUT_S)
        except TimeoutError:
            self._pause_s = 0.0
            return []  # Nothing to do, or a server that is about to be found lost.
        # A transaction costs much the same for one event as for a hundred: let some gather.
        self._pause_s = limits.BATCH_PAUSE_S if len(messages) < wanted else 0.0
        deliveries: list[Delivery] = []
        for message in messages:
            if (delivery := await _accept(message)) is not None:
                deliveries.append(delivery)
            # What is being committed meanwhile holds its tenants: it goes first.
            await asyncio.sleep(0)
        if deliveries:
            self._events_per_message = sum(len(one.events) for one in deliveries) / len(deliveries)
        return deliveries


async def _give_back(fetching: asyncio.Task[list[Delivery]]) -> None:
    """Ends a fetch whose batch nobody will record, so that others need not wait until its messages time out."""
    fetching.cancel()
    await asyncio.wait([fetching])
    if not fetching.cancelled() and fetching.exception() is None:
        await give_back(fetching.result())


async def give_back(deliveries: Sequence[Delivery]) -> None:
    """Has the messages delivered again, to whoever is next."""
    for delivery in deliveries:
        await delivery.message.nak()


async def reject(message: Msg, reason: str) -> None:
    """Removes a message that can never be recorded, and says so."""
    report(message, reason)
    await message.term()


def report(message: Msg, reason: str) -> None:
    """Says that an event of a message can never be recorded."""
    metrics.REJECTED.inc()
    extra = {"subject": message.subject, "stream_sequence": message.metadata.sequence.stream}
    logger.error("an event was rejected for good: %s", reason, extra=extra)


async def _accept(message: Msg) -> Delivery | None:
    """The message's events without those that can never be recorded; None if that leaves none: it is then removed."""
    try:
        events = decode(message.data)
    except RejectedEventError as error:
        await reject(message, str(error))
        return None
    fit = [event for event in events if _fits(message, event)]
    if not fit:
        await message.term()
        return None
    return Delivery(message, fit)


def _fits(message: Msg, event: AnyEvent) -> bool:
    try:
        if isinstance(event, UsageEvent):
            check(event)
    except RejectedEventError as error:
        report(message, str(error))
        return False
    return True
