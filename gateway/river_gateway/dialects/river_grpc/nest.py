"""NEST: numpy arrays in dictionaries and lists as one body, the form of training data in the River dialect.

All integers are little-endian. A body is `NEST`, the version 1, three zero bytes, and one value:

* 0, an array: its type (`_DTYPES`), its number of dimensions, each as u64, the xxh64 of its bytes (seed `_SEED`), zeros
  up to a multiple of 8 from the body's start, its bytes in C order. A string is an array of type 11 and no dimensions:
  u32 length, checksum, zeros, UTF-8.
* 1, a dictionary: u32 count, then for each item u16 length of the key, the key in UTF-8, the value.
* 2, a list: u32 count, then the values.

Nothing follows the value. Arrays are read without a copy and stay read-only.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

Array: TypeAlias = npt.NDArray[Any]
Value: TypeAlias = "Array | str | Mapping[str, Value] | Sequence[Value]"

_HEADER = b"NEST\x01\0\0\0"
_SEED = 0x4E455354
_ARRAY, _DICT, _LIST = 0, 1, 2
_STRING = 11
_DTYPES = {
    code: np.dtype(name)
    for code, name in enumerate(
        ("?", "<i1", "<i2", "<i4", "<i8", "<u1", "<u2", "<u4", "<u8", "<f4", "<f8")
    )
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

DEPTH_MAX = 8
DIMENSIONS_MAX = 8
DIMENSION_MAX = 2**40
KEY_MAX_BYTES = 2**16 - 1


class NestError(ValueError):
    """A body is no NEST; the message names the place and what is wrong there."""


# ---- Reading ---------------------------------------------------------------------------------------------------------


def decode(body: bytes | memoryview) -> Value:
    """The value of a body, its arrays views of it.

    Raises:
        NestError: it is malformed, or deeper than `DEPTH_MAX`.
    """
    reader = _Reader(memoryview(body))
    value = reader.body()
    reader.expect_end()
    return value


class _Reader:
    """Reads a body from its beginning; `where` in messages is the path of the value being read."""

    def __init__(self, body: memoryview) -> None:
        self._body = body
        self._offset = 0

    def body(self) -> Value:
        header = bytes(self._take(len(_HEADER), "the header"))
        if header[:4] != _HEADER[:4]:
            raise NestError("the body does not begin with NEST")
        if header[4] != _HEADER[4]:
            raise NestError(f"version {header[4]}, only 1 is known")
        if header != _HEADER:
            raise NestError("the last three bytes of the header are not zero")
        return self._value("the body", 0)

    def expect_end(self) -> None:
        left = len(self._body) - self._offset
        if left:
            raise NestError(f"{left} bytes follow the value")

    def _value(self, where: str, depth: int) -> Value:
        if depth > DEPTH_MAX:
            raise NestError(f"{where}: more than {DEPTH_MAX} levels deep")
        tag = self._u8(where)
        if tag == _ARRAY:
            return self._array(where)
        if tag == _DICT:
            return self._dict(where, depth)
        if tag == _LIST:
            count = self._u32(where)
            self._check_room(count, 1, where)
            return [self._value(f"{where}[{index}]", depth + 1) for index in range(count)]
        raise NestError(f"{where}: unknown tag {tag}")

    def _dict(self, where: str, depth: int) -> dict[str, Value]:
        count = self._u32(where)
        self._check_room(count, 3, where)  # the key's length and a tag
        items: dict[str, Value] = {}
        for _ in range(count):
            (length,) = struct.unpack("<H", self._take(2, where))
            key = self._text(length, f"{where}: a key")
            if key in items:
                raise NestError(f"{where}: the key {key!r} comes twice")
            items[key] = self._value(key if depth == 0 else f"{where}.{key}", depth + 1)
        return items

    def _array(self, where: str) -> Array | str:
        code, dimensions = self._u8(where), self._u8(where)
        if code == _STRING:
            if dimensions:
                raise NestError(f"{where}: a string has no dimensions, this one has {dimensions}")
            length = self._u32(where)
            checksum = self._u64(where)
            self._skip_padding(where)
            self._check_sum(self._body[self._offset : self._offset + length], checksum, where)
            return self._text(length, where)
        dtype = _DTYPES.get(code)
        if dtype is None:
            raise NestError(f"{where}: unknown type {code}")
        if dimensions > DIMENSIONS_MAX:
            raise NestError(f"{where}: {dimensions} dimensions, at most {DIMENSIONS_MAX}")
        shape = tuple(self._u64(where) for _ in range(dimensions))
        if max(shape, default=0) > DIMENSION_MAX:
            raise NestError(f"{where}: a dimension of {max(shape)}, at most {DIMENSION_MAX}")
        checksum = self._u64(where)
        self._skip_padding(where)
        raw = self._take(math.prod(shape) * dtype.itemsize, where)
        self._check_sum(raw, checksum, where)
        array = np.frombuffer(raw, dtype=np.uint8 if dtype == np.bool_ else dtype)
        if dtype == np.bool_:
            if array.size and array.max() > 1:
                raise NestError(f"{where}: a bool that is neither 0 nor 1")
            array = array.view(np.bool_)
        return array.reshape(shape)

    def _take(self, size: int, where: str) -> memoryview:
        left = len(self._body) - self._offset
        if size > left:
            raise NestError(f"{where}: {size} bytes wanted at {self._offset}, {left} are left")
        self._offset += size
        return self._body[self._offset - size : self._offset]

    def _check_room(self, count: int, item_min_bytes: int, where: str) -> None:
        """Refuses a count that the rest of the body cannot hold, before anything is made for it."""
        left = len(self._body) - self._offset
        if count * item_min_bytes > left:
            raise NestError(f"{where}: {count} items, but only {left} bytes are left")

    def _skip_padding(self, where: str) -> None:
        if any(self._take(-self._offset % 8, where)):
            raise NestError(f"{where}: padding that is not zero")

    def _check_sum(self, raw: memoryview, wanted: int, where: str) -> None:
        if xxhash.xxh64_intdigest(raw, seed=_SEED) != wanted:
            raise NestError(f"{where}: the checksum does not fit")

    def _text(self, length: int, where: str) -> str:
        try:
            return bytes(self._take(length, where)).decode()
        except UnicodeDecodeError:
            raise NestError(f"{where}: not UTF-8") from None

    def _u8(self, where: str) -> int:
        return self._take(1, where)[0]

    def _u32(self, where: str) -> int:
        return int.from_bytes(self._take(4, where), "little")

    def _u64(self, where: str) -> int:
        return int.from_bytes(self._take(8, where), "little")


# ---- Writing ---------------------------------------------------------------------------------------------------------


def encode(value: Value) -> bytes:
    """The body of a value."""
    body = bytearray(_HEADER)
    _write(body, value)
    return bytes(body)


def _write(body: bytearray, value: Value) -> None:
    if isinstance(value, np.ndarray):
        _write_array(body, value)
    elif isinstance(value, str):
        raw = value.encode()
        body += struct.pack("<BBBI", _ARRAY, _STRING, 0, len(raw))
        _write_summed(body, raw)
    elif isinstance(value, Mapping):
        body += struct.pack("<BI", _DICT, len(value))
        for key, item in value.items():
            raw = key.encode()
            assert len(raw) <= KEY_MAX_BYTES
            body += struct.pack("<H", len(raw)) + raw
            _write(body, item)
    else:
        body += struct.pack("<BI", _LIST, len(value))
        for item in value:
            _write(body, item)


def _write_array(body: bytearray, array: Array) -> None:
    code = _CODES[array.dtype.newbyteorder("<")]
    raw = np.ascontiguousarray(array, dtype=_DTYPES[code]).tobytes()
    body += struct.pack(f"<BBB{array.ndim}Q", _ARRAY, code, array.ndim, *array.shape)
    _write_summed(body, raw)


def _write_summed(body: bytearray, raw: bytes) -> None:
    body += struct.pack("<Q", xxhash.xxh64_intdigest(raw, seed=_SEED))
    body += bytes(-len(body) % 8)
    body += raw
