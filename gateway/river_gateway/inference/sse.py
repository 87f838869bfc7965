"""Server-sent events as bytes: splitting a stream into events, and reading what the engine put into one."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from river_gateway.inference.metering import Chunk, UsageTally
from river_gateway.limits import SSE_EVENT_MAX_BYTES

DATA_PREFIX = b"data:"
DONE = b"[DONE]"

_chunk_decoder = msgspec.json.Decoder(Chunk)
_raw_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


class EventTooLargeError(ValueError):
    """An event of the engine never ended."""


class EventSplitter:
    """Cuts a byte stream at the blank lines that end events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events completed by `data`, without their blank line.

        Raises:
            EventTooLargeError: more than `SSE_EVENT_MAX_BYTES` came without one.
        """
        *events, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._rest) > SSE_EVENT_MAX_BYTES:
            raise EventTooLargeError(f"an event of more than {SSE_EVENT_MAX_BYTES} bytes")
        return events


@dataclass(frozen=True, slots=True)
class UsageWishes:
    """Which usage the client asked to see: at the end, in every chunk, or none."""

    final: bool
    continuous: bool


def payload_of(event: bytes) -> bytes | None:
    """The data of a one-line event, or None when it has none (a comment, a keep-alive)."""
    if not event.startswith(DATA_PREFIX):
        return None
    return event[len(DATA_PREFIX) :].strip()


def filter_event(event: bytes, tally: UsageTally, wishes: UsageWishes) -> bytes | None:
    """`event` as the client is to see it, its usage counted; None when it is not for the client at all.

    The engine was told to put usage into every chunk, whatever the client asked for.
    """
    payload = payload_of(event)
    if payload is None or b'"usage"' not in payload:
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
