"""Safetensors files, read and written without torch: a length of 8 bytes, a JSON header, and the tensors' bytes.

The header is a stranger's: everything in it is checked before a byte of a tensor is looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import msgspec
import numpy as np

from river_gateway.errors import InvalidFieldError
from river_gateway.limits import (
    IMPORT_HEADER_MAX_BYTES,
    IMPORT_NAME_MAX_CHARS,
    IMPORT_TENSORS_MAX,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy.typing as npt

    Array = npt.NDArray[np.generic]

BFLOAT16 = "BF16"
DTYPES: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    # numpy has no bfloat16; its bits can be moved about all the same.
    BFLOAT16: np.dtype("<u2"),
}
_LENGTH_BYTES = 8
_ALIGNMENT_BYTES = 8
_METADATA = "__metadata__"


class _Entry(msgspec.Struct, frozen=True):
    """A tensor as a header has it; the offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where in a file a tensor is: bytes [start, end)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written, which is made when its turn comes."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Array]


def read_header(file: IO[bytes], size_bytes: int, field: str) -> dict[str, TensorPlace]:
    """Every tensor of a file of that size, by name.

    Raises:
        InvalidFieldError: it is no safetensors file, or one with more than we take; names `field`.
    """
    file.seek(0)
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    begin = _LENGTH_BYTES + length
    if size_bytes < _LENGTH_BYTES or begin > size_bytes:
        raise _wrong(field, "is not a safetensors file: it ends within its header")
    if length > IMPORT_HEADER_MAX_BYTES:
        raise _wrong(field, f"has a header of {length} bytes, at most {IMPORT_HEADER_MAX_BYTES}")
    try:
        header = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        header.pop(_METADATA, None)
        entries = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _wrong(field, f"is not a safetensors file: {error}") from error
    if not 0 < len(entries) <= IMPORT_TENSORS_MAX:
        raise _wrong(field, f"holds {len(entries)} tensors, 1 to {IMPORT_TENSORS_MAX} are possible")
    _check_layout(entries, size_bytes - begin, field)
    return {
        name: TensorPlace(
            entry.dtype, entry.shape, begin + entry.data_offsets[0], begin + entry.data_offsets[1]
        )
        for name, entry in entries.items()
    }


def read_tensor(file: IO[bytes], place: TensorPlace) -> Array:
    """The tensor at a place; one of bfloat16 as its bits."""
    file.seek(place.start)
    data = file.read(place.end - place.start)
    return np.frombuffer(data, DTYPES[place.dtype]).reshape(place.shape)


def write_tensors(file: IO[bytes], tensors: Mapping[str, NewTensor]) -> None:
    """Writes a whole file, with one tensor at a time in memory."""
    header: dict[str, object] = {_METADATA: {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (offset, end),
        }
        offset = end
    encoded = msgspec.json.encode(header)
    encoded += b" " * (-len(encoded) % _ALIGNMENT_BYTES)
    file.write(len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded)
    for tensor in tensors.values():
        array = tensor.make()
        assert array.shape == tensor.shape
        assert array.dtype == DTYPES[tensor.dtype]
        file.write(np.ascontiguousarray(array).data)


def as_float32(array: Array, dtype: str) -> npt.NDArray[np.float32]:
    """Numbers of any of the types, without loss."""
    if dtype == BFLOAT16:
        return (array.astype("<u4") << 16).view("<f4")
    return array.astype("<f4")


def _check_layout(entries: Mapping[str, _Entry], data_bytes: int, field: str) -> None:
    """The tensors fill the file from end to end, each with the bytes that its shape needs."""
    offset = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, end = entry.data_offsets
        if len(name) > IMPORT_NAME_MAX_CHARS:
            limit = f"at most {IMPORT_NAME_MAX_CHARS}"
            raise _wrong(field, f"tensor {name[:40]}…: a name of {len(name)} characters, {limit}")
        if any(size < 0 for size in entry.shape):
            raise _wrong(field, f"tensor {name}: the shape {entry.shape} has a negative size")
        kind = DTYPES.get(entry.dtype)
        # What we do not take may still be dropped by whoever reads on; what is taken is checked there.
        expected = None if kind is None else math.prod(entry.shape) * kind.itemsize
        if start != offset or end < start or (expected is not None and end - start != expected):
            raise _wrong(
                field, f"tensor {name}: bytes {start} to {end} do not fit its shape and place"
            )
        offset = end
    if offset != data_bytes:
        raise _wrong(field, f"has {data_bytes} bytes of tensors, its header says {offset}")


def _wrong(field: str, what: str) -> InvalidFieldError:
    return InvalidFieldError(f"{field}: {what}", param=field)
