"""Training data on its way out, numbers on their way back.

Only what the wire cannot carry is refused here; whether values make sense is the server's to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from river_client import wire
from river_client.exceptions import InvalidRequestError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DatumLike: TypeAlias = Mapping[str, Any] | wire.Datum
"""A training sequence: `input_ids` and, aligned with it, what the loss needs (`wire.Datum`).

Values are lists, numpy arrays or torch tensors.
"""

_Dtype: TypeAlias = Literal["int32", "int64", "float32", "uint8", "uint16"]

_LITTLE_ENDIAN: dict[_Dtype, str] = {
    "int32": "<i4",
    "int64": "<i8",
    "float32": "<f4",
    "uint8": "<u1",
    "uint16": "<u2",
}
_INT32_MIN = -(2**31)
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1


def pack_data(data: Sequence[DatumLike]) -> list[wire.Datum]:
    """The data as the wire carries them.

    Raises:
        InvalidRequestError: a field is unknown, missing or no array of numbers.
    """
    return [_pack_datum(datum, f"data[{position}]") for position, datum in enumerate(data)]


def _pack_datum(datum: DatumLike, where: str) -> wire.Datum:
    if isinstance(datum, wire.Datum):
        return datum
    fields: dict[str, wire.Tensor] = {}
    for name, value in datum.items():
        if name not in wire.Datum.__struct_fields__:
            known = ", ".join(wire.Datum.__struct_fields__)
            raise InvalidRequestError(
                f"{where}.{name}: unknown, there are {known}", param=f"{where}.{name}"
            )
        if value is not None:
            fields[name] = pack(value, f"{where}.{name}")
    if "input_ids" not in fields:
        raise InvalidRequestError(f"{where}.input_ids: missing", param=f"{where}.input_ids")
    return wire.Datum(**fields)


def pack(value: Any, where: str) -> wire.Tensor:
    """A list, numpy array or torch tensor as little-endian bytes; floats become float32. A tensor of the wire stays.

    Raises:
        InvalidRequestError: it is no array of numbers.
    """
    import numpy as np  # noqa: PLC0415 - importing the SDK stays cheap

    if isinstance(value, wire.Tensor):
        return value

    try:
        array = np.asarray(_detached(value))
    except (TypeError, ValueError) as error:
        message = f"{where}: not an array of numbers: {error}"
        raise InvalidRequestError(message, param=where) from None
    dtype = _wire_dtype(array)
    if dtype is None:
        raise InvalidRequestError(f"{where}: holds {array.dtype}, not numbers", param=where)
    # What is too large for float32 becomes infinite, which the server names with its index.
    with np.errstate(over="ignore"):
        packed = np.ascontiguousarray(array, dtype=_LITTLE_ENDIAN[dtype])
    return wire.Tensor(dtype=dtype, shape=tuple(array.shape), data=packed.tobytes())


def unpack(tensor: wire.Tensor) -> npt.NDArray[np.generic]:
    """The array of a tensor, read-only."""
    import numpy as np  # noqa: PLC0415 - importing the SDK stays cheap

    return np.frombuffer(tensor.data, dtype=_LITTLE_ENDIAN[tensor.dtype]).reshape(tensor.shape)


def token_lists(prompts: Sequence[Any]) -> list[list[int]]:
    """Prompts of token ids as plain lists, from lists, arrays or tensors."""
    return [prompt.tolist() if hasattr(prompt, "tolist") else list(prompt) for prompt in prompts]


def _detached(value: Any) -> Any:
    """A torch tensor as something numpy can read; anything else as it is."""
    if not hasattr(value, "detach"):
        return value
    tensor = value.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.float().numpy()  # bfloat16, which numpy lacks


def _wire_dtype(array: npt.NDArray[Any]) -> _Dtype | None:
    """The array's own type if it is a small one, else what holds its numbers; None if they are none."""
    if array.dtype.kind == "f":
        return "float32"
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:  # noqa: PLR2004 - bytes
        return "uint8" if array.dtype.itemsize == 1 else "uint16"
    if array.dtype.kind not in "biu":
        return None
    if array.size == 0 or (array.min() >= _INT32_MIN and array.max() <= _INT32_MAX):
        return "int32"
    return "int64" if array.max() <= _INT64_MAX else None
