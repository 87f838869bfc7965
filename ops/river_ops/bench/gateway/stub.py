"""A program that stands in for an engine and costs next to nothing: it looks only for the end of a request.

It registers itself as engines do, and answers every POST alike; a body that asks for a stream gets one, at once, or
token by token for the user `PACED_USER`.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from typing import ClassVar, cast

import msgspec
import nats
import uvloop
from nats.js.api import KeyValueConfig
from nats.js.errors import BucketNotFoundError

from river_engine.protocol import ENGINES_BUCKET, HEARTBEAT_INTERVAL_S, EngineRecord
from river_ops.bench.gateway.answers import (
    CONTEXT_LENGTH,
    MODEL,
    STREAM_END,
    STREAM_HEAD,
    STREAM_TOKENS,
    stream_events,
    whole_answer,
)
from river_ops.bench.gateway.messages import PACED_USER, Listening, StubSettings
from river_ops.bench.programs import answer_with, program_settings

PACE_S = 0.02


def main() -> None:
    """Serves until its input ends."""
    uvloop.run(serve(program_settings(StubSettings)))


async def serve(settings: StubSettings) -> None:
    """Serves until the input ends."""
    server = await asyncio.get_running_loop().create_server(StubConnection, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    registering = (
        asyncio.create_task(keep_registered(settings.nats_url, url)) if settings.nats_url else None
    )
    answer_with(Listening(url=url))
    await asyncio.to_thread(sys.stdin.read)
    if registering is not None:
        registering.cancel()
    server.close()


async def keep_registered(nats_url: str, url: str) -> None:
    """Renews the record for ever."""
    client = await nats.connect(nats_url)
    jetstream = client.jetstream()
    try:
        bucket = await jetstream.key_value(ENGINES_BUCKET)
    except BucketNotFoundError:
        bucket = await jetstream.create_key_value(KeyValueConfig(bucket=ENGINES_BUCKET))
    while True:
        record = EngineRecord(
            engine_id="stub",
            base_model=MODEL,
            url=url,
            context_length=CONTEXT_LENGTH,
            vocab_size=1,
            max_loras=1,
            max_lora_rank=1,
            heartbeat_at=time.time(),
        )
        await bucket.put(record.engine_id, msgspec.msgpack.encode(record))
        await asyncio.sleep(HEARTBEAT_INTERVAL_S)


def field_pattern(name: str, value: str) -> re.Pattern[bytes]:
    """Finds a field in JSON, with or without the space that some clients write."""
    return re.compile(f'"{name}": ?{value}'.encode())


STREAMED = field_pattern("stream", "true")
PACED = field_pattern("user", f'"{PACED_USER}"')
CONTINUOUS_USAGE = field_pattern("continuous_usage_stats", "true")


class StubConnection(asyncio.Protocol):
    """One client's connection."""

    _whole = whole_answer()
    _streams: ClassVar[dict[bool, list[bytes]]] = {
        continuous: stream_events(STREAM_TOKENS, continuous_usage=continuous)
        for continuous in (False, True)
    }

    def __init__(self) -> None:
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := request_end(self._received)) is not None:
            request, self._received = self._received[:end], self._received[end:]
            self._answer(request)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._transport = None

    def _answer(self, request: bytes) -> None:
        assert self._transport is not None
        if not STREAMED.search(request):
            self._transport.write(self._whole if request.startswith(b"POST") else EMPTY_ANSWER)
            return
        events = self._streams[CONTINUOUS_USAGE.search(request) is not None]
        if PACED.search(request):
            self._transport.write(STREAM_HEAD)
            loop = asyncio.get_running_loop()
            self._pace(events, 0, loop.time(), loop)
        else:
            self._transport.write(STREAM_HEAD + b"".join(events) + STREAM_END)

    def _pace(
        self, events: list[bytes], index: int, began: float, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Writes a token, and the rest when its time has come; late ones do not delay those after them."""
        if self._transport is None:
            return
        if index == STREAM_TOKENS:
            self._transport.write(b"".join(events[index:]) + STREAM_END)
            return
        self._transport.write(events[index])
        following = index + 1
        loop.call_at(began + following * PACE_S, self._pace, events, following, began, loop)


EMPTY_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
"""To health checks of peers."""


def request_end(received: bytes) -> int | None:
    """How long the first request is, or None while it is not whole."""
    head_end = received.find(b"\r\n\r\n")
    if head_end < 0:
        return None
    head = received[:head_end].lower()
    at = head.find(b"content-length:")
    length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
    end = head_end + 4 + length
    return end if len(received) >= end else None


if __name__ == "__main__":
    main()
