"""Telling the others that this engine is there, hearing of new adapters and from admins: all over NATS.

None of it is needed to serve.

While NATS is away the record expires by itself; when it is back the next heartbeat writes it again. An announced
adapter is only a hint: an engine that missed it loads it when it is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import KeyValueConfig, StorageType
from nats.js.errors import BucketNotFoundError
from nats.js.kv import KeyValue

from river_billing.events import TokensCounted
from river_billing.streams import publish
from river_engine.adapters import AdapterStore
from river_engine.counting import TokenCounts
from river_engine.errors import EngineRefusal
from river_engine.limits import NATS_CONNECT_TIMEOUT_S, NATS_RETRY_INTERVAL_S, PRELOAD_QUEUE_MAX
from river_engine.obeying import obey
from river_engine.protocol import (
    ENGINES_BUCKET,
    HEARTBEAT_INTERVAL_S,
    HEARTBEAT_LOST_AFTER_S,
    AdapterRef,
    Control,
    Controlled,
    EngineRecord,
    control_subject,
    publish_subject,
)

_log = logging.getLogger("river.engine")
_AWAY = (NatsError, OSError, TimeoutError)


@asynccontextmanager
async def registered(
    nats_url: str,
    record: Callable[[], EngineRecord],
    store: AdapterStore,
    changed: asyncio.Event | None = None,
    control: Callable[[Control], Controlled] | None = None,
) -> AsyncIterator[None]:
    """In the block, the engine is known as `record` describes it at each heartbeat, and preloads what is announced.

    `control` does what admins ask for. Setting `changed` has it describe itself at once. Every `COUNTS_INTERVAL_S`, and
    last of all, it says what it has produced in the block.
    """
    changed = changed or asyncio.Event()
    announced: asyncio.Queue[AdapterRef] = asyncio.Queue(PRELOAD_QUEUE_MAX)
    async with asyncio.TaskGroup() as group:
        tasks = (
            group.create_task(_keep_registered(nats_url, record, announced, changed, control)),
            group.create_task(_preload(announced, store)),
        )
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def _keep_registered(
    nats_url: str,
    record: Callable[[], EngineRecord],
    announced: asyncio.Queue[AdapterRef],
    changed: asyncio.Event,
    control: Callable[[Control], Controlled] | None,
) -> None:
    client = await _connect(nats_url)
    counts = TokenCounts(record().engine_id, record().base_model)
    try:
        await _listen(client, publish_subject(record().base_model), announced)
        if control is not None:
            await obey(client, control_subject(record().engine_id), control)
        while True:
            try:
                bucket = await _engines_bucket(client)
                while True:
                    changed.clear()
                    current = record()
                    await bucket.put(current.engine_id, msgspec.msgpack.encode(current))
                    if counts.due():
                        await _tell_counts(client, counts.event())
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(HEARTBEAT_INTERVAL_S):
                            await changed.wait()
            except _AWAY as error:
                _log.warning("heartbeat failed", extra={"reason": repr(error)})
                await asyncio.sleep(NATS_RETRY_INTERVAL_S)
    finally:
        await _leave(client, record().engine_id, counts.event(final=True))


async def _connect(nats_url: str) -> Client:
    """Connected once NATS is there, and from then on reconnecting for ever."""

    async def on_error(error: Exception) -> None:
        _log.warning("nats", extra={"reason": repr(error)})

    while True:
        try:
            return await nats.connect(
                nats_url,
                connect_timeout=int(NATS_CONNECT_TIMEOUT_S),
                max_reconnect_attempts=-1,
                reconnect_time_wait=NATS_RETRY_INTERVAL_S,
                error_cb=on_error,
            )
        except _AWAY as error:
            _log.warning("nats away", extra={"reason": repr(error)})
            await asyncio.sleep(NATS_RETRY_INTERVAL_S)


async def _engines_bucket(client: Client) -> KeyValue:
    stream = client.jetstream(timeout=NATS_CONNECT_TIMEOUT_S)
    try:
        return await stream.key_value(ENGINES_BUCKET)
    except BucketNotFoundError:
        return await stream.create_key_value(
            KeyValueConfig(
                bucket=ENGINES_BUCKET, ttl=HEARTBEAT_LOST_AFTER_S, storage=StorageType.MEMORY
            )
        )


async def _listen(client: Client, subject: str, announced: asyncio.Queue[AdapterRef]) -> None:
    async def on_message(message: Msg) -> None:
        try:
            ref = msgspec.msgpack.decode(message.data, type=AdapterRef)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            _log.warning("announcement unreadable", extra={"reason": str(error)})
            return
        if announced.full():  # The oldest is the least likely to be asked for.
            announced.get_nowait()
        announced.put_nowait(ref)

    await client.subscribe(subject, cb=on_message)


async def _preload(announced: asyncio.Queue[AdapterRef], store: AdapterStore) -> None:
    while True:
        ref = await announced.get()
        if not store.is_wanted(ref):
            continue
        started = time.monotonic()
        try:
            await store.preload(ref)
        except EngineRefusal as error:
            _log.warning(
                "adapter not preloaded", extra={"adapter": ref.name, "reason": error.message}
            )
        else:
            took_ms = (time.monotonic() - started) * 1e3
            _log.info(
                "adapter preloaded", extra={"adapter": ref.name, "took_ms": round(took_ms, 1)}
            )


async def _tell_counts(client: Client, counted: TokensCounted) -> None:
    try:
        await publish(client.jetstream(timeout=NATS_CONNECT_TIMEOUT_S), counted)
    except _AWAY as error:  # The next ones say as much.
        _log.warning("counts not told", extra={"reason": repr(error)})


async def _leave(client: Client, engine_id: str, counted: TokensCounted) -> None:
    """Takes the record away, so that nobody is sent here while it would still be believed; tells the last counts."""
    try:
        async with asyncio.timeout(NATS_CONNECT_TIMEOUT_S):
            await (await _engines_bucket(client)).delete(engine_id)
            await _tell_counts(client, counted)
            await client.close()
    except _AWAY as error:
        _log.warning("engine record not removed", extra={"reason": repr(error)})
