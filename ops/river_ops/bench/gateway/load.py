"""A program that sends requests and notes how long they take.

Without a rate every connection sends its next request when its last one is answered. With one, requests are due at even
intervals whatever the answers do: one that finds no idle connection waits, and its wait counts.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import deque
from typing import cast

import httptools
import msgspec
import uvloop

from river_ops.bench.gateway.messages import PACED_USER, LoadResult, LoadSettings
from river_ops.bench.measure import percentile
from river_ops.bench.programs import answer_with, program_settings

DRAIN_TIMEOUT_S = 30.0
PROMPT = "Tell me a story about a river. " * 12


def main() -> None:
    """Sends, and answers with the result."""
    settings = program_settings(LoadSettings)
    answer_with(uvloop.run(send_load(settings)))


async def send_load(settings: LoadSettings) -> LoadResult:
    """Sends what `settings` say and waits for the answers."""
    load = Load(settings)
    loop = asyncio.get_running_loop()
    connections = [
        (await loop.create_connection(lambda: LoadConnection(load), "127.0.0.1", settings.port))[1]
        for _ in range(settings.connections)
    ]
    load.begin(connections)
    timeout_s = (settings.seconds or 0) + (settings.requests or 0) / 10 + DRAIN_TIMEOUT_S
    async with asyncio.timeout(timeout_s):
        await load.finished.wait()
    for connection in connections:
        connection.close()
    return load.result()


class Load:
    """What is to be sent and what has come back."""

    def __init__(self, settings: LoadSettings) -> None:
        self._settings = settings
        self.request = request_bytes(settings)
        self.finished = asyncio.Event()
        self.latencies = array("d")
        self.first_bytes = array("d")
        self.events = 0
        self.errors = 0
        self.first_error: str | None = None
        self._sent = 0
        self._answered = 0
        self._started = self._ended = 0.0
        self._idle: list[LoadConnection] = []
        self._due: deque[float] = deque()

    def begin(self, connections: list[LoadConnection]) -> None:
        """Starts sending."""
        self._started = time.perf_counter()
        if self._settings.rate is None:
            for connection in connections:
                self._send_next(connection)
        else:
            self._idle = list(connections)
            self._tick(self._settings.rate, asyncio.get_running_loop())

    def answered(self, connection: LoadConnection, error: str | None) -> None:
        """A connection's request has its answer."""
        self._answered += 1
        if error is not None:
            self.errors += 1
            self.first_error = self.first_error or error
        if self._settings.rate is None:
            self._send_next(connection)
        elif self._due:
            connection.send(self._due.popleft())
        else:
            self._idle.append(connection)
        self._finish_if_done()

    def result(self) -> LoadResult:
        """What was measured."""
        return LoadResult(
            requests=self._answered,
            errors=self.errors,
            seconds=self._ended - self._started,
            events=self.events,
            p50_ms=1e3 * percentile(self.latencies, 50),
            p99_ms=1e3 * percentile(self.latencies, 99),
            first_byte_p50_ms=1e3 * percentile(self.first_bytes, 50),
            first_byte_p99_ms=1e3 * percentile(self.first_bytes, 99),
            first_error=self.first_error,
        )

    def _send_next(self, connection: LoadConnection) -> None:
        if self._more():
            self._sent += 1
            connection.send(time.perf_counter())

    def _tick(self, rate: float, loop: asyncio.AbstractEventLoop) -> None:
        now = time.perf_counter()
        while self._more() and self._started + self._sent / rate <= now:
            self._sent += 1
            # A timer that rings late is our own fault; a busy connection is not.
            if self._idle:
                self._idle.pop().send(time.perf_counter())
            else:
                self._due.append(now)
        if self._more():
            wait_s = self._started + self._sent / rate - time.perf_counter()
            loop.call_later(max(wait_s, 0.0), self._tick, rate, loop)
        else:
            self._finish_if_done()

    def _finish_if_done(self) -> None:
        if not self._more() and self._answered == self._sent and not self.finished.is_set():
            self._ended = time.perf_counter()
            self.finished.set()

    def _more(self) -> bool:
        settings = self._settings
        if settings.requests is not None and self._sent >= settings.requests:
            return False
        elapsed_s = time.perf_counter() - self._started
        return settings.seconds is None or elapsed_s < settings.seconds


class LoadConnection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._sent_at = 0.0
        self._has_body = False
        self._beginning = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, counted_from: float) -> None:
        """Sends the request; its latency counts from `counted_from`."""
        if self._transport is None:
            asyncio.get_running_loop().call_soon(
                self._load.answered, self, "the connection was lost"
            )
            return
        self._parser = httptools.HttpResponseParser(self)
        self._sent_at = counted_from
        self._has_body = False
        self._beginning = b""
        self._transport.write(self._load.request)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        assert self._parser is not None
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._transport = None
        if self._parser is not None:
            self._parser = None
            self._load.answered(self, "the connection was lost")

    def on_body(self, body: bytes) -> None:
        if not self._has_body:
            self._has_body = True
            self._load.first_bytes.append(time.perf_counter() - self._sent_at)
            self._beginning = body[:200]
        self._load.events += body.count(b"data:")

    def on_message_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        self._load.latencies.append(time.perf_counter() - self._sent_at)
        self._parser = None
        error = None if status == 200 else f"{status} {self._beginning!r}"  # noqa: PLR2004 - OK
        # The parser still is at work in this call.
        asyncio.get_running_loop().call_soon(self._load.answered, self, error)


def request_bytes(settings: LoadSettings) -> bytes:
    """The request that is sent again and again."""
    fields: dict[str, object] = {
        "model": settings.model,
        "messages": [
            {"role": "system", "content": "You are helpful."},
            {"role": "user", "content": PROMPT},
        ],
        "max_tokens": settings.max_tokens,
        "temperature": 0.7,
    }
    if settings.stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    if settings.whole_length:
        fields["ignore_eos"] = True
    if settings.paced:
        fields["user"] = PACED_USER
    body = msgspec.json.encode(fields)
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        b"content-type: application/json\r\naccept: */*\r\nauthorization: Bearer %s\r\n"
        b"content-length: %d\r\n\r\n%s" % (settings.api_key.encode(), len(body), body)
    )


if __name__ == "__main__":
    main()
