"""Arrays of the Tinker protocol, dense or sparse, as numpy arrays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from river_gateway.dialects.tinker import messages_pb2 as pb
from river_gateway.errors import InvalidFieldError
from river_gateway.limits import SPARSE_CELLS_MAX

if TYPE_CHECKING:
    import numpy.typing as npt

    from river_gateway.dialects.tinker.bodies import TensorData

    Array = npt.NDArray[Any]
    """int64 or float32, [N] or [N, K]."""

_INDEX = np.dtype("<i8")
_DTYPES = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),
}


class Tensors:
    """Reads the arrays of one request, whose sparse ones may not be spread out to more than `SPARSE_CELLS_MAX`.

    Every method raises InvalidFieldError where bytes do not fit a shape, or indices are none of such an array.
    """

    def __init__(self) -> None:
        self._cells_left = SPARSE_CELLS_MAX

    def of_message(self, tensor: pb.Tensor, field: str, *, padding: int = 0) -> Array:
        """The array of a message; empty cells of a sparse one are `padding`."""
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise InvalidFieldError(
                f"{field}: dtype {tensor.dtype} is none of the protocol's", param=field
            )
        shape = list(tensor.shape)
        if tensor.WhichOneof("encoding") != "sparse_csr":
            values = _widened(_numbers(tensor.dense, dtype, field), tensor.dtype)
            return _shaped(values, shape or [len(values)], field)
        csr = tensor.sparse_csr
        return self._dense(
            _widened(_numbers(csr.values, dtype, field), tensor.dtype),
            _numbers(csr.crow_indices, _INDEX, field),
            _numbers(csr.col_indices, _INDEX, field),
            shape,
            field,
            padding,
        )

    def of_json(self, tensor: TensorData, field: str, *, padding: int = 0) -> Array:
        """The same of a JSON body."""
        wide = np.asarray(tensor.data, dtype=np.float64)
        if tensor.dtype == "int64":
            values = _whole(wide, field)
        else:
            with np.errstate(over="ignore"):
                values = wide.astype("<f4")
        if tensor.sparse_crow_indices is None and tensor.sparse_col_indices is None:
            return _shaped(values, tensor.shape or [len(values)], field)
        try:
            crow = np.asarray(tensor.sparse_crow_indices or [], dtype=_INDEX)
            col = np.asarray(tensor.sparse_col_indices or [], dtype=_INDEX)
        except OverflowError:
            raise InvalidFieldError(f"{field}: an index is too large", param=field) from None
        return self._dense(values, crow, col, tensor.shape or [], field, padding)

    def _dense(
        self, values: Array, crow: Array, col: Array, shape: list[int], field: str, padding: int
    ) -> Array:
        """The dense array [N, K] of a sparse one in the CSR layout."""
        if len(shape) != 2 or min(shape) < 0:  # noqa: PLR2004 - as the message says
            raise InvalidFieldError(f"{field}: shape {shape}, a sparse one is [N, K]", param=field)
        rows, columns = shape
        self._cells_left -= rows * columns
        if self._cells_left < 0:
            raise InvalidFieldError(
                f"{field}: the sparse arrays of this request have more than {SPARSE_CELLS_MAX} cells",
                param=field,
            )
        counts = np.diff(crow)
        fits = len(crow) == rows + 1 and crow[0] == 0 and crow[-1] == len(values) == len(col)
        if not fits or (counts < 0).any():
            raise InvalidFieldError(
                f"{field}: the row indices are not those of {rows} rows with {len(values)} values",
                param=field,
            )
        if ((col < 0) | (col >= columns)).any():
            raise InvalidFieldError(
                f"{field}: a column index is outside 0 to {columns - 1}", param=field
            )
        spread = np.full((rows, columns), padding, dtype=values.dtype)
        spread[np.repeat(np.arange(rows), counts), col] = values
        return spread


def message_of(array: Array) -> pb.Tensor:
    """A dense array as a message."""
    wide = array.dtype.kind == "i"
    return pb.Tensor(
        dense=array.astype("<i8" if wide else "<f4").tobytes(),
        dtype=pb.DTYPE_INT64 if wide else pb.DTYPE_FLOAT32,
        shape=array.shape,
    )


def _shaped(values: Array, shape: list[int], field: str) -> Array:
    if len(shape) not in (1, 2) or min(shape) < 0 or max(shape) > SPARSE_CELLS_MAX:
        raise InvalidFieldError(f"{field}: shape {shape}, must be [N] or [N, K]", param=field)
    if math.prod(shape) != len(values):
        raise InvalidFieldError(
            f"{field}: {len(values)} values, but shape {shape} takes {math.prod(shape)}",
            param=field,
        )
    return values.reshape(shape)


def _numbers(data: bytes, dtype: np.dtype[Any], field: str) -> Array:
    if len(data) % dtype.itemsize:
        raise InvalidFieldError(
            f"{field}: {len(data)} bytes are no whole number of {dtype.itemsize}-byte items",
            param=field,
        )
    return np.frombuffer(data, dtype=dtype)


def _widened(values: Array, dtype: int) -> Array:
    """As one of the protocol's public types: int64 and float32."""
    if dtype == pb.DTYPE_BFLOAT16:  # The upper half of a float32.
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype("<i8") if dtype == pb.DTYPE_INT32 else values


def _whole(values: npt.NDArray[np.float64], field: str) -> Array:
    wrong = ~np.isfinite(values) | (values != np.floor(values)) | (np.abs(values) >= 2.0**53)
    if wrong.any():
        place = int(np.argmax(wrong))
        where = f"{field}[{place}]"
        raise InvalidFieldError(f"{where}: {values[place]:g} is not a whole number", param=where)
    return values.astype(np.int64)
