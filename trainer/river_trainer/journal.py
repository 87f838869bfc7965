"""The trainer's side of NATS: streams, buckets, bodies, messages and results. The gateway uses it too: no torch here.

Everything is msgpack. A large body goes to an object store under a name of its own, and the message has that name in a
header instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar
from weakref import WeakKeyDictionary

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import (
    DiscardPolicy,
    KeyValueConfig,
    ObjectStoreConfig,
    PubAck,
    StorageType,
    StreamConfig,
)
from nats.js.errors import APIError, BadRequestError, BucketNotFoundError, NotFoundError
from nats.js.kv import KeyValue
from nats.js.object_store import ObjectStore
from nats.nuid import NUID

from river_trainer import limits
from river_trainer.protocol import (
    ADVANCES_HEADER,
    ADVANCING,
    BODIES_BUCKET,
    BODY_BUCKET_HEADER,
    BODY_HEADER,
    BODY_INLINE_MAX_BYTES,
    LEASES_BUCKET,
    LIVE_BUCKET,
    RESULT_BODIES_BUCKET,
    RESULT_INLINE_MAX_BYTES,
    RESULTS_MAX_AGE_S,
    RESULTS_STREAM,
    TENANT_HEADER,
    TOKENS_HEADER,
    TRAIN_STREAM,
    TRAINERS_BUCKET,
    LiveVersion,
    QueueState,
    TrainMessage,
    TrainResult,
    result_subject,
    task_tokens,
    train_subject,
)

MESSAGE_ID_HEADER = "Nats-Msg-Id"
_FULL_CODES = (10047, 10077)
"""NATS' errors for a server and for a stream without room."""

logger = logging.getLogger("river.trainer")

_encoder = msgspec.msgpack.Encoder()
_message_decoder = msgspec.msgpack.Decoder(TrainMessage)
_result_decoder = msgspec.msgpack.Decoder(TrainResult)
_names = NUID()
_queue_state_decoder = msgspec.msgpack.Decoder(QueueState)
_live_decoder = msgspec.msgpack.Decoder(LiveVersion)
Value = TypeVar("Value")


async def ensure_streams(js: JetStreamContext) -> None:
    """Creates the streams and buckets of `protocol`, or brings older streams up to these settings."""
    await _ensure_stream(
        js,
        StreamConfig(
            name=TRAIN_STREAM,
            subjects=["train.*.*"],
            storage=StorageType.FILE,
            # A full journal refuses new operations; it must never drop accepted ones.
            discard=DiscardPolicy.NEW,
            max_bytes=limits.TRAIN_STREAM_MAX_BYTES,
            max_msg_size=limits.STREAM_MESSAGE_MAX_BYTES,
            max_msgs=limits.OPERATIONS_PENDING_MAX,
            duplicate_window=limits.DEDUPLICATION_WINDOW_S,
            allow_direct=True,
        ),
    )
    await _ensure_stream(
        js,
        StreamConfig(
            name=RESULTS_STREAM,
            subjects=["results.*"],
            storage=StorageType.FILE,
            discard=DiscardPolicy.OLD,
            max_msgs_per_subject=1,
            max_bytes=limits.RESULTS_STREAM_MAX_BYTES,
            max_msg_size=limits.STREAM_MESSAGE_MAX_BYTES,
            max_age=RESULTS_MAX_AGE_S,
            allow_direct=True,
        ),
    )
    await bodies_bucket(js)
    await result_bodies_bucket(js)
    await live_bucket(js)
    await trainers_bucket(js)
    await leases_bucket(js)


async def bodies_bucket(js: JetStreamContext) -> ObjectStore:
    """The bucket of large bodies of operations. Their age bounds what a crash may leave behind."""
    return await _object_bucket(
        js, BODIES_BUCKET, max_age_s=limits.BODIES_MAX_AGE_S, max_bytes=limits.BODIES_MAX_BYTES
    )


async def result_bodies_bucket(js: JetStreamContext) -> ObjectStore:
    """The bucket of large results, which nobody deletes: they go when the results do."""
    return await _object_bucket(
        js,
        RESULT_BODIES_BUCKET,
        max_age_s=RESULTS_MAX_AGE_S,
        max_bytes=limits.RESULT_BODIES_MAX_BYTES,
    )


async def live_bucket(js: JetStreamContext) -> KeyValue:
    """`LiveVersion`s by run id."""
    return await _bucket(js, KeyValueConfig(bucket=LIVE_BUCKET, max_bytes=limits.KV_MAX_BYTES))


async def trainers_bucket(js: JetStreamContext) -> KeyValue:
    """`TrainerRecord`s by trainer id; they fade when nobody renews them."""
    return await _bucket(
        js,
        KeyValueConfig(
            bucket=TRAINERS_BUCKET,
            ttl=limits.TRAINER_RECORD_MAX_AGE_S,
            max_bytes=limits.KV_MAX_BYTES,
        ),
    )


async def leases_bucket(js: JetStreamContext) -> KeyValue:
    """Ids of trainers by the token of their base model; a lease that nobody renews is free."""
    return await _bucket(
        js,
        KeyValueConfig(
            bucket=LEASES_BUCKET, ttl=limits.LEASE_MAX_AGE_S, max_bytes=limits.KV_MAX_BYTES
        ),
    )


async def publish_body(
    js: JetStreamContext,
    subject: str,
    body: bytes,
    *,
    message_id: str | None = None,
    of_result: bool = False,
    headers: Mapping[str, str] | None = None,
) -> PubAck:
    """Publishes `body`, through an object store if it is large; on return JetStream has it all.

    Publishing again under the same `message_id` is a no-op within the stream's deduplication window.

    Raises:
        nats.errors.Error: it may or may not be stored; publishing again with the same id is safe.
    """
    all_headers = dict(headers or {})
    if message_id is not None:
        all_headers[MESSAGE_ID_HEADER] = message_id
    if len(body) <= (RESULT_INLINE_MAX_BYTES if of_result else BODY_INLINE_MAX_BYTES):
        return await js.publish(
            subject, body, timeout=limits.NATS_REQUEST_TIMEOUT_S, headers=all_headers or None
        )
    if of_result:
        all_headers[BODY_BUCKET_HEADER] = RESULT_BODIES_BUCKET
    bucket = await (result_bodies_bucket(js) if of_result else bodies_bucket(js))
    name = _names.next().decode()
    await bucket.put(name, body)
    all_headers[BODY_HEADER] = name
    ack = await js.publish(subject, b"", timeout=limits.NATS_REQUEST_TIMEOUT_S, headers=all_headers)
    if ack.duplicate:
        await bucket.delete(name)
    return ack


async def read_body(
    js: JetStreamContext, data: bytes | None, headers: Mapping[str, str] | None
) -> bytes:
    """The body of a message that `publish_body` sent.

    Raises:
        nats.js.errors.NotFoundError: its object is gone.
    """
    headers = headers or {}
    name = headers.get(BODY_HEADER)
    if name is None:
        return data or b""
    of_result = headers.get(BODY_BUCKET_HEADER) == RESULT_BODIES_BUCKET
    bucket = await (result_bodies_bucket(js) if of_result else bodies_bucket(js))
    return (await bucket.get(name)).data or b""


async def delete_body(js: JetStreamContext, name: str) -> None:
    """Deletes the object of an operation's body; one that is gone, or half deleted, is fine."""
    bucket = await bodies_bucket(js)
    with contextlib.suppress(NotFoundError):
        await bucket.delete(name)


async def submit(js: JetStreamContext, message: TrainMessage) -> PubAck:
    """Puts an operation into the journal; on return it is durable. `ack.duplicate` says that it was there already."""
    return await publish_body(
        js,
        train_subject(message.base_model, message.run_id),
        _encoder.encode(message),
        message_id=f"{message.run_id}:{message.seq}",
        headers={
            TENANT_HEADER: message.tenant_id,
            TOKENS_HEADER: str(task_tokens(message.task)),
            ADVANCES_HEADER: "1" if isinstance(message.task, ADVANCING) else "0",
        },
    )


async def find_message(
    js: JetStreamContext, base_model: str, run_id: str, seq: int
) -> TrainMessage | None:
    """The message of an operation, None if the journal does not hold it (any more)."""
    subject, stream_seq = train_subject(base_model, run_id), 1
    while True:
        try:
            found = await js.get_msg(TRAIN_STREAM, seq=stream_seq, subject=subject, next=True)
            if (found.headers or {}).get(MESSAGE_ID_HEADER) == f"{run_id}:{seq}":
                return decode_message(await read_body(js, found.data, found.headers))
        except NotFoundError:
            return None
        assert found.seq is not None
        stream_seq = found.seq + 1


async def newest_seq(js: JetStreamContext, base_model: str, run_id: str) -> int | None:
    """The seq of the operation of a run that was stored last, None if the journal holds none (any more)."""
    try:
        found = await js.get_last_msg(TRAIN_STREAM, train_subject(base_model, run_id))
    except NotFoundError:
        return None
    return int((found.headers or {})[MESSAGE_ID_HEADER].rpartition(":")[2])


async def publish_result(js: JetStreamContext, result: TrainResult) -> None:
    """Makes a result the one of its operation; without its log-probabilities if there is no room for them."""
    subject = result_subject(result.operation_id)
    try:
        await publish_body(js, subject, _encoder.encode(result), of_result=True)
    except APIError as error:
        if error.err_code not in _FULL_CODES or result.logprobs is None:
            raise
        logger.exception(
            "no room for the log-probabilities of a result; it is published without them",
            extra={"operation": result.operation_id},
        )
        bare = msgspec.structs.replace(result, logprobs=None)
        await publish_body(js, subject, _encoder.encode(bare), of_result=True)


async def find_result(js: JetStreamContext, operation: str) -> TrainResult | None:
    """The result of an operation, None if there is none (any more)."""
    try:
        found = await js.get_last_msg(RESULTS_STREAM, result_subject(operation), direct=True)
        return decode_result(await read_body(js, found.data, found.headers))
    except NotFoundError:
        return None


def encode(value: msgspec.Struct) -> bytes:
    return _encoder.encode(value)


def decode_message(body: bytes) -> TrainMessage:
    return _message_decoder.decode(body)


def decode_live(body: bytes) -> LiveVersion:
    return _live_decoder.decode(body)


def decode_queue_state(body: bytes) -> QueueState:
    return _queue_state_decoder.decode(body)


def decode_result(body: bytes) -> TrainResult:
    return _result_decoder.decode(body)


async def retry(attempt: Callable[[], Awaitable[Value]], *, doing: str) -> Value:
    """`attempt` again and again until NATS is there and takes it. For what must not be lost."""
    delay_s = limits.RETRY_DELAY_MIN_S
    while True:
        try:
            return await attempt()
        except (nats.errors.Error, OSError) as error:
            logger.warning("NATS: %s: %r", doing, error)
        await asyncio.sleep(delay_s)
        delay_s = min(delay_s * 2, limits.RETRY_DELAY_MAX_S)


async def connect(url: str) -> Client:
    """A connection that is made, and made again, for as long as it takes."""

    async def attempt() -> Client:
        return await nats.connect(
            url,
            max_reconnect_attempts=-1,
            reconnect_time_wait=limits.RETRY_DELAY_MIN_S,
            connect_timeout=int(limits.RETRY_DELAY_MAX_S),
            error_cb=_log_error,
        )

    return await retry(attempt, doing="connecting")


async def _log_error(error: Exception) -> None:
    logger.warning("NATS: %r", error)


async def _ensure_stream(js: JetStreamContext, config: StreamConfig) -> None:
    try:
        await js.add_stream(config)
    except BadRequestError:
        await js.update_stream(config)


_known: WeakKeyDictionary[JetStreamContext, set[str]] = WeakKeyDictionary()
"""Buckets that are there. A handle of one is then made without asking the server, as nats-py itself would each time."""


async def _bucket(js: JetStreamContext, config: KeyValueConfig) -> KeyValue:
    name = config.bucket
    assert name
    known = _known.setdefault(js, set())
    if name not in known:
        try:
            await js.key_value(name)
        except (BucketNotFoundError, NotFoundError):
            await js.create_key_value(config)
        known.add(name)
    return KeyValue(name=name, stream=f"KV_{name}", pre=f"$KV.{name}.", js=js, direct=False)


async def _object_bucket(
    js: JetStreamContext, name: str, *, max_age_s: float, max_bytes: int
) -> ObjectStore:
    known = _known.setdefault(js, set())
    if name not in known:
        try:
            await js.object_store(name)
        except (BucketNotFoundError, NotFoundError):
            config = ObjectStoreConfig(
                bucket=name, ttl=max_age_s, max_bytes=max_bytes, storage=StorageType.FILE
            )
            await js.create_object_store(name, config)
        known.add(name)
    return ObjectStore(name=name, stream=f"OBJ_{name}", js=js)
