"""An engine's stream of events, forwarded to a client and metered on the way."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from river_gateway.disconnect import WhileClientStays
from river_gateway.engines.http_client import EngineLostError
from river_gateway.errors import ClientGoneError, UnavailableError, openai_body
from river_gateway.inference.sse import EventSplitter, EventTooLargeError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from litestar.types import Receive, Send

    from river_gateway.engines.upstream import Opened
    from river_gateway.inference.sse import UsageFilter

logger = logging.getLogger("river.gateway")


async def relay(
    opened: Opened,
    usage: UsageFilter,
    *,
    receive: Receive,
    send: Send,
    settle: Callable[[], Awaitable[None]],
) -> None:
    """Sends the events of an answer on until its end, or until the client leaves, which is no error.

    The answer's head must have been sent. `settle` is called before the final `[DONE]` leaves, so a client that saw the
    end can count on the bill; in every other case it is for the caller to settle what was counted by then.
    """
    splitter = EventSplitter()
    try:
        async with WhileClientStays(receive):
            try:
                while (data := await opened.answer.next_chunk()) is not None:
                    events = splitter.feed(data)
                    shown = usage.show(events) if events else b""
                    if usage.done:
                        await settle()
                    if shown:
                        await _send_body(send, shown)
            except (EngineLostError, EventTooLargeError) as error:
                logger.warning("a stream broke: %s", error)
                await settle()
                lost = UnavailableError("the engine was lost in the middle of the answer")
                await _send_body(send, b"data: " + msgspec.json.encode(openai_body(lost)) + b"\n\n")
            await settle()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
    except ClientGoneError:
        logger.debug("a client left its stream")


async def _send_body(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
