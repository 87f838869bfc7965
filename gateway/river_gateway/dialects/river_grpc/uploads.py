"""Large bodies that come in parts over several connections: kept in NATS, so that each part may reach another gateway.

Parts lie in an object store, what is known of an upload in a KV bucket; both fade by themselves. Once the operation
that a body asks for is stored, its parts go, and the upload remembers the operation: the request that is sent again,
since its answer was lost, gets that one.
"""

# nats-py leaves parts of its interface untyped; nothing untyped leaves this module.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from nats.js.api import KeyValueConfig, ObjectStoreConfig, StorageType
from nats.js.errors import BucketNotFoundError, KeyNotFoundError, NotFoundError

from river_gateway import errors
from river_gateway.dialects.river_grpc import river_pb2 as pb
from river_gateway.dialects.river_grpc.call import TRAIN, Methods, Unary
from river_gateway.dialects.river_grpc.limits import (
    MESSAGE_MAX_BYTES,
    UPLOAD_KEPT_S,
    UPLOAD_MAX_BYTES,
    UPLOAD_PARALLELISM,
    UPLOAD_PARTS_MAX,
    UPLOADS_MAX_BYTES,
    UPLOADS_OF_TENANT_MAX_BYTES,
)
from river_gateway.ids import new_id
from river_gateway.limits import RETRY_AFTER_S

if TYPE_CHECKING:
    from nats.js import JetStreamContext
    from nats.js.kv import KeyValue
    from nats.js.object_store import ObjectStore

    from river_gateway.dialects.river_grpc.call import Call

_PARTS_BUCKET, _UPLOADS_BUCKET = "upload_parts", "uploads"


class _Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of an upload; `operation` is what it has been used for."""

    run_id: str
    size_bytes: int
    parts: int
    operation: str | None = None


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload of the caller's; `operation` is what it has been used for."""

    upload_id: str
    run_id: str
    operation: str | None
    parts: int
    size_bytes: int


# ---- RPCs ------------------------------------------------------------------------------------------------------------


async def _create_upload(call: Call, asked: pb.CreateUploadRequest) -> pb.CreateUploadResponse:
    """Opens an upload for an operation of a model."""
    run = await call.services.runs.find(asked.model_id, call.principal.tenant_id)
    size_bytes, parts = asked.total_size, asked.chunk_count
    if not 1 <= parts <= UPLOAD_PARTS_MAX:
        raise errors.InvalidFieldError(
            f"chunk_count: {parts}, must be 1 to {UPLOAD_PARTS_MAX}", param="chunk_count"
        )
    if not parts <= size_bytes <= UPLOAD_MAX_BYTES:
        raise errors.InvalidFieldError(
            f"total_size: {size_bytes} bytes, must be one a chunk to {UPLOAD_MAX_BYTES}",
            param="total_size",
        )
    call.services.bus.require()
    uploads = await _uploads(call.services.bus.jetstream)
    open_bytes = await _open_bytes(uploads, call.principal.tenant_id)
    if open_bytes + parts * _part_max_bytes(size_bytes, parts) > UPLOADS_OF_TENANT_MAX_BYTES:
        raise errors.RateLimitedError(
            f"{open_bytes} bytes of uploads are not used yet, at most {UPLOADS_OF_TENANT_MAX_BYTES} together",
            retry_after_s=RETRY_AFTER_S,
        )
    upload_id = new_id("upl")
    facts = _Facts(run_id=run.run_id, size_bytes=size_bytes, parts=parts)
    await uploads.put(_key(call, upload_id), msgspec.msgpack.encode(facts))
    return pb.CreateUploadResponse(upload_id=upload_id, max_parallelism=UPLOAD_PARALLELISM)


async def _upload_chunk(call: Call, asked: pb.UploadChunkRequest) -> pb.UploadChunkResponse:
    """Keeps a part; the same one again takes its place."""
    upload = await find_upload(call, asked.upload_id)
    if asked.chunk_index >= upload.parts:
        raise errors.InvalidFieldError(
            f"chunk_index: {asked.chunk_index}, the upload has {upload.parts} chunks",
            param="chunk_index",
        )
    if upload.operation is not None:
        raise errors.ConflictError(
            f"upload_id: it has been used for {upload.operation}", param="upload_id"
        )
    most = _part_max_bytes(upload.size_bytes, upload.parts)
    if not 1 <= len(asked.data) <= most:
        raise errors.InvalidFieldError(
            f"data: {len(asked.data)} bytes, must be 1 to {most}", param="data"
        )
    bucket = await _parts(call.services.bus.jetstream)
    await bucket.put(_part_name(upload.upload_id, asked.chunk_index), asked.data)
    return pb.UploadChunkResponse()


def _part_max_bytes(size_bytes: int, parts: int) -> int:
    """No chunk is longer: all but the last are equally long."""
    return min(-(-size_bytes // max(1, parts - 1)), MESSAGE_MAX_BYTES)


UPLOAD_METHODS: Methods = {
    "CreateUpload": Unary(pb.CreateUploadRequest, TRAIN, _create_upload),
    "UploadChunk": Unary(pb.UploadChunkRequest, TRAIN, _upload_chunk),
}

# ---- For the operation -----------------------------------------------------------------------------------------------


async def find_upload(call: Call, upload_id: str) -> Upload:
    """An upload of the caller's.

    Raises:
        NotFoundError: there is none, or its time is over.
        UnavailableError: NATS is not reachable.
    """
    call.services.bus.require()
    unknown = errors.NotFoundError(
        f"there is no upload {upload_id!r}; one is kept for {UPLOAD_KEPT_S:.0f} s",
        param="upload_id",
    )
    if not upload_id.isidentifier():  # It is to be a part of a key.
        raise unknown
    uploads = await _uploads(call.services.bus.jetstream)
    try:
        entry = await uploads.get(_key(call, upload_id))
    except KeyNotFoundError:
        raise unknown from None
    facts = msgspec.msgpack.decode(entry.value or b"", type=_Facts)
    return Upload(upload_id, facts.run_id, facts.operation, facts.parts, facts.size_bytes)


async def read_upload(call: Call, upload: Upload) -> bytes:
    """The body that was uploaded.

    Raises:
        InvalidFieldError: a part is missing, or they are not as many bytes as was said.
    """
    bucket = await _parts(call.services.bus.jetstream)
    parts: list[bytes] = []
    for index in range(upload.parts):
        try:
            found = await bucket.get(_part_name(upload.upload_id, index))
        except NotFoundError:
            raise errors.InvalidFieldError(
                f"upload_id: chunk {index} of {upload.parts} has not come", param="upload_id"
            ) from None
        parts.append(found.data or b"")
    size_bytes = sum(len(part) for part in parts)
    if size_bytes != upload.size_bytes:
        raise errors.InvalidFieldError(
            f"upload_id: {size_bytes} bytes have come, {upload.size_bytes} were announced",
            param="upload_id",
        )
    return b"".join(parts)


async def finish_upload(call: Call, upload: Upload, operation: str) -> None:
    """Notes what an upload has been used for, and lets its parts go."""
    jetstream = call.services.bus.jetstream
    facts = _Facts(
        run_id=upload.run_id, size_bytes=upload.size_bytes, parts=upload.parts, operation=operation
    )
    uploads = await _uploads(jetstream)
    await uploads.put(_key(call, upload.upload_id), msgspec.msgpack.encode(facts))
    bucket = await _parts(jetstream)
    for index in range(upload.parts):
        with suppress(NotFoundError):
            await bucket.delete(_part_name(upload.upload_id, index))


# ---- Buckets ---------------------------------------------------------------------------------------------------------


async def _open_bytes(uploads: KeyValue, tenant_id: str) -> int:
    """How much of a tenant's may come that is not used yet."""
    watcher = await uploads.watch(f"{tenant_id}.>", ignore_deletes=True)
    total = 0
    try:
        async for entry in watcher:
            if entry is None:  # That was all there is.
                break
            facts = msgspec.msgpack.decode(entry.value or b"", type=_Facts)
            if facts.operation is None:
                total += facts.parts * _part_max_bytes(facts.size_bytes, facts.parts)
    finally:
        await watcher.stop()
    return total


def _key(call: Call, upload_id: str) -> str:
    return f"{call.principal.tenant_id}.{upload_id}"


def _part_name(upload_id: str, index: int) -> str:
    return f"{upload_id}.{index}"


async def _uploads(jetstream: JetStreamContext) -> KeyValue:
    try:
        return await jetstream.key_value(_UPLOADS_BUCKET)
    except BucketNotFoundError:
        config = KeyValueConfig(bucket=_UPLOADS_BUCKET, ttl=UPLOAD_KEPT_S)
        return await jetstream.create_key_value(config)


async def _parts(jetstream: JetStreamContext) -> ObjectStore:
    try:
        return await jetstream.object_store(_PARTS_BUCKET)
    except (BucketNotFoundError, NotFoundError):
        config = ObjectStoreConfig(
            bucket=_PARTS_BUCKET,
            ttl=UPLOAD_KEPT_S,
            max_bytes=UPLOADS_MAX_BYTES,
            storage=StorageType.FILE,
        )
        return await jetstream.create_object_store(_PARTS_BUCKET, config)
