"""What the gateway needs of NATS, with types: patient connecting, listening, watching, knowing when it is deaf."""

# nats-py leaves parts of its interface untyped; nothing untyped leaves this module.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nats
import nats.errors
from nats.js.api import KeyValueConfig, StorageType
from nats.js.errors import BadRequestError, BucketNotFoundError, KeyNotFoundError
from nats.js.kv import KeyValue

from river_gateway.errors import UnavailableError
from river_gateway.limits import (
    ANSWER_MAX_BYTES,
    ANSWER_PART_BYTES,
    NATS_ACK_TIMEOUT_S,
    NATS_CONNECT_PATIENCE_S,
    NATS_CONNECT_TIMEOUT_S,
    NATS_PING_INTERVAL_S,
    NATS_RECONNECT_WAIT_S,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

logger = logging.getLogger("river.gateway")

BusError = nats.errors.Error
"""Whatever NATS raises."""

REFUSALS = (BadRequestError, nats.errors.MaxPayloadError)
"""What publishing raises when the message itself is at fault; it will never be stored."""

_NOBODY_LISTENS = "503"
"""What the server itself answers to a question on a subject without listeners."""

NoBucketError = BucketNotFoundError


@dataclass(frozen=True, slots=True)
class Change:
    """A key of a bucket and its new value, None when it was deleted."""

    key: str
    value: bytes | None


class Bus:
    """One connection that reconnects for ever."""

    def __init__(self) -> None:
        self._client: Client | None = None
        self._jetstream: JetStreamContext | None = None
        self.losses = 0
        """How often the connection was lost."""
        self.on_back: list[Callable[[], None]] = []
        """Called whenever a lost connection is back."""
        self._lost_at: float | None = None
        self._back_at: float | None = None

    @property
    def client(self) -> Client:
        """The connection; only after `connect`."""
        assert self._client is not None
        return self._client

    @property
    def jetstream(self) -> JetStreamContext:
        """JetStream over the connection."""
        if self._jetstream is None:
            self._jetstream = self.client.jetstream(timeout=NATS_ACK_TIMEOUT_S)
        return self._jetstream

    @property
    def connected(self) -> bool:
        """Whether the server answers."""
        return self._client is not None and self._client.is_connected

    def require(self) -> None:
        """Fails at once where waiting for a lost connection would only end in a timeout.

        Raises:
            UnavailableError: the connection is down.
        """
        if not self.connected:
            raise UnavailableError("the message bus is not reachable; try again")

    # ---- Connection --------------------------------------------------------------------------------------------------

    async def connect(self, url: str) -> None:
        """Connects, waiting for a server that is still starting.

        Raises:
            NoServersError: none came within `NATS_CONNECT_PATIENCE_S`.
        """
        deadline = time.monotonic() + NATS_CONNECT_PATIENCE_S
        while True:
            try:
                self._client = await nats.connect(
                    url,
                    name="river-gateway",
                    connect_timeout=int(NATS_CONNECT_TIMEOUT_S),
                    reconnect_time_wait=NATS_RECONNECT_WAIT_S,  # pyright: ignore[reportArgumentType] - any number will do
                    max_reconnect_attempts=-1,
                    ping_interval=NATS_PING_INTERVAL_S,
                    max_outstanding_pings=2,
                    disconnected_cb=self._on_lost,
                    reconnected_cb=self._on_back,
                    error_cb=self._on_error,
                )
            except (nats.errors.NoServersError, OSError, TimeoutError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(NATS_RECONNECT_WAIT_S)
            else:
                return

    async def close(self) -> None:
        """Closes the connection, after what was published has left."""
        if self.connected:
            await self.client.drain()
        elif self._client is not None:
            await self._client.close()

    def heard_until(self, now: float, grace_s: float) -> float:
        """The moment up to which silence means something.

        While the connection is down, and for `grace_s` after, that is when it was lost: otherwise everybody's heartbeat
        would look old as soon as NATS is away.
        """
        if self._lost_at is None:
            return now
        if self._back_at is None or now - self._back_at < grace_s:
            return self._lost_at
        return now

    async def _on_lost(self) -> None:
        if self.client.is_draining or self.client.is_closed:
            return
        self.losses += 1
        self._lost_at, self._back_at = time.time(), None
        logger.warning("NATS connection lost")

    async def _on_back(self) -> None:
        self._back_at = time.time()
        logger.info("NATS connection is back")
        for callback in self.on_back:
            callback()

    async def _on_error(self, error: Exception) -> None:
        logger.warning("NATS: %s", error)

    # ---- Messages ----------------------------------------------------------------------------------------------------

    async def hear(self, subject: str, callback: Callable[[Msg], Awaitable[None]]) -> None:
        """Calls `callback` with every message of `subject` for as long as there is a connection, old or new."""
        await self.client.subscribe(subject, cb=callback)

    async def tell(self, subject: str, message: bytes) -> None:
        """Says something to whoever listens, who may miss it.

        Raises:
            BusError: it cannot be sent, or kept for when the connection is back.
        """
        await self.client.publish(subject, message)

    async def ask(self, subject: str, question: bytes, *, timeout_s: float) -> bytes | None:
        """Somebody's answer; None if nobody listens or none comes in time."""
        try:
            answer = await self.client.request(subject, question, timeout=timeout_s)
        except (nats.errors.NoRespondersError, nats.errors.TimeoutError):
            return None
        return answer.data

    async def ask_at_length(
        self, subject: str, question: bytes, *, timeout_s: float
    ) -> bytes | None:
        """As `ask`, for what `answer_at_length` sends: None if nobody listens, empty if no whole answer comes in time.

        Raises:
            BusError: the connection is down.
        """
        inbox = self.client.new_inbox()
        parts = await self.client.subscribe(inbox, pending_bytes_limit=ANSWER_MAX_BYTES)
        gathered: list[bytes] = []
        try:
            await self.client.publish(subject, question, reply=inbox)
            deadline = time.monotonic() + timeout_s
            while True:
                part = await parts.next_msg(timeout=max(0.001, deadline - time.monotonic()))
                if (part.headers or {}).get("Status") == _NOBODY_LISTENS:
                    return None
                if not part.data:
                    return b"".join(gathered)
                gathered.append(part.data)
        except nats.errors.TimeoutError:
            return b""
        finally:
            await parts.unsubscribe()

    async def answer_at_length(self, question: Msg, answer: bytes) -> None:
        """Sends an answer in parts, and an empty one after the last.

        Raises:
            BusError: the connection is down.
        """
        for start in range(0, len(answer), ANSWER_PART_BYTES):
            await self.client.publish(question.reply, answer[start : start + ANSWER_PART_BYTES])
        await self.client.publish(question.reply, b"")

    # ---- Buckets -----------------------------------------------------------------------------------------------------

    async def get(self, bucket: str, key: str) -> bytes | None:
        """The value of a key as it is now; None when there is none, or no such bucket yet.

        Raises:
            BusError: the server does not answer.
        """
        self.require()
        # Made here and not by `key_value`, which would first ask the server what it knows of the bucket.
        handle = KeyValue(
            name=bucket,
            stream=f"KV_{bucket}",
            pre=f"$KV.{bucket}.",
            js=self.jetstream,
            direct=False,
        )
        try:
            entry = await handle.get(key)
        except KeyNotFoundError:
            return None
        return entry.value

    async def keep(
        self, bucket: str, key: str, value: bytes, *, kept_s: float, size_max_bytes: int
    ) -> None:
        """Writes a key of a bucket in memory, which is made when there is none.

        Raises:
            UnavailableError: the connection is down.
            BusError: the server does not take it.
        """
        self.require()
        try:
            handle = await self.jetstream.key_value(bucket)
        except BucketNotFoundError:
            handle = await self.jetstream.create_key_value(
                KeyValueConfig(
                    bucket=bucket,
                    ttl=kept_s,
                    max_bytes=size_max_bytes,
                    storage=StorageType.MEMORY,
                )
            )
        await handle.put(key, value)

    @asynccontextmanager
    async def watching(
        self, bucket: str, silence_s: float
    ) -> AsyncGenerator[AsyncGenerator[Change | None]]:
        """All keys of a bucket, then None once, then every change, until there has been none for `silence_s`.

        Raises:
            NoBucketError: there is no such bucket.
        BusError: the silence was too long.
        """
        watcher = await (await self.jetstream.key_value(bucket)).watchall()

        async def changes() -> AsyncGenerator[Change | None]:
            while True:
                entry = await watcher.updates(timeout=silence_s)
                if entry is None:
                    yield None
                elif isinstance(entry, KeyValue.Entry):
                    yield Change(entry.key, None if entry.operation else entry.value or b"")

        try:
            yield changes()
        finally:
            await watcher.stop()
