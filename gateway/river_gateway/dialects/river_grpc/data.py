"""Training data of the River dialect: NEST datums in, the trainer's numbers out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from river_client import wire
from river_gateway.dialects.river_grpc import nest
from river_gateway.dialects.river_grpc.limits import ROUTING_MAX_BYTES
from river_gateway.dialects.river_grpc.refused import NO_IMAGES
from river_gateway.dialects.river_grpc.routing_handle import read_handle
from river_gateway.errors import InvalidFieldError, NotSupportedError
from river_trainer.loss_specs import TEMPERATURE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from river_gateway.dialects.river_grpc import river_pb2 as pb
    from river_gateway.dialects.river_grpc.nest import Array

_PER_TOKEN = (
    "input_ids",
    "target_tokens",
    "weights",
    "old_logprobs",
    "advantages",
    "attention_mask",
    "echo_weights",
)
_HANDLE = "expert_routing_handle"
_CHUNKS = "model_input"
_WIRE_DTYPES = {
    np.dtype("<i4"): "int32",
    np.dtype("<i8"): "int64",
    np.dtype("<f4"): "float32",
    np.dtype("u1"): "uint8",
    np.dtype("<u2"): "uint16",
}

# ---- In --------------------------------------------------------------------------------------------------------------


def read_data(datums: Sequence[pb.Datum]) -> list[wire.Datum]:
    """The sequences of a request.

    Raises:
        InvalidFieldError: a datum is no NEST, or has a field that is unknown or no array.
        NotSupportedError: a datum has images.
    """
    data: list[wire.Datum] = []
    routing_left_bytes = ROUTING_MAX_BYTES
    for index, datum in enumerate(datums):
        read = _datum(datum, f"data[{index}]", routing_left_bytes)
        if read.expert_routing is not None:
            routing_left_bytes -= len(read.expert_routing.data)
        data.append(read)
    return data


def _datum(datum: pb.Datum, where: str, routing_left_bytes: int) -> wire.Datum:
    if datum.resolved_image_handles:
        raise NotSupportedError(f"{where}: {NO_IMAGES}", param=where)
    try:
        fields = nest.decode(datum.data)
    except nest.NestError as error:
        raise InvalidFieldError(f"{where}: {error}", param=where) from None
    if not isinstance(fields, dict):
        raise InvalidFieldError(f"{where}: must be a dictionary of arrays", param=where)
    fields = dict(fields)
    if _CHUNKS in fields:
        if "input_ids" in fields:
            raise InvalidFieldError(f"{where}: input_ids and {_CHUNKS}, give one", param=where)
        fields["input_ids"] = _joined(fields.pop(_CHUNKS), f"{where}.{_CHUNKS}")
    if "input_ids" not in fields:
        raise InvalidFieldError(f"{where}.input_ids: missing", param=f"{where}.input_ids")
    handle = fields.pop(_HANDLE, None)
    for name in fields:
        if name not in _PER_TOKEN:
            known = ", ".join((*_PER_TOKEN, _HANDLE))
            raise InvalidFieldError(
                f"{where}.{name}: unknown, a datum has {known}", param=f"{where}.{name}"
            )
    tensors: dict[str, Any] = {
        name: _tensor(_array(value, f"{where}.{name}")) for name, value in fields.items()
    }
    routing = None
    if handle is not None:
        place = f"{where}.{_HANDLE}"
        routing = read_handle(
            _array(handle, place).tobytes(),
            place,
            tokens=_array(fields["input_ids"], f"{where}.input_ids").size,
            size_max_bytes=routing_left_bytes,
        )
    return wire.Datum(**tensors, expert_routing=routing)


def _joined(chunks: nest.Value, where: str) -> Array:
    """The tokens of chunks of text.

    Raises:
        NotSupportedError: one is an image.
    """
    if not isinstance(chunks, list) or not chunks:
        raise InvalidFieldError(f"{where}: must be a list of chunks", param=where)
    pieces: list[Array] = []
    for index, chunk in enumerate(chunks):
        place = f"{where}[{index}]"
        kind = chunk.get("type") if isinstance(chunk, dict) else None
        if kind == "image":
            raise NotSupportedError(f"{place}: {NO_IMAGES}", param=place)
        if kind != "text" or not isinstance(chunk, dict) or "tokens" not in chunk:
            raise InvalidFieldError(
                f"{place}: must be a chunk of text with its tokens", param=place
            )
        pieces.append(_array(chunk["tokens"], f"{place}.tokens").reshape(-1))
    return np.concatenate(pieces)


def _array(value: nest.Value, where: str) -> Array:
    if not isinstance(value, np.ndarray):
        raise InvalidFieldError(f"{where}: must be an array", param=where)
    return value


def _tensor(array: Array) -> wire.Tensor:
    """An array in one of the types that the wire has, which hold all that is in it or what it will be rounded to."""
    dtype = array.dtype
    if dtype not in _WIRE_DTYPES:
        with np.errstate(over="ignore"):  # what becomes infinite is refused with its place
            array = array.astype("<f4" if dtype.kind == "f" else "<i8")
    name = cast("Any", _WIRE_DTYPES[array.dtype])
    return wire.Tensor(dtype=name, shape=array.shape, data=array.tobytes())


# ---- Losses ----------------------------------------------------------------------------------------------------------

_SETTINGS = {"use_perfect_ratio": "unit_ratio"}


def read_loss_config(loss_fn: str, given: Mapping[str, float]) -> dict[str, float]:
    """The settings of a loss by River's names and as River counts them.

    The client gives `ppo` distances from one where River has bounds of the ratio. It names the temperature of its
    samples for every loss, also for those that know none; 1 changes nothing.

    Raises:
        InvalidFieldError: a distance is out of range.
    """
    config = {_SETTINGS.get(name, name): value for name, value in given.items()}
    if config.get(TEMPERATURE) == 1.0:
        del config[TEMPERATURE]
    if loss_fn == "ppo":
        for name, sign in (("clip_low", -1), ("clip_high", 1)):
            distance = config.get(name, 0.2)
            if not 0 <= distance <= (1 if sign < 0 else 1e6):
                field = f"loss_fn_config.{name}"
                raise InvalidFieldError(
                    f"{field}: {distance:g}, must be a distance from the ratio 1, like 0.2",
                    param=field,
                )
            config[name] = 1 + sign * distance
    return config


# ---- Out -------------------------------------------------------------------------------------------------------------


def logprobs_body(tensors: Sequence[wire.Tensor]) -> bytes:
    """The log-probabilities of each datum, [T] or with soft targets [T, K], as one NEST body."""
    return nest.encode(
        [np.frombuffer(tensor.data, dtype="<f4").reshape(tensor.shape) for tensor in tensors]
    )


def client_metrics(metrics: Mapping[str, float], datums: int) -> dict[str, float]:
    """Metrics by the names that the client knows, with the sums by which it joins those of several requests.

    Its `loss` is the mean over the datums.
    """
    told = dict(metrics)
    tokens = told.get("num_tokens", 0.0)
    if "loss_sum" in told and datums:
        told["loss"] = told["loss_sum"] / datums
    if "mean_ratio" in told:
        told["num_response"] = tokens
        for mean, total in _SUMS.items():
            if mean in told:
                told[total] = told[mean] * tokens
    if told.get("echo_weight_sum"):
        told["echo_loss"] = told["echo_loss_sum"] / told["echo_weight_sum"]
    return {_METRICS.get(name, name): value for name, value in told.items()}


_METRICS = {
    "echo_num_tokens": "num_echo_tokens",
    "echo_policy_overlap": "echo_policy_overlap_count",
    "expert_slot_flip": "expert_flip/per_token_expert_rate",
}
_SUMS = {
    "mean_ratio": "ratio_sum",
    "kl": "log_ratio_sum",
    "entropy": "entropy_sum",
    "clip_frac": "clip_count",
    "truncation_frac": "trunc_count",
}
