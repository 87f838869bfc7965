"""Server-sent events as bytes: finding where they end, reading what the engine counted, showing what was asked for.

The engine is told to put its counts into every chunk, whatever the client asked for. Chunks of a usual stream, with one
choice, are never decoded: their counts are cut out as bytes, and only the last ones are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from river_gateway.inference.metering import Chunk, UsageTally
from river_gateway.limits import SSE_EVENT_MAX_BYTES

if TYPE_CHECKING:
    from river_billing.events import UsageKind

DATA_PREFIX = b"data:"
DONE = b"[DONE]"
_END = b"\n\n"

# In JSON text a quote inside a string is escaped, so these are keys, whatever the model says. Counts are numbers, null,
# or one object of such: no string whose braces could mislead.
_USAGE = re.compile(rb',"usage":(?:null|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
_USAGE_KEY = b'"usage"'
_NO_CHOICES = b'"choices":[]'

_chunk_decoder = msgspec.json.Decoder(Chunk)
_raw_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


class EventTooLargeError(ValueError):
    """An event of the engine never ended."""


class EventSplitter:
    """Cuts a byte stream where events end."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The whole events that have come, each with its blank line; what is left over waits for the next call.

        Raises:
            EventTooLargeError: more than `SSE_EVENT_MAX_BYTES` came without an end.
        """
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        end = data.rfind(_END) + len(_END)
        if end < len(_END):
            end = 0
        self._rest = data[end:]
        if len(self._rest) > SSE_EVENT_MAX_BYTES:
            raise EventTooLargeError(f"an event of more than {SSE_EVENT_MAX_BYTES} bytes")
        return data[:end]


@dataclass(frozen=True, slots=True)
class UsageWishes:
    """Which usage the client asked to see: at the end, in every chunk, or none."""

    final: bool
    continuous: bool


class UsageFilter:
    """Counts what a stream's events say was used, and makes of them what the client is to see.

    `done` is set once the stream has said its last word.
    """

    def __init__(self, wishes: UsageWishes, *, choices_per_prompt: int, single: bool) -> None:
        """`single` says that there is one choice of one prompt: then the latest counts are the sum."""
        self._wishes = wishes
        self._single = single
        self._tally = UsageTally(choices_per_prompt=choices_per_prompt)
        self._unread = b""
        self.done = False

    def show(self, events: bytes) -> bytes:
        """Whole events as the client is to see them; empty when none are for it."""
        if not self._single or _NO_CHOICES in events or DONE in events:
            return self._show_each(events)
        if _USAGE_KEY not in events:
            return events
        if self._wishes.continuous:
            self._unread = events
            return events
        shown = _USAGE.sub(b"", events)
        if _USAGE_KEY in shown:  # Written otherwise than expected.
            return self._show_each(events)
        self._unread = events
        return shown

    def quantities(self) -> dict[UsageKind, int]:
        """Tokens by kind so far."""
        unread, self._unread = self._unread, b""
        for event in unread.split(_END):
            filter_event(event, self._tally, self._wishes)
        return self._tally.quantities()

    def _show_each(self, events: bytes) -> bytes:
        shown: list[bytes] = []
        for event in events.removesuffix(_END).split(_END):
            if payload_of(event) == DONE:
                self.done = True
            for_client = filter_event(event, self._tally, self._wishes)
            if for_client is not None:
                shown += (for_client, _END)
        return b"".join(shown)


def payload_of(event: bytes) -> bytes | None:
    """The data of a one-line event, or None when it has none (a comment, a keep-alive)."""
    if not event.startswith(DATA_PREFIX):
        return None
    return event[len(DATA_PREFIX) :].strip()


def filter_event(event: bytes, tally: UsageTally, wishes: UsageWishes) -> bytes | None:
    """`event` as the client is to see it, its usage counted; None when it is not for the client at all."""
    payload = payload_of(event)
    if payload is None or _USAGE_KEY not in payload:
        return event
    try:
        chunk = _chunk_decoder.decode(payload)
    except msgspec.DecodeError:
        return event
    tally.observe(chunk)
    if chunk.usage is None:
        return event
    if not chunk.choices:
        return event if wishes.final else None
    if wishes.continuous:
        return event
    fields = _raw_decoder.decode(payload)
    fields.pop("usage", None)
    return b"data: " + msgspec.json.encode(fields)
