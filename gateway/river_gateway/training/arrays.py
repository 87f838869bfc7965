"""Numbers from the wire as numpy arrays, with every way in which they can be wrong named by field, index and limit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from river_client.wire import Tensor
from river_gateway.errors import InvalidFieldError

if TYPE_CHECKING:
    import numpy.typing as npt

    from river_client.wire import Numbers

    IntArray = npt.NDArray[np.int32]
    FloatArray = npt.NDArray[np.float32]

_DTYPES = {"int32": "<i4", "int64": "<i8", "float32": "<f4", "uint8": "<u1", "uint16": "<u2"}


def integers(value: Numbers, field: str) -> npt.NDArray[np.int64]:
    """Whole numbers, [T] or [T, K].

    Raises:
        InvalidFieldError: the value is no array, or an item is not whole.
    """
    array = _array(value, field)
    if array.dtype.kind == "f":
        fractional = ~np.isfinite(array) | (array != np.floor(array)) | (np.abs(array) >= 2.0**53)
        _refuse_first(fractional, array, field, "is not a whole number")
        return array.astype(np.int64)
    return array.astype(np.int64, copy=False)


def token_ids(
    value: Numbers, field: str, vocab_size: int, *, ignored_from: int | None = None
) -> IntArray:
    """Token ids, [T] or [T, K], all within the vocabulary; what is from `ignored_from` on may be any filler, and is 0.

    Raises:
        InvalidFieldError: as `integers`, or an id is not in [0, vocab_size).
    """
    array = integers(value, field)
    if ignored_from is not None:
        array = array.copy()  # what came packed cannot be written to
        array[ignored_from:] = 0
    outside = (array < 0) | (array >= vocab_size)
    _refuse_first(outside, array, field, f"is outside the vocabulary of {vocab_size}")
    return array.astype("<i4")


def finite_floats(value: Numbers, field: str) -> FloatArray:
    """Finite numbers that fit float32, [T] or [T, K].

    Raises:
        InvalidFieldError: the value is no array, or an item is not finite.
    """
    array = _array(value, field)
    with np.errstate(over="ignore"):
        narrow = array.astype("<f4")
    _refuse_first(np.isnan(array), array, field, "is not a number")
    _refuse_first(~np.isfinite(narrow), array, field, "is too large for float32")
    return narrow


def _array(value: Numbers, field: str) -> npt.NDArray[Any]:
    if not isinstance(value, Tensor):
        return _listed(value, field)
    if len(value.shape) not in (1, 2):
        raise InvalidFieldError(
            f"{field}: shape {list(value.shape)}, must be [T] or [T, K]", param=field
        )
    return unpacked(value, field)


def unpacked(tensor: Tensor, field: str) -> npt.NDArray[Any]:
    """The array of a tensor, of any number of dimensions, read-only.

    Raises:
        InvalidFieldError: its bytes do not fit its shape.
    """
    dtype = np.dtype(_DTYPES[tensor.dtype])
    if min(tensor.shape, default=0) < 0:
        raise InvalidFieldError(
            f"{field}: shape {list(tensor.shape)}, must not be negative", param=field
        )
    size_bytes = math.prod(tensor.shape) * dtype.itemsize
    if len(tensor.data) != size_bytes:
        raise InvalidFieldError(
            f"{field}: {len(tensor.data)} bytes, but shape {list(tensor.shape)} of {tensor.dtype} "
            f"takes {size_bytes}",
            param=field,
        )
    return np.frombuffer(tensor.data, dtype=dtype).reshape(tensor.shape)


def _listed(items: Any, field: str) -> npt.NDArray[Any]:
    """A list of numbers, or of rows of equal length."""
    rows = cast("list[float | list[float]]", items)
    if not any(isinstance(row, list) for row in rows):
        return np.asarray(rows, dtype=np.float64)
    want = _width(rows[0])
    for index, row in enumerate(rows):
        if _width(row) != want:
            where = f"{field}[{index}]"
            raise InvalidFieldError(
                f"{where}: {_width(row)}, but {field}[0] is {want}", param=where
            )
    return np.asarray(rows, dtype=np.float64).reshape(len(rows), -1)


def _width(row: float | list[float]) -> str:
    return f"a row of {len(row)}" if isinstance(row, list) else "one number"


def _refuse_first(
    wrong: npt.NDArray[np.bool_], array: npt.NDArray[Any], field: str, why: str
) -> None:
    """Raises about the first wrong item, if there is one."""
    if not wrong.any():
        return
    place = np.unravel_index(int(np.argmax(wrong)), array.shape)
    where = field + "".join(f"[{index}]" for index in place)
    item = array[place]
    shown = "NaN" if np.isnan(item) else f"{item:g}" if array.dtype.kind == "f" else f"{item}"
    raise InvalidFieldError(f"{where}: {shown} {why}", param=where)
