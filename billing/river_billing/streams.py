"""How events travel: the JetStream stream that holds them until the recorder has committed them."""

# nats-py leaves the keyword arguments of its methods untyped.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import BadRequestError

from river_billing import limits
from river_billing.errors import RejectedEventError
from river_billing.events import (
    EVENTS_STREAM,
    USAGE_GROUP_SUBJECT,
    AnyEvent,
    CheckpointSaved,
    RunAdvanced,
    TokensCounted,
    UsageEvent,
    catalog_subject,
    counts_subject,
    usage_subject,
)

MESSAGE_ID_HEADER = "Nats-Msg-Id"

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyEvent | list[UsageEvent])


async def ensure_streams(js: JetStreamContext) -> None:
    """Creates the stream, or brings an older one up to these settings; safe to repeat."""
    config = StreamConfig(
        name=EVENTS_STREAM,
        subjects=["usage.>", "catalog.>"],
        retention=RetentionPolicy.WORK_QUEUE,
        storage=StorageType.FILE,
        # A full stream refuses new events, so that the sender knows; it never drops old ones.
        discard=DiscardPolicy.NEW,
        max_bytes=limits.STREAM_SIZE_MAX_BYTES,
        max_msg_size=limits.MESSAGE_SIZE_MAX_BYTES,
        max_msgs=-1,
        max_age=0,
        duplicate_window=limits.DEDUPLICATION_WINDOW_S,
    )
    try:
        await js.add_stream(config)
    except BadRequestError:
        await js.update_stream(config)


async def publish(js: JetStreamContext, event: AnyEvent) -> None:
    """Sends one event; on return JetStream has stored it.

    Raises:
        nats.errors.Error: it may or may not be stored; sending it again is safe.
    """
    await js.publish(
        subject(event),
        encode(event),
        timeout=limits.PUBLISH_TIMEOUT_S,
        headers={MESSAGE_ID_HEADER: identity(event)},
    )


async def publish_group(js: JetStreamContext, events: Sequence[UsageEvent]) -> None:
    """Sends up to `GROUP_EVENTS_MAX` usage events as one message, which costs little more than one event.

    Raises:
        nats.errors.Error: all or none may be stored; sending them again, in any grouping, is safe.
    """
    assert 0 < len(events) <= limits.GROUP_EVENTS_MAX
    if len(events) == 1:
        await publish(js, events[0])
        return
    # Of all the identities: another group may begin with the same event.
    digest = hashlib.blake2b(digest_size=16)
    for event in events:
        digest.update(event.event_id.encode())
    await js.publish(
        USAGE_GROUP_SUBJECT,
        _encoder.encode(events),
        timeout=limits.PUBLISH_TIMEOUT_S,
        headers={MESSAGE_ID_HEADER: digest.hexdigest()},
    )


def subject(event: AnyEvent) -> str:
    """Where the event is published."""
    match event:
        case UsageEvent():
            return usage_subject(event.tenant_id)
        case RunAdvanced() | CheckpointSaved():
            return catalog_subject(event.run_id)
        case TokensCounted():
            return counts_subject(event.producer_id)


def identity(event: AnyEvent) -> str:
    """What makes two messages the same event, however often it is sent."""
    match event:
        case UsageEvent():
            return event.event_id
        case RunAdvanced():
            return f"{event.run_id}:{event.seq}"
        case CheckpointSaved():
            return event.checkpoint_id
        case TokensCounted():
            return f"{event.producer_id}:{event.started_at}:{event.counted_at}"


def encode(event: AnyEvent) -> bytes:
    """The event as msgpack, which unlike JSON can carry the NaN of a diverged run's metrics."""
    return _encoder.encode(event)


def decode(payload: bytes) -> list[AnyEvent]:
    """The events of a message.

    Raises:
        RejectedEventError: the bytes are no event.
    """
    try:
        decoded = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RejectedEventError(f"not an event: {error}") from error
    return [*decoded] if isinstance(decoded, list) else [decoded]
