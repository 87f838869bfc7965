"""An engine's stream of events, forwarded to a client and metered on the way."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec
from litestar.response.base import ASGIResponse

from river_gateway.disconnect import unless_client_leaves
from river_gateway.engines.http_client import EngineLostError
from river_gateway.errors import ClientGoneError, UnavailableError, openai_body
from river_gateway.inference.sse import (
    DONE,
    EventSplitter,
    EventTooLargeError,
    UsageWishes,
    filter_event,
    payload_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from litestar.types import Receive, Scope, Send

    from river_billing.events import UsageEvent
    from river_gateway.engines.upstream import Opened
    from river_gateway.inference.meter import Meter
    from river_gateway.inference.metering import UsageTally

logger = logging.getLogger("river.gateway")


class Relay(ASGIResponse):
    """Sends the events of `opened` on, and closes it whatever happens.

    The usage event is stored before the final `[DONE]` leaves, so a client that saw the end can count on the bill; one
    that leaves earlier is billed for what the engine had reported by then.

    Litestar's own `Stream` would not do: a client that leaves before its generator has started never runs the
    generator's clean-up.
    """

    _should_set_content_length = False

    def __init__(
        self,
        opened: Opened,
        *,
        meter: Meter,
        tally: UsageTally,
        wishes: UsageWishes,
        event: Callable[[], UsageEvent | None],
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(status_code=200, media_type="text/event-stream", headers=dict(headers))
        self._opened = opened
        self._meter = meter
        self._tally = tally
        self._wishes = wishes
        self._event = event
        self._settled = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        try:
            await unless_client_leaves(receive, self._forward(send))
        except ClientGoneError:
            logger.debug("a client left its stream")
        finally:
            self._opened.close()
            if not self._settled:
                self._meter.record_later(self._event())

    async def _forward(self, send: Send) -> None:
        await self.start_response(send)
        splitter = EventSplitter()
        try:
            async for data in self._opened.answer.chunks():
                for_client: list[bytes] = []
                for event in splitter.feed(data):
                    if payload_of(event) == DONE:
                        await self._settle()
                    shown = filter_event(event, self._tally, self._wishes)
                    if shown is not None:
                        for_client.append(shown + b"\n\n")
                if for_client:
                    await _send_body(send, b"".join(for_client))
        except (EngineLostError, EventTooLargeError) as error:
            logger.warning("a stream broke: %s", error)
            await self._settle()
            lost = UnavailableError("the engine was lost in the middle of the answer")
            await _send_body(send, b"data: " + msgspec.json.encode(openai_body(lost)) + b"\n\n")
        await self._settle()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _settle(self) -> None:
        if not self._settled:
            await self._meter.record(self._event())
            self._settled = True


async def _send_body(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
