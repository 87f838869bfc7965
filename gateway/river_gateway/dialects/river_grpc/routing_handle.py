"""The experts of a sample as the opaque handle that the client carries from a sample to its training data.

The handle is the record itself, compressed: nothing has to be kept for it, so it works on every gateway and never
expires. A checksum tells a broken one from a whole one; whether its experts fit the model is checked with the data.
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from typing import TYPE_CHECKING, Literal

from river_client import wire
from river_gateway.dialects.river_grpc.limits import ROUTING_MAX_BYTES
from river_gateway.errors import InvalidFieldError

if TYPE_CHECKING:
    from river_client.wire import Tensor

_VERSION = 1
_HEAD = struct.Struct(
    "<BBIHHI"
)  # version, bytes of an item, tokens, layers, experts per token, crc32
_DTYPES: dict[int, Literal["uint8", "uint16"]] = {1: "uint8", 2: "uint16"}


def make_handle(routing: Tensor) -> str:
    """The handle of the experts [tokens, MoE layers, experts per token] of a sequence."""
    tokens, layers, per_token = routing.shape
    item_bytes = 1 if routing.dtype == "uint8" else 2
    head = _HEAD.pack(_VERSION, item_bytes, tokens, layers, per_token, zlib.crc32(routing.data))
    return base64.urlsafe_b64encode(head + zlib.compress(routing.data, level=1)).decode()


def read_handle(handle: bytes, field: str, *, tokens: int, size_max_bytes: int) -> Tensor:
    """The experts of a handle of a sequence of `tokens`, with or without those of its last one.

    Raises:
        InvalidFieldError: it is none that was made here, of another sequence, or larger than may be unpacked.
    """
    try:
        raw = base64.b64decode(handle, altchars=b"-_", validate=True)
        version, item_bytes, *shape, checksum = _HEAD.unpack_from(raw)
        if version != _VERSION:
            raise _unknown(field)
        # Before anything is unpacked: a small body may say that it is a large one.
        size_bytes = _checked_size(item_bytes, shape, field, tokens, size_max_bytes)
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(raw[_HEAD.size :], size_bytes + 1)
        dtype = _DTYPES[item_bytes]
    except (binascii.Error, struct.error, zlib.error, KeyError):
        raise _unknown(field) from None
    if len(data) != size_bytes or zlib.crc32(data) != checksum or not unpacker.eof:
        raise _unknown(field)
    return wire.Tensor(dtype=dtype, shape=(shape[0], shape[1], shape[2]), data=data)


def _checked_size(
    item_bytes: int, shape: list[int], field: str, tokens: int, size_max_bytes: int
) -> int:
    if shape[0] not in (tokens - 1, tokens):
        raise InvalidFieldError(
            f"{field}: of a sequence of {shape[0]} tokens, this one has {tokens}", param=field
        )
    size_bytes = item_bytes * shape[0] * shape[1] * shape[2]
    if size_bytes > size_max_bytes:
        raise InvalidFieldError(
            f"{field}: {size_bytes} bytes of experts, {size_max_bytes} are left of the {ROUTING_MAX_BYTES} that a "
            "request may have",
            param=field,
        )
    return size_bytes


def _unknown(field: str) -> InvalidFieldError:
    return InvalidFieldError(
        f"{field}: not a routing handle of this server; pass on what the sample carried",
        param=field,
    )
