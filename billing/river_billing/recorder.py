"""The recorder: moves events from JetStream into Postgres, each exactly once.

* A batch is one transaction; messages are acknowledged after its commit. What is delivered again,
  because a recorder died in between, meets its own primary key and changes nothing.
* When NATS or Postgres goes away, both connections are dropped and opened anew, with growing
  pauses. Events wait in the stream.
* A message that can never be recorded is logged, counted and removed, and holds up nobody; nor does
  one whose month is just being detached, which is delivered again later.
* What else is due now and then, such as charging storage, holds up no recording when it fails.
"""

# nats-py leaves the keyword arguments of its methods untyped.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import nats
import nats.errors
import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig
from prometheus_client import generate_latest

from river_billing import limits, metrics
from river_billing.budgets import report_warning
from river_billing.catalog import advance_run, record_checkpoint
from river_billing.counts import note_counts
from river_billing.database import (
    CHECK_VIOLATED,
    FAILURES,
    LEAVING,
    OUTAGES,
    REFUSALS,
    Connection,
    connected,
    violated_constraint,
)
from river_billing.events import (
    EVENTS_STREAM,
    RECORDER_CONSUMER,
    AnyEvent,
    CheckpointSaved,
    RunAdvanced,
    TokensCounted,
    UsageEvent,
    operation_id,
    training_event_id,
)
from river_billing.intake import Delivery, Intake, give_back, reject, report
from river_billing.leases import end_holds, note_progress
from river_billing.partitions import ensure_partitions, maintain_partitions
from river_billing.prices import seed_prices
from river_billing.storage import charge_storage
from river_billing.streams import ensure_streams
from river_billing.usage import Recorded, moment, record_usage
from river_client.service import health_server, read_settings

logger = logging.getLogger("river.recorder")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """`RIVER_*` variables of the recorder; port 0 asks for a free one.

    `usage_attached_months` is how many whole months of usage events stay where queries look for them; without it, all.
    """

    postgres_url: str
    nats_url: str
    host: str = "127.0.0.1"
    port: int = 0
    usage_attached_months: Annotated[int, msgspec.Meta(ge=1)] | None = None


def main() -> None:
    """Runs the recorder until SIGTERM or SIGINT."""
    asyncio.run(_main(read_settings(Settings)))


async def _main(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await Recorder(settings).run(stop)


class Recorder:
    """One recorder process; several may share the work."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ready = False

    async def run(self, stop: asyncio.Event) -> None:
        """Records until `stop` is set, through any number of outages."""
        backoff_s = limits.BACKOFF_MIN_S
        async with health_server(
            self._settings.port,
            ready=lambda: self._ready,
            metrics=generate_latest,
            host=self._settings.host,
        ) as port:
            logger.info("recorder listens on port %d", port)
            while not stop.is_set():
                try:
                    async with (
                        connected(self._settings.postgres_url) as connection,
                        _nats(self._settings.nats_url) as js,
                    ):
                        subscription = await _prepare(connection, js)
                        self._ready = True
                        backoff_s = limits.BACKOFF_MIN_S
                        await self._consume(connection, js, subscription, stop)
                except (*OUTAGES, nats.errors.Error) as error:
                    self._ready = False
                    metrics.OUTAGES.inc()
                    logger.warning("lost a server (%r), trying again in %.1f s", error, backoff_s)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(stop.wait(), backoff_s)
                    backoff_s = min(2 * backoff_s, limits.BACKOFF_MAX_S)
        self._ready = False

    async def _consume(
        self,
        connection: Connection,
        js: JetStreamContext,
        subscription: JetStreamContext.PullSubscription,
        stop: asyncio.Event,
    ) -> None:
        """Batches, one after another, until `stop` is set or a server is lost; other work in between."""
        noted_at = maintained_at = float("-inf")
        async with aclosing(Intake(subscription, stop).batches()) as batches:
            async for deliveries in batches:
                now = time.monotonic()
                if now - maintained_at >= limits.MAINTENANCE_INTERVAL_S:
                    maintained_at = now
                    await self._maintain(connection)
                if now - noted_at >= limits.PROGRESS_INTERVAL_S:
                    noted_at = now
                    if (until := await recorded_until(js)) is not None:
                        await note_progress(connection, until)
                if deliveries:
                    with metrics.BATCH_SECONDS.time():
                        await record_deliveries(connection, deliveries)

    async def _maintain(self, connection: Connection) -> None:
        """What is due now and then; what fails is logged, and tried again the next time."""
        try:
            attached_months = self._settings.usage_attached_months
            await maintain_partitions(connection, datetime.now(UTC), attached_months)
        except FAILURES:
            logger.exception("the months of usage could not be looked after")
        try:
            await charge_storage(connection)
        except FAILURES:
            logger.exception("storage could not be charged")


@asynccontextmanager
async def _nats(url: str) -> AsyncGenerator[JetStreamContext]:
    """JetStream for the block; what was said is sent before it ends."""
    client = await nats.connect(
        url,
        connect_timeout=limits.CONNECT_TIMEOUT_S,
        allow_reconnect=False,  # The recorder reconnects by itself, to both servers.
        error_cb=_log_nats_error,
    )
    try:
        yield client.jetstream()
        await client.flush()
    finally:
        with suppress(nats.errors.Error, OSError):
            await client.close()


async def _log_nats_error(error: Exception) -> None:
    logger.warning("NATS: %s", error)


async def _prepare(
    connection: Connection, js: JetStreamContext
) -> JetStreamContext.PullSubscription:
    """Everything that recording relies on: prices, partitions, the stream and the consumer."""
    await seed_prices(connection)
    await ensure_streams(js)
    # Creates it, or brings an older one up to these settings.
    await js.add_consumer(
        EVENTS_STREAM,
        ConsumerConfig(
            durable_name=RECORDER_CONSUMER,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=limits.ACK_WAIT_S,
            max_ack_pending=limits.ACK_PENDING_MAX,
            max_deliver=-1,
        ),
    )
    return await js.pull_subscribe_bind(RECORDER_CONSUMER, stream=EVENTS_STREAM)


async def recorded_until(js: JetStreamContext) -> datetime | None:
    """When the oldest message that waits came, or now if none does; None if it has just gone."""
    asked_at = datetime.now(UTC)
    state = (await js.stream_info(EVENTS_STREAM)).state
    if state.messages == 0:
        return asked_at
    try:
        return (await js.get_msg(EVENTS_STREAM, state.first_seq)).time
    except nats.js.errors.NotFoundError:
        return None


async def record_deliveries(connection: Connection, deliveries: Sequence[Delivery]) -> None:
    """Commits the events of all messages, then acknowledges them.

    When Postgres refuses a value, they are recorded by halves, and the one it refuses is rejected. So is found whose
    month is being detached: it is delivered again later.
    """
    if not deliveries:
        return
    try:
        unknown = await record_events(
            connection, [event for delivery in deliveries for event in delivery.events]
        )
    except (*REFUSALS, LEAVING) as error:
        if len(deliveries) > 1:
            middle = len(deliveries) // 2
            await record_deliveries(connection, deliveries[:middle])
            await record_deliveries(connection, deliveries[middle:])
        elif isinstance(error, LEAVING):
            await _retry_leaving_month(deliveries[0])
        elif len(deliveries[0].events) > 1:
            await _record_one_by_one(connection, deliveries[0])
        else:
            await reject(deliveries[0].message, str(error))
        return
    except OUTAGES:
        # Given back at once, so that nobody waits for the acknowledgement to time out.
        await give_back(deliveries)
        raise
    for delivery in deliveries:
        if any(event in unknown for event in delivery.events):
            await _retry_unknown_run(delivery)
        else:
            await delivery.message.ack()


async def _record_one_by_one(connection: Connection, delivery: Delivery) -> None:
    """The events of a group of which Postgres refuses some."""
    for event in delivery.events:
        try:
            await record_events(connection, [event])
        except REFUSALS as error:
            report(delivery.message, str(error))
        except LEAVING:
            await _retry_leaving_month(delivery)
            return
    await delivery.message.ack()


async def _retry_leaving_month(delivery: Delivery) -> None:
    """Has it delivered again when its month may be gone, which brings the month back; events written meanwhile stay."""
    await delivery.message.nak(delay=limits.LEAVING_MONTH_DELAY_S)


async def _retry_unknown_run(delivery: Delivery) -> None:
    """A run is written before its first message: an unknown one is just arriving or gone."""
    if delivery.message.metadata.num_delivered < limits.UNKNOWN_RUN_DELIVERIES_MAX:
        await delivery.message.nak(delay=limits.UNKNOWN_RUN_DELAY_S)
    else:
        await reject(delivery.message, "its run is unknown")


async def record_events(connection: Connection, events: Sequence[AnyEvent]) -> list[AnyEvent]:
    """Writes all events in one transaction; returns those left out because their run is unknown.

    Raises:
        OUTAGES: nothing was written.
    """
    usage = [event for event in events if isinstance(event, UsageEvent)]
    # In the order of their runs, so that two recorders cannot deadlock.
    catalog = [event for event in events if isinstance(event, RunAdvanced | CheckpointSaved)]
    catalog.sort(key=lambda event: event.run_id)
    counts = [event for event in events if isinstance(event, TokensCounted)]
    for _ in range(limits.DETACHED_ATTEMPTS_MAX):
        try:
            recorded, unknown = await _write(connection, usage, catalog, counts)
            break
        except CHECK_VIOLATED as error:
            if violated_constraint(error) is not None:
                raise
            # Its month has just been detached, and the next attempt brings it back.
    else:
        raise TimeoutError("a month of usage is detached again and again")
    for warning in recorded.warnings:
        report_warning(warning)
    for model, kind in recorded.unpriced:
        logger.error("no price for %s of %s; recorded at zero", kind, model)
    metrics.EVENTS.inc(len(events) - len(unknown))
    metrics.LINES.inc(recorded.lines)
    metrics.UNPRICED.inc(len(recorded.unpriced))
    return unknown


async def _write(
    connection: Connection,
    usage: Sequence[UsageEvent],
    catalog: Sequence[RunAdvanced | CheckpointSaved],
    counts: Sequence[TokensCounted],
) -> tuple[Recorded, list[AnyEvent]]:
    """One transaction with everything; what it recorded, and what is left out."""
    unknown: list[AnyEvent] = []
    # Apart, because a new partition locks the whole table until its transaction ends.
    await ensure_partitions(connection, [moment(event) for event in usage])
    async with connection.transaction():
        recorded = await record_usage(connection, usage)
        for event in catalog:
            if isinstance(event, RunAdvanced):
                known = await advance_run(connection, event)
            else:
                known = await record_checkpoint(connection, event)
            if not known:
                unknown.append(event)
        await end_holds(connection, _operations_done(catalog))
        await note_counts(connection, counts)
    return recorded, unknown


def _operations_done(events: Sequence[AnyEvent]) -> list[str]:
    """The ids of the usage that operations just done may have caused."""
    return sorted(
        training_event_id(operation_id(event.run_id, event.seq))
        for event in events
        if isinstance(event, RunAdvanced)
    )
