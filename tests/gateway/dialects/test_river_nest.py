"""NEST, the form of training data in the River dialect."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from river_gateway.dialects.river_grpc import nest

HEADER = b"NEST\x01\0\0\0"
NUMBERS = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"]

arrays = hnp.arrays(
    dtype=st.sampled_from(NUMBERS),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
values = st.recursive(
    arrays | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(left: Any, right: Any) -> bool:
    """Whether two values are one, types of arrays and NaN included."""
    if isinstance(left, np.ndarray):
        return (
            isinstance(right, np.ndarray)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def array_bytes(code: int, shape: tuple[int, ...], raw: bytes, *, before: int = 0) -> bytes:
    """An array as the format's description says, `before` bytes after a body's beginning."""
    checksum = xxhash.xxh64_intdigest(raw, seed=0x4E455354)
    head = struct.pack(f"<BBB{len(shape)}QQ", 0, code, len(shape), *shape, checksum)
    return head + bytes(-(before + len(head)) % 8) + raw


@given(values)
def test_what_is_written_is_read(value: Any) -> None:
    """Any nesting of arrays, strings, lists and dictionaries comes back as it was."""
    assert same(nest.decode(nest.encode(value)), value)


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(garbage: bytes) -> None:
    """Whatever comes after a header is read or refused by name, never a crash."""
    try:
        nest.decode(HEADER + garbage)
    except nest.NestError as error:
        assert str(error)  # noqa: PT017 - that it has a message is the point


@given(values, st.data())
def test_what_is_cut_off_is_noticed(value: Any, data: st.DataObject) -> None:
    """A body cut off anywhere is refused."""
    body = nest.encode(value)
    cut = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(nest.NestError):
        nest.decode(body[:cut])


def test_the_layout_is_that_of_the_description() -> None:
    """A dictionary of two arrays is laid out byte by byte as the format says, and read so."""
    ids, weights = np.array([5, 6, 7], "<i8"), np.array([[0.5, 1.0]], "<f4")
    body = HEADER + struct.pack("<BI", 1, 2)
    for key, code, array in ((b"input_ids", 4, ids), (b"weights", 9, weights)):
        body += struct.pack("<H", len(key)) + key
        body += array_bytes(code, array.shape, array.tobytes(), before=len(body))
    assert nest.encode({"input_ids": ids, "weights": weights}) == body
    assert same(nest.decode(body), {"input_ids": ids, "weights": weights})


def test_reading_copies_nothing() -> None:
    """Arrays are read-only views of the body, so that 64 MiB of data take no second 64 MiB."""
    array = nest.decode(nest.encode(np.arange(1000)))
    assert isinstance(array, np.ndarray)
    assert not array.flags.owndata
    assert not array.flags.writeable


def test_big_endian_arrays_are_turned() -> None:
    """What is written is little-endian wherever it comes from."""
    assert nest.encode(np.array([1, 2], ">i4")) == nest.encode(np.array([1, 2], "<i4"))


GOOD = HEADER + array_bytes(4, (1,), bytes(8), before=8)
DICT_HEAD = HEADER + struct.pack("<BI", 1, 2)
EMPTY_LIST = struct.pack("<BI", 2, 0)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "the header: 8 bytes wanted at 0, 0 are left"),
        (b"NOSE" + GOOD[4:], "does not begin with NEST"),
        (b"NEST\x02" + GOOD[5:], "version 2, only 1 is known"),
        (b"NEST\x01\0\0\x07" + GOOD[8:], "last three bytes of the header"),
        (GOOD + b"\0", "1 bytes follow the value"),
        (GOOD[:-1] + b"\x01", "the checksum does not fit"),
        (HEADER + b"\x07", "the body: unknown tag 7"),
        (HEADER + array_bytes(12, (1,), b"\0", before=8), "unknown type 12"),
        (HEADER + array_bytes(5, (1,) * 9, b"\0", before=8), "9 dimensions, at most 8"),
        (HEADER + struct.pack("<BBBQQ", 0, 4, 1, 2**60, 0), "a dimension of 115292"),
        (HEADER + struct.pack("<BBBQQ", 0, 4, 1, 2**39, 0) + bytes(5), "bytes wanted"),
        (HEADER + array_bytes(0, (1,), b"\x02", before=8), "a bool that is neither 0 nor 1"),
        (HEADER + struct.pack("<BBB", 0, 11, 1) + bytes(20), "a string has no dimensions"),
        (HEADER + struct.pack("<BI", 2, 2**32 - 1), "4294967295 items, but only 0 bytes"),
        (HEADER + struct.pack("<BI", 1, 2**31), "2147483648 items, but only 0 bytes"),
        (HEADER + struct.pack("<BI", 2, 1) * 9 + b"\0", "more than 8 levels deep"),
        (
            DICT_HEAD + (struct.pack("<H", 1) + b"a" + EMPTY_LIST) * 2,
            "the key 'a' comes twice",
        ),
        (DICT_HEAD + struct.pack("<H", 2) + b"\xff\xfe" + EMPTY_LIST, "not UTF-8"),
    ],
)
def test_what_is_malformed_is_refused_by_name(body: bytes, reason: str) -> None:
    """Each way in which a body can be wrong has its sentence."""
    with pytest.raises(nest.NestError, match=reason):
        nest.decode(body)


def test_padding_that_is_not_zero_is_refused() -> None:
    """Nothing hides between the values."""
    body = bytearray(GOOD)
    body[-9] = 1  # the last byte before the eight of the number
    with pytest.raises(nest.NestError, match="padding that is not zero"):
        nest.decode(bytes(body))


def test_messages_name_the_place() -> None:
    """An error inside a datum says which of its fields it is in."""
    body = bytearray(nest.encode({"weights": np.array([1.0], "<f4"), "rows": ["a", "b"]}))
    body[-1] ^= 1
    with pytest.raises(nest.NestError, match=r"^rows\[1\]: the checksum does not fit$"):
        nest.decode(bytes(body))
