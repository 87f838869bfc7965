"""How bodies of the Tinker protocol come in and go out: JSON or protobuf, maybe compressed, maybe empty."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import zstandard
from litestar import Request, Response

from river_gateway.codec import JSON, decode_body, idempotency_key
from river_gateway.decoding import beside_the_loop
from river_gateway.dialects.tinker.bodies import Told
from river_gateway.errors import MalformedBodyError, TooLargeError
from river_gateway.limits import (
    UNPACKED_MAX_BYTES,
    ZSTD_WINDOW_MAX_BYTES,
)

if TYPE_CHECKING:
    from collections.abc import Callable

AnyRequest = Request[Any, Any, Any]
Body = TypeVar("Body")
Made = TypeVar("Made")

_IDEMPOTENCY_HEADER = "x-idempotency-key"


async def read(request: AnyRequest, kind: type[Body]) -> Body:
    """The body of a request as a `kind`; one without a body is as an empty object.

    Raises:
        MalformedBodyError: it is no JSON.
        InvalidFieldError: it does not fit; names the field.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise MalformedBodyError("content-encoding: only the data of training may be compressed")
    return await read_with(request, lambda body: decode_body(body or b"{}", kind, JSON))


async def read_with(request: AnyRequest, decode: Callable[[bytes], Made]) -> Made:
    """What `decode` makes of the body of a request, unpacked; beside the event loop if it is large.

    Raises:
        As `decode`; MalformedBodyError, TooLargeError: it cannot be unpacked.
    """
    body = await request.body()
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        return await beside_the_loop(len(body), decode, body)
    if encoding != "zstd":
        raise MalformedBodyError(f"content-encoding: {encoding!r} is not offered, only zstd is")
    # How large it is unpacked is seen when it is.
    return await beside_the_loop(UNPACKED_MAX_BYTES, lambda: decode(unpacked(body)))


def unpacked(body: bytes) -> bytes:
    """The bytes that zstd made smaller.

    Raises:
        MalformedBodyError: it did not.
        TooLargeError: they are more than any body may have.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_MAX_BYTES)
    try:
        # Not in one go: what its header says of its size need not be true.
        with decompressor.stream_reader(body) as reader:
            whole = reader.read(UNPACKED_MAX_BYTES + 1)
    except zstandard.ZstdError as error:
        raise MalformedBodyError(f"the body is no zstd: {error}") from None
    if len(whole) > UNPACKED_MAX_BYTES:
        raise TooLargeError("the body, unpacked, is larger than this server takes")
    return whole


def told(value: Told, status: int = HTTPStatus.OK) -> Response[bytes]:
    """A JSON answer."""
    return Response(msgspec.json.encode(value), status_code=status, media_type=JSON)


def identity_of(request: AnyRequest) -> str | None:
    """What the client marks a request and its repetitions with; raises as `idempotency_key` does."""
    return idempotency_key(request, _IDEMPOTENCY_HEADER)
