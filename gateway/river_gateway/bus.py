"""The gateway's connection to NATS: connecting with patience, publishing with an acknowledgement, and knowing when it is deaf."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import nats
from nats.errors import NoServersError

from river_gateway.errors import UnavailableError
from river_gateway.limits import (
    NATS_ACK_TIMEOUT_S,
    NATS_CONNECT_PATIENCE_S,
    NATS_CONNECT_TIMEOUT_S,
    NATS_RECONNECT_WAIT_S,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nats.aio.client import Client
    from nats.js import JetStreamContext

logger = logging.getLogger("river.gateway")


class Bus:
    """One connection that reconnects for ever."""

    def __init__(self) -> None:
        self._client: Client | None = None
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
        return self.client.jetstream(timeout=NATS_ACK_TIMEOUT_S)

    @property
    def connected(self) -> bool:
        """Whether the server answers."""
        return self._client is not None and self._client.is_connected

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
                    connect_timeout=NATS_CONNECT_TIMEOUT_S,
                    allow_reconnect=False,
                    ping_interval=5,
                )
                await self._client.close()
                break
            except (NoServersError, OSError, TimeoutError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(NATS_RECONNECT_WAIT_S)
        # With reconnection allowed, nats-py would log and swallow each failure of the first attempt.
        self._client = await nats.connect(
            url,
            name="river-gateway",
            connect_timeout=NATS_CONNECT_TIMEOUT_S,
            reconnect_time_wait=NATS_RECONNECT_WAIT_S,
            max_reconnect_attempts=-1,
            ping_interval=5,
            max_outstanding_pings=2,
            disconnected_cb=self._on_lost,
            reconnected_cb=self._on_back,
            error_cb=self._on_error,
        )

    async def close(self) -> None:
        """Closes the connection, after what was published has left."""
        if self._client is not None and not self._client.is_closed:
            if self._client.is_connected:
                await self._client.flush(timeout=int(NATS_ACK_TIMEOUT_S))
            await self._client.close()

    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        message_id: str,
        headers: Mapping[str, str] | None = None,
    ) -> bool:
        """Publishes to JetStream and returns once it is stored; False when `message_id` had been stored before.

        Raises:
            UnavailableError: the connection is down.
            nats.errors.Error: no stream took it, or none answered in time.
        """
        self.require()
        stored = await self.jetstream.publish(
            subject, payload, headers={"Nats-Msg-Id": message_id, **(headers or {})}
        )
        return not stored.duplicate

    def require(self) -> None:
        """Fails at once where waiting for a lost connection would only end in a timeout.

        Raises:
            UnavailableError: the connection is down.
        """
        if not self.connected:
            raise UnavailableError("the message bus is not reachable; try again")

    def heard_until(self, now: float, grace_s: float) -> float:
        """The moment up to which silence means anything: while the connection is down, and for `grace_s` after, when it was lost.

        Without this, everybody's heartbeat would look old as soon as NATS is away.
        """
        if self._lost_at is None:
            return now
        if not self.connected or self._back_at is None or now - self._back_at < grace_s:
            return self._lost_at
        return now

    async def _on_lost(self) -> None:
        self._lost_at = time.time()
        self._back_at = None
        logger.warning("NATS connection lost")

    async def _on_back(self) -> None:
        self._back_at = time.time()
        logger.info("NATS connection is back")

    async def _on_error(self, error: Exception) -> None:
        logger.warning("NATS: %s", error)
