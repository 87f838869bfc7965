"""A small HTTP/1.1 client for engines: kept connections, bodies passed on as the bytes they come in.

A general client costs several times the processor time of everything else that the gateway does with a request. An
engine needs no redirects, cookies, proxies or compression; what it needs is here: keep-alive, streams with
backpressure, and bounds on connecting and on silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import httptools

from river_gateway.limits import (
    UPSTREAM_BUFFER_BYTES,
    UPSTREAM_CONNECT_TIMEOUT_S,
    UPSTREAM_KEEPALIVE_S,
    UPSTREAM_LOST_SILENCE_S,
    UPSTREAM_REPLAY_S,
    UPSTREAM_SILENCE_TIMEOUT_S,
    UPSTREAM_SWEEP_INTERVAL_S,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

Header = tuple[bytes, bytes]


class EngineLostError(ConnectionError):
    """The engine broke off, fell silent, or does not speak HTTP; it may have worked on the request."""


class EngineUnreachableError(EngineLostError):
    """The engine cannot be reached: it has not seen the request."""


def _none_lost(urls: Collection[str]) -> Collection[str]:  # noqa: ARG001 - whoever they are
    return ()


class EngineClient:
    """Requests to any number of engines; each gets a pool of kept connections, the last used first.

    `lost_of` says which of some engines' URLs are of engines that seem to have vanished. A machine that loses its power
    or its network resets no connection: their silence is believed much sooner.
    """

    def __init__(
        self,
        lost_of: Callable[[Collection[str]], Collection[str]] = _none_lost,
        *,
        connect_timeout_s: float = UPSTREAM_CONNECT_TIMEOUT_S,
        silence_timeout_s: float = UPSTREAM_SILENCE_TIMEOUT_S,
        keepalive_s: float = UPSTREAM_KEEPALIVE_S,
    ) -> None:
        self._lost_of = lost_of
        self._connect_timeout_s = connect_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._keepalive_s = keepalive_s
        self._origins: dict[str, _Origin] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    async def post(
        self, url: str, path: str, headers: Iterable[Header], body: bytes
    ) -> EngineAnswer:
        """Sends a request to the engine at `url` and returns its answer once its head has been read.

        Header values must have no line breaks. A kept connection that turns out to be dead before a byte of the answer
        has come is replaced by a fresh one.

        Raises:
            EngineLostError: no head of an answer came.
        """
        origin = self._origins.get(url) or self._add_origin(url)
        target = (origin.prefix + path).encode()
        lines = [b"POST %s HTTP/1.1\r\nhost: %s\r\n" % (target, origin.host)]
        lines += [b"%s: %s\r\n" % header for header in headers]
        lines.append(b"content-length: %d\r\n\r\n" % len(body))
        lines.append(body)
        request = b"".join(lines)
        kept = origin.take_idle()
        if kept is not None:
            loop = asyncio.get_running_loop()
            sent_at = loop.time()
            try:
                await kept.send(request)
            except EngineLostError:
                # Else the engine has had the request, and may have died of it.
                if kept.timed_out or kept.has_head or loop.time() - sent_at > UPSTREAM_REPLAY_S:
                    raise
            else:
                return EngineAnswer(kept, origin)
        connection = await self._connect(origin)
        await connection.send(request)
        return EngineAnswer(connection, origin)

    async def close(self) -> None:
        """Cuts all connections."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for origin in self._origins.values():
            for connection in tuple(origin.connections):
                connection.abort()
        # Transports close in the next round of the loop.
        await asyncio.sleep(0)

    def _add_origin(self, url: str) -> _Origin:
        origin = self._origins[url] = _Origin(url)
        return origin

    async def _connect(self, origin: _Origin) -> _Connection:
        loop = asyncio.get_running_loop()
        if self._sweeper is None:
            self._sweeper = loop.call_later(UPSTREAM_SWEEP_INTERVAL_S, self._sweep, loop)
        origin.connecting += 1
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(origin.connections, loop),
                    origin.hostname,
                    origin.port,
                    ssl=origin.ssl,
                )
        except (OSError, TimeoutError) as error:
            raise EngineUnreachableError(f"no connection to {origin.url}: {error!r}") from error
        finally:
            origin.connecting -= 1
        return connection

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ends what is silent for too long: requests by a timeout, idle connections before the engine does.

        One look at all of them now and then costs less than a timer for each request.
        """
        now = loop.time()
        lost = self._lost_of(self._origins.keys())
        for url, origin in tuple(self._origins.items()):
            for connection in tuple(origin.connections):
                quiet_s = now - connection.heard_at
                if connection.busy and quiet_s > self._silence_timeout_s:
                    connection.time_out("the engine fell silent")
                elif connection.listening and url in lost and quiet_s > UPSTREAM_LOST_SILENCE_S:
                    connection.time_out("the engine's heartbeat is lost")
                elif not connection.busy and quiet_s > self._keepalive_s:
                    connection.abort()
            origin.forget_closed()
            if not origin.connections and not origin.connecting:
                del self._origins[url]
        self._sweeper = loop.call_later(UPSTREAM_SWEEP_INTERVAL_S, self._sweep, loop)


class EngineAnswer:
    """An answer whose head has been read. `close` it, or the engine goes on working.

    `headers` have lower-case names.
    """

    __slots__ = ("_closed", "_connection", "_origin", "headers", "status")

    def __init__(self, connection: _Connection, origin: _Origin) -> None:
        self._connection = connection
        self._origin = origin
        self._closed = False
        self.status = connection.status
        self.headers = connection.headers

    async def begun(self, within_s: float) -> None:
        """Waits for the first bytes of the body or its end, or until `within_s` is over.

        Raises:
            EngineLostError: the answer will have no beginning.
        """
        if not self._connection.has_begun:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._connection.begun()

    async def next_chunk(self) -> bytes | None:
        """What has come of the body since the last call, at least a byte; None at its end.

        Raises:
            EngineLostError: the answer will have no end.
        """
        return await self._connection.next_chunk()

    async def read(self) -> bytes:
        """The whole body; raises as `next_chunk` does."""
        chunks: list[bytes] = []
        while (chunk := await self._connection.next_chunk()) is not None:
            chunks.append(chunk)
        return b"".join(chunks)

    def close(self) -> None:
        """Keeps the connection if the answer was read to its end, else cuts it, which cancels the engine's work.

        Once closed, the connection may be somebody else's: closing again does nothing.
        """
        if not self._closed:
            self._closed = True
            self._origin.give_back(self._connection)


class _Origin:
    """One engine's address and connections."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.scheme in ("http", "https")
        self.url = url
        self.hostname = parts.hostname
        self.ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self.port = parts.port or (443 if self.ssl else 80)
        self.prefix = parts.path.rstrip("/")
        self.host = parts.netloc.rpartition("@")[2].encode()
        self.connections: set[_Connection] = set()
        self.connecting = 0
        self._idle: list[_Connection] = []

    def forget_closed(self) -> None:
        """The last used is taken first, so those at the bottom may never be met."""
        self._idle = [connection for connection in self._idle if not connection.closed]

    def take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        return None

    def give_back(self, connection: _Connection) -> None:
        if connection.closed:
            return
        if connection.reusable and not connection.paused:
            connection.busy = False
            self._idle.append(connection)
        else:
            connection.abort()


class _Connection(asyncio.Protocol):
    """One connection: a request, its answer, then perhaps the next; `connections` are those of its origin."""

    def __init__(self, connections: set[_Connection], loop: asyncio.AbstractEventLoop) -> None:
        self._connections = connections
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.paused = False
        self.busy = True
        self.closed = False
        self.timed_out = False
        self.heard_at = loop.time()
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._complete = False
        self._error: Exception | None = None
        self.has_head = False
        self.reusable = False
        self.status = 0
        self.headers: dict[bytes, bytes] = {}

    # ---- For the client ----------------------------------------------------------------------------------------------

    async def send(self, request: bytes) -> None:
        """Sends a request and waits for the head of the answer; the connection is cut if that fails."""
        assert self._transport is not None
        self._begin()
        self.busy = True
        self.heard_at = self._loop.time()
        self._transport.write(request)
        try:
            while not self.has_head:
                self._raise_if_lost()
                await self._wait()
        except BaseException:
            self.abort()
            raise

    @property
    def listening(self) -> bool:
        """Whether there is a request whose answer is waited for, and read as it comes."""
        return self.busy and not self.paused

    @property
    def has_begun(self) -> bool:
        return bool(self._chunks) or self._complete

    async def begun(self) -> None:
        while not self.has_begun:
            self._raise_if_lost()
            await self._wait()

    async def next_chunk(self) -> bytes | None:
        while not self._chunks:
            if self._complete:
                return None
            self._raise_if_lost()
            await self._wait()
        if len(self._chunks) == 1:
            data = self._chunks.popleft()
        else:
            data = b"".join(self._chunks)
            self._chunks.clear()
        self._buffered_bytes = 0
        if self.paused and self._transport is not None:
            self.paused = False
            self.heard_at = self._loop.time()  # Until now nobody listened.
            self._transport.resume_reading()
        return data

    def time_out(self, reason: str) -> None:
        self.timed_out = True
        self._fail(EngineLostError(reason))
        self.abort()

    def abort(self) -> None:
        self.closed = True
        self._connections.discard(self)
        if self._transport is not None:
            self._transport.abort()

    def _raise_if_lost(self) -> None:
        if self._error is not None:
            raise EngineLostError(f"the engine was lost: {self._error}") from self._error

    async def _wait(self) -> None:
        assert self._waiter is None
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        if not self._complete and self._error is None:
            self._error = error
        self._wake()

    # ---- asyncio.Protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's are not of asyncio's class.
        self._transport = cast("asyncio.Transport", transport)
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        if not self.busy or self._complete:
            self.abort()  # Nobody asked: whatever it is, it belongs to no request.
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(error)
            self.abort()
        else:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._connections.discard(self)
        self._fail(exc or ConnectionResetError("the connection was closed"))

    # ---- httptools ---------------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self.has_head = True

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self._buffered_bytes += len(body)
        if (
            self._buffered_bytes > UPSTREAM_BUFFER_BYTES
            and not self.paused
            and self._transport is not None
        ):
            self.paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        self._complete = True
        self.reusable = self._parser.should_keep_alive()
