"""Says in a stream, as it goes on, what has been used so far, on the routes where vLLM says so only at the end.

Before an event of such a stream goes a comment, `USAGE_COMMENT` and a `StreamUsage` as JSON, whenever the numbers have
changed. A gateway takes it out, and knows what a client owes that leaves in the middle.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import msgspec

from river_engine.protocol import USAGE_COMMENT, StreamUsage

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

ANNOTATED_PATHS = frozenset({"/v1/responses", "/v1/messages"})


@dataclass(slots=True)
class SoFar:
    """As in `StreamUsage`."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def usage(self) -> StreamUsage:
        """What has been used by now."""
        return StreamUsage(self.prompt_tokens, self.cached_tokens, self.completion_tokens)

    def comment(self) -> bytes:
        return USAGE_COMMENT + msgspec.json.encode(self.usage()) + b"\n\n"


_so_far: ContextVar[SoFar | None] = ContextVar("stream_usage", default=None)


@contextmanager
def counting() -> Iterator[SoFar]:
    """In the block, what is yielded is what the request has used that the current task answers."""
    so_far = SoFar()
    token = _so_far.set(so_far)
    try:
        yield so_far
    finally:
        _so_far.reset(token)


def note_prompt(tokens: int, cached: int) -> None:
    """A prompt of `tokens` has been read, `cached` of them from the cache."""
    so_far = _so_far.get()
    if so_far is not None:
        so_far.prompt_tokens += tokens
        so_far.cached_tokens += cached


def note_completion(tokens: int) -> None:
    """So many more tokens have been produced."""
    so_far = _so_far.get()
    if so_far is not None:
        so_far.completion_tokens += tokens


def annotated(send: Send) -> Send:
    """`send` of a request that the current task answers, within `counting`, with the comments in its stream."""
    so_far = _so_far.get()
    assert so_far is not None
    streams = False
    last_comment = so_far.comment()

    async def send_annotated(message: MutableMapping[str, Any]) -> None:
        nonlocal streams, last_comment
        if message["type"] == "http.response.start":
            streams = any(
                name == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
        elif streams:
            comment = so_far.comment()
            if comment != last_comment:
                last_comment = comment
                # Each message is one event of vLLM's.
                message["body"] = comment + message.get("body", b"")
        await send(message)

    return send_annotated
