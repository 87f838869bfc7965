"""An engine's stream of events, forwarded to a client and metered on the way."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from river_billing.events import UsageKind
from river_gateway.disconnect import WhileClientStays
from river_gateway.engines.http_client import EngineLostError
from river_gateway.errors import ClientGoneError, UnavailableError
from river_gateway.inference.sse import EventSplitter, EventTooLargeError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from litestar.types import Receive, Send

    from river_gateway.engines.upstream import Opened
    from river_gateway.errors import GatewayError
    from river_gateway.inference.dialects import StreamReader

logger = logging.getLogger("river.gateway")


async def relay(
    opened: Opened,
    usage: StreamReader,
    *,
    receive: Receive,
    send: Send,
    settle: Callable[[], Awaitable[None]],
    keep_alive: bytes,
    keep_alive_s: float,
    error_event: Callable[[GatewayError], bytes],
    begun: Callable[[], None],
) -> None:
    """Sends the events of an answer on until its end, or until the client leaves, which is no error.

    The answer's head must have been sent. `settle` is called before the final event leaves, so a client that saw the
    end can count on the bill; in every other case it is for the caller to settle what was counted by then. After
    `keep_alive_s` of silence `keep_alive` goes to the client, so that nothing in between takes the stream for dead.
    `begun` is called when the first token has left.
    """
    splitter = EventSplitter()
    waiting = True
    heartbeat = _Heartbeat(send, keep_alive, keep_alive_s)
    try:
        async with WhileClientStays(receive):
            try:
                while (data := await opened.answer.next_chunk()) is not None:
                    events = splitter.feed(data)
                    shown = usage.show(events) if events else b""
                    if usage.done:
                        await settle()
                    if shown:
                        heartbeat.postpone()
                        await _send_body(send, shown)
                        if waiting and usage.quantities().get(UsageKind.COMPLETION):
                            waiting = False
                            begun()
            except (EngineLostError, EventTooLargeError) as error:
                logger.warning("a stream broke: %s", error)
                await settle()
                lost = UnavailableError("the engine was lost in the middle of the answer")
                await _send_body(send, error_event(lost))
            await settle()
            heartbeat.stop()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
    except ClientGoneError:
        logger.debug("a client left its stream")
    finally:
        heartbeat.stop()


class _Heartbeat:
    """Sends an event whenever a stream has been silent for `interval_s`. Costs a live stream one assignment an event.

    Each message to `send` is whole events, so one that goes out between two others tears none apart.
    """

    def __init__(self, send: Send, event: bytes, interval_s: float) -> None:
        self._send = send
        self._event = event
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + interval_s
        self._timer = self._loop.call_at(self._due, self._beat)
        self._sending: asyncio.Task[None] | None = None

    def postpone(self) -> None:
        """Something else has been sent."""
        self._due = self._loop.time() + self._interval_s

    def stop(self) -> None:
        self._timer.cancel()
        if self._sending is not None:
            self._sending.cancel()

    def _beat(self) -> None:
        if self._loop.time() >= self._due:
            # A client so slow that the last one has not gone out yet needs no more of them.
            if self._sending is None or self._sending.done():
                self._sending = self._loop.create_task(_send_body(self._send, self._event))
            self.postpone()
        self._timer = self._loop.call_at(self._due, self._beat)


async def _send_body(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
