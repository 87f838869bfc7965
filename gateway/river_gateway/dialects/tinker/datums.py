"""Training data of the Tinker protocol as River's.

There, a datum of N tokens of input has N targets, all of which count: the i-th is what should follow the first i + 1
tokens. In River's sequences nothing is predicted from the last place, so theirs has one more token, which may be any.
The log-probabilities that come back lose that place again (`results.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError

from river_client import wire
from river_gateway.codec import JSON, decode_body
from river_gateway.dialects.tinker import bodies
from river_gateway.dialects.tinker import messages_pb2 as pb
from river_gateway.dialects.tinker.losses import TinkerLoss, find_loss, settings_of
from river_gateway.dialects.tinker.tensors import Tensors
from river_gateway.errors import (
    GatewayError,
    InvalidFieldError,
    MalformedBodyError,
    UnsupportedFieldError,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

_NOT_TEXT = {
    "image": "images are not offered by this server",
    "image_asset_pointer": "images are not offered by this server",
    "dmel": "audio is not offered by this server",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A forward or forward_backward: which operation of which run, and what it is, or what is wrong with it."""

    model: str
    seq: int
    operation: wire.Forward | wire.ForwardBackward | GatewayError


def of_protobuf(body: bytes) -> Asked:
    """What a protobuf body asks for.

    Raises:
        MalformedBodyError: it is none.
    """
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise MalformedBodyError(f"the body is no ForwardBackwardRequest: {error}") from None
    try:
        operation = _of_message(message)
    except InvalidFieldError as error:
        operation = error
    return Asked(message.model_id, message.seq_id, operation)


def of_json(body: bytes) -> Asked:
    """What a JSON body asks for, as older clients send it.

    Raises:
        MalformedBodyError, InvalidFieldError: it is none.
    """
    asked = decode_body(body, bodies.ForwardBackward, JSON)
    try:
        operation = _of_body(asked)
    except InvalidFieldError as error:
        operation = error
    return Asked(asked.model_id, asked.seq_id, operation)


# ---- Requests --------------------------------------------------------------------------------------------------------


def _of_message(message: pb.ForwardBackwardRequest) -> wire.Forward | wire.ForwardBackward:
    loss = find_loss(message.loss_fn)
    config: dict[str, float | str] = dict(message.loss_fn_config)
    if message.loss_fn_config_v2:
        config = {
            key: value.text if value.WhichOneof("value") == "text" else value.number
            for key, value in message.loss_fn_config_v2.items()
        }
    tensors = Tensors()
    data: list[wire.Datum] = []
    for index, datum in enumerate(message.data):
        where = f"data[{index}]"
        tokens = _input_of_message(datum.model_input, f"{where}.model_input")
        inputs = {
            key: tensors.of_message(value, f"{where}.loss_fn_inputs.{key}")
            for key, value in datum.loss_fn_inputs.items()
        }
        data.append(_datum(tokens, inputs, where, message.loss_fn, loss))
    return _operation(message.loss_fn, loss, config, data, forward_only=message.forward_only)


def _of_body(asked: bodies.ForwardBackward) -> wire.Forward | wire.ForwardBackward:
    given = asked.forward_backward_input or asked.forward_input
    if given is None:
        raise InvalidFieldError("forward_backward_input: missing", param="forward_backward_input")
    loss = find_loss(given.loss_fn)
    tensors = Tensors()
    data: list[wire.Datum] = []
    for index, datum in enumerate(given.data):
        where = f"data[{index}]"
        tokens = input_of_body(datum.model_input, f"{where}.model_input")
        inputs = {
            key: tensors.of_json(value, f"{where}.loss_fn_inputs.{key}")
            for key, value in datum.loss_fn_inputs.items()
        }
        data.append(_datum(tokens, inputs, where, given.loss_fn, loss))
    forward_only = asked.forward_backward_input is None
    return _operation(
        given.loss_fn, loss, given.loss_fn_config or {}, data, forward_only=forward_only
    )


def _operation(
    name: str,
    loss: TinkerLoss,
    config: Mapping[str, float | str],
    data: list[wire.Datum],
    *,
    forward_only: bool,
) -> wire.Forward | wire.ForwardBackward:
    kind = wire.Forward if forward_only else wire.ForwardBackward
    return kind(data=data, loss_fn=loss.name, loss_config=settings_of(loss, name, config))


# ---- Model input -----------------------------------------------------------------------------------------------------


def _input_of_message(chunks: Iterable[pb.Chunk], field: str) -> npt.NDArray[np.int64]:
    parts: list[npt.NDArray[np.int64]] = []
    for index, chunk in enumerate(chunks):
        kind = chunk.WhichOneof("chunk")
        where = f"{field}.chunks[{index}]"
        _check_text(kind or "", where)
        tokens = chunk.encoded_text.tokens
        if len(tokens) % 4:
            raise InvalidFieldError(
                f"{where}: {len(tokens)} bytes are no whole number of int32", param=where
            )
        parts.append(np.frombuffer(tokens, dtype="<i4").astype(np.int64))
    return _joined(parts, field)


def input_of_body(given: bodies.ModelInput, field: str) -> npt.NDArray[np.int64]:
    """The tokens of a model's input, int64 [N].

    Raises:
        UnsupportedFieldError: it holds something else.
        InvalidFieldError: it is empty, or a token is too large.
    """
    parts: list[npt.NDArray[np.int64]] = []
    for index, chunk in enumerate(given.chunks):
        where = f"{field}.chunks[{index}]"
        _check_text(chunk.type, where)
        try:
            parts.append(np.asarray(chunk.tokens or [], dtype=np.int64))
        except OverflowError:
            raise InvalidFieldError(f"{where}: a token is too large", param=where) from None
    return _joined(parts, field)


def _check_text(kind: str, where: str) -> None:
    if kind == "encoded_text":
        return
    why = _NOT_TEXT.get(kind, "only encoded_text is offered")
    raise UnsupportedFieldError(f"{where}: {kind or 'a chunk without a type'}: {why}", param=where)


def _joined(parts: Sequence[npt.NDArray[np.int64]], field: str) -> npt.NDArray[np.int64]:
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    if not len(tokens):
        raise InvalidFieldError(f"{field}: empty", param=field)
    return tokens


# ---- Data ------------------------------------------------------------------------------------------------------------


def _datum(
    tokens: npt.NDArray[np.int64],
    inputs: Mapping[str, Array],
    where: str,
    name: str,
    loss: TinkerLoss,
) -> wire.Datum:
    """A datum as River's, one token longer than its input."""
    needed = ("target_tokens", *loss.needs)
    for key in needed:
        if key not in inputs:
            place = f"{where}.loss_fn_inputs.{key}"
            raise InvalidFieldError(f"{place}: missing, the loss {name} needs it", param=place)
    fields: dict[str, wire.Tensor] = {}
    for key, values in sorted(inputs.items()):  # A map has no order: so the same is told each time.
        place = f"{where}.loss_fn_inputs.{key}"
        own = "target_tokens" if key == "target_tokens" else loss.field_of(key)
        if own is None:
            known = ", ".join((*needed, *loss.takes))
            raise InvalidFieldError(f"{place}: the loss {name} takes {known}", param=place)
        if len(values) != len(tokens):
            raise InvalidFieldError(
                f"{place}: {len(values)} values for {len(tokens)} tokens of model_input",
                param=place,
            )
        fields[own] = _packed(_lengthened(values))
    return wire.Datum(input_ids=_packed(np.concatenate([tokens, tokens[-1:]])), **fields)


def _lengthened(values: Array) -> Array:
    """[N] or [N, K] with its last row once more, which River ignores."""
    return np.concatenate([values, values[-1:]])


def _packed(values: Array) -> wire.Tensor:
    if values.dtype.kind == "i":
        return wire.Tensor(dtype="int64", shape=values.shape, data=values.astype("<i8").tobytes())
    return wire.Tensor(dtype="float32", shape=values.shape, data=values.astype("<f4").tobytes())
