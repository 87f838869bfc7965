"""The recorder between a real nats-server and a real Postgres, killed and starved."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nats
import pytest
import pytest_asyncio
from nats.js import JetStreamContext
from support.billing import (
    OCCURRED_AT,
    TINY,
    add_run,
    database,
    make_event,
    random_events,
    totals,
)

from river_billing import limits
from river_billing.events import EVENTS_STREAM, AnyEvent, CheckpointSaved, RunAdvanced
from river_billing.partitions import maintain_partitions
from river_billing.prices import seed_prices
from river_billing.recorder import Recorder, Settings, record_events, recorded_until
from river_billing.streams import encode, ensure_streams, publish, publish_group
from river_ops.embedded.nats import EmbeddedNats

WAIT_S = 60.0
MAIN = "from river_billing.recorder import main; main()"


@pytest_asyncio.fixture
async def js(nats_url: str) -> AsyncGenerator[JetStreamContext]:
    """JetStream with an empty event stream."""
    client = await nats.connect(nats_url)
    stream = client.jetstream()
    await ensure_streams(stream)
    await stream.purge_stream(EVENTS_STREAM)
    yield stream
    await client.close()


async def publish_all(js: JetStreamContext, events: Sequence[AnyEvent]) -> None:
    """Publishes in order, a hundred at a time."""
    for start in range(0, len(events), 100):
        await asyncio.gather(*(publish(js, event) for event in events[start : start + 100]))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits, in bounds."""
    async with asyncio.timeout(WAIT_S):
        while not await condition():  # noqa: ASYNC110 - other processes send no events
            await asyncio.sleep(0.05)


async def drained(js: JetStreamContext) -> bool:
    """Whether every event has been committed or given up."""
    return (await js.stream_info(EVENTS_STREAM)).state.messages == 0


@asynccontextmanager
async def recording(postgres_url: str, nats_url: str) -> AsyncGenerator[asyncio.Task[None]]:
    """A recorder in this process."""
    stop = asyncio.Event()
    task = asyncio.create_task(
        Recorder(Settings(postgres_url=postgres_url, nats_url=nats_url)).run(stop)
    )
    try:
        yield task
    finally:
        stop.set()
        await asyncio.wait_for(task, WAIT_S)


def expected_totals(events: Sequence[Any]) -> tuple[int, int]:
    """Lines and quantity."""
    return (
        sum(1 for event in events for count in event.quantities.values() if count),
        sum(sum(event.quantities.values()) for event in events),
    )


async def test_a_killed_recorder_loses_and_doubles_nothing(
    postgres_url: str, nats_url: str, js: JetStreamContext
) -> None:
    """A kill -9 in the middle, a restart, and a replay of everything end in the same sums."""
    events = random_events(4000, seed=4)
    environment = {
        **os.environ,
        "RIVER_POSTGRES_URL": postgres_url,
        "RIVER_NATS_URL": nats_url,
        "RIVER_PORT": "0",
    }

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", MAIN], env=environment)

    async with database(postgres_url) as connection:
        count = "select count(*) from usage_event"

        async def some() -> bool:
            return await connection.fetchval(count) > 0

        await publish_all(js, events)
        process = start()
        try:
            await until(some)
        finally:
            process.kill()
            process.wait()
        process = start()
        try:
            await until(lambda: drained(js))
            expected = expected_totals(events)
            first = await totals(connection)
            assert first[:2] == expected
            # Under other message ids, so that JetStream lets them through.
            for event in events[:1000]:
                await js.publish("usage.again", encode(event))
            await until(lambda: drained(js))
            assert await totals(connection) == first
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, WAIT_S) == 0
        finally:
            process.kill()
            process.wait()


async def test_progress_waits_for_the_oldest_message(
    postgres_url: str, nats_url: str, js: JetStreamContext
) -> None:
    """A recorder says that all is recorded up to now, but with a message that waits no further than that came."""
    async with database(postgres_url) as connection:
        progress = "select now() - recorded_until < interval '60 s' from recorder_progress"
        await connection.execute("update recorder_progress set recorded_until = '2020-01-01'")
        async with recording(postgres_url, nats_url):
            await until(lambda: connection.fetchval(progress))
    before = datetime.now(UTC)
    await publish(js, random_events(1, seed=11)[0])
    published_at = datetime.now(UTC)
    await asyncio.sleep(0.3)
    await publish(js, random_events(1, seed=12)[0])
    waiting_since = await recorded_until(js)
    assert waiting_since is not None
    tolerance = timedelta(seconds=0.1)  # the server has a clock of its own
    assert before - tolerance <= waiting_since <= published_at + tolerance


async def test_jetstream_drops_a_repeated_message(js: JetStreamContext) -> None:
    """The message id is the event's identity."""
    event = random_events(1, seed=5)[0]
    await publish(js, event)
    await publish(js, event)
    assert (await js.stream_info(EVENTS_STREAM)).state.messages == 1


async def test_one_bad_message_holds_up_nobody(
    postgres_url: str, nats_url: str, js: JetStreamContext
) -> None:
    """Bytes that are no event, impossible values and values that Postgres refuses are removed."""
    good = random_events(20, seed=6)
    await js.publish("usage.x", b"\xff not an event")
    await publish(js, make_event(1, occurred_at=float("inf"), prompt=1))
    await js.publish("usage.x", encode(make_event(2, tenant_id="ten\x00", prompt=1)))
    await publish_all(js, good)
    async with recording(postgres_url, nats_url), database(postgres_url) as connection:
        await until(lambda: drained(js))
        assert (await totals(connection))[:2] == expected_totals(good)


async def test_groups_are_recorded_like_their_events(
    postgres_url: str, nats_url: str, js: JetStreamContext
) -> None:
    """A group, sent twice and mixed with single events: each event once, whatever is wrong with its neighbours."""
    good = random_events(30, seed=13)
    impossible = make_event(1, occurred_at=float("inf"), prompt=1)
    refused = make_event(2, tenant_id="ten\x00", prompt=1)
    await publish_group(js, [*good[:10], impossible, refused, *good[10:20]])
    await publish_group(js, good[5:25])
    await publish_group(js, good[5:25])
    await publish_group(js, good[5:26])
    await publish_all(js, good[20:])
    assert (await js.stream_info(EVENTS_STREAM)).state.messages == 3 + 10
    async with recording(postgres_url, nats_url), database(postgres_url) as connection:
        await until(lambda: drained(js))
        assert (await totals(connection))[:2] == expected_totals(good)


async def test_a_month_that_is_leaving_holds_up_only_its_own(
    postgres_url: str, nats_url: str, js: JetStreamContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a reader delays the end of a detaching, late events of that month wait, alone, and then bring it back."""
    monkeypatch.setattr(limits, "DETACH_TIMEOUT_S", 0.2)
    monkeypatch.setattr(limits, "MAINTENANCE_INTERVAL_S", 0.2)
    monkeypatch.setattr(limits, "LEAVING_MONTH_DELAY_S", 0.2)
    june = datetime(2026, 6, 15, tzinfo=UTC)
    late = make_event(101, occurred_at=june.timestamp(), prompt=5)
    also_late = make_event(102, occurred_at=june.timestamp(), prompt=6)
    current = [make_event(110 + number, prompt=1 + number) for number in range(20)]
    old = make_event(100, occurred_at=june.timestamp(), prompt=4)
    async with database(postgres_url) as connection, database(postgres_url) as reader:
        await seed_prices(connection)
        await record_events(connection, [old])
        async with reader.transaction(isolation="repeatable_read"):
            await reader.fetchval("select count(*) from usage_event")
            assert await maintain_partitions(connection, june + timedelta(days=90), 1) == []
            assert await connection.fetchval("select leaving from usage_partitions where leaving")
            await publish_all(js, [*current[:10], late, *current[10:]])
            impossible = make_event(103, occurred_at=float("inf"), prompt=1)
            await publish_group(js, [impossible, also_late])

            async def only_two_wait() -> bool:
                return (await js.stream_info(EVENTS_STREAM)).state.messages == 2

            async with recording(postgres_url, nats_url) as task:
                await until(only_two_wait)
                await asyncio.sleep(1.0)
                assert not task.done()
                assert await only_two_wait()
        async with recording(postgres_url, nats_url):
            await until(lambda: drained(js))
        events = [old, late, also_late, *current]
        assert (await totals(connection))[:2] == expected_totals(events)


async def test_maintenance_that_fails_holds_up_no_recording(
    postgres_url: str, nats_url: str, js: JetStreamContext, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither storage that cannot be charged nor months that cannot be looked after."""
    before, after = random_events(40, seed=8), random_events(40, seed=9)
    async with database(postgres_url) as connection:
        await seed_prices(connection)
        await record_events(connection, before)
        await connection.execute("alter table checkpoint rename column size_bytes to size")
        await connection.execute("alter view usage_partitions rename to months")
        await publish_all(js, after)
        async with recording(postgres_url, nats_url):
            await until(lambda: drained(js))
        assert (await totals(connection))[:2] == expected_totals([*before, *after])
    assert "the months of usage could not be looked after" in caplog.text
    assert "storage could not be charged" in caplog.text


async def test_catalog_events_reach_their_tables(
    postgres_url: str, nats_url: str, js: JetStreamContext
) -> None:
    """Progress and checkpoints are written; news of a run that is not there are dropped at last."""
    checkpoint = CheckpointSaved(
        checkpoint_id="ckpt_1",
        run_id="run_1",
        tenant_id="ten_a",
        base_model=TINY,
        name="final",
        mode="training",
        step=1,
        location="file:///x",
        size_bytes=1,
        created_at=OCCURRED_AT,
    )
    async with database(postgres_url) as connection:
        await add_run(connection)
        await publish(js, RunAdvanced(run_id="run_1", seq=2, step=1, occurred_at=OCCURRED_AT))
        await publish(js, RunAdvanced(run_id="run_0", seq=1, step=1, occurred_at=OCCURRED_AT))
        await publish(js, checkpoint)
        async with recording(postgres_url, nats_url):
            await until(lambda: drained(js))
        assert await connection.fetchval("select step from run") == 1
        assert await connection.fetchval("select name from checkpoint") == "final"


async def test_an_outage_of_postgres_only_delays(
    postgres_url: str, nats_url: str, js: JetStreamContext
) -> None:
    """Connections cut and refused for a while: everything is there afterwards."""
    events = random_events(600, seed=7)
    parts = urlsplit(postgres_url)
    name = parts.path.removeprefix("/")
    async with (
        database(parts._replace(path="/postgres").geturl()) as administrator,
        recording(postgres_url, nats_url) as task,
    ):
        await publish_all(js, events[:300])
        await until(lambda: drained(js))
        await administrator.execute(f"alter database {name} allow_connections false")
        await administrator.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1", name
        )
        await publish_all(js, events[300:])
        await asyncio.sleep(1.0)
        assert not task.done()
        assert not await drained(js)
        await administrator.execute(f"alter database {name} allow_connections true")
        await until(lambda: drained(js))
    async with database(postgres_url) as connection:
        assert (await totals(connection))[:2] == expected_totals(events)


async def test_an_outage_of_nats_only_delays(postgres_url: str, tmp_path: Path) -> None:
    """A nats-server that is killed and comes back still has, and then delivers, every event."""
    server = EmbeddedNats(tmp_path)
    server.start()
    events = random_events(40, seed=8)
    try:
        async with recording(postgres_url, server.url()):
            client = await nats.connect(server.url())
            await ensure_streams(client.jetstream())
            await publish_all(client.jetstream(), events)
            await client.close()
            assert server.child.process is not None
            server.child.process.kill()
            server.child.process.wait()
            await asyncio.sleep(0.5)
            server.start()
            client = await nats.connect(server.url())
            await until(lambda: drained(client.jetstream()))
            await client.close()
    finally:
        server.stop()
    async with database(postgres_url) as connection:
        assert (await totals(connection))[:2] == expected_totals(events)
