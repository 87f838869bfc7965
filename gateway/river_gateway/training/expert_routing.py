"""The experts that a sampler chose, coming back with training data: checked, and in the trainer's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from river_engine.protocol import routing_dtype
from river_gateway.errors import InvalidFieldError
from river_gateway.training.arrays import unpacked

if TYPE_CHECKING:
    import numpy.typing as npt

    from river_client import wire


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """Of a base model: experts of a MoE layer, MoE layers, and the experts that a token goes to in each."""

    experts: int
    layers: int
    per_token: int


def routing_bytes(
    datum: wire.Datum, where: str, length: int, kept: int, model: RoutedExperts | None
) -> bytes | None:
    """`expert_routing` of a sequence of `length` tokens, cut to the first `kept`, the ignored last row zeroed.

    Raises:
        InvalidFieldError: the model has no such experts, the shape is not its, or a token has one expert twice.
    """
    tensor, field = datum.expert_routing, f"{where}.expert_routing"
    if tensor is None:
        return None
    if model is None:
        raise InvalidFieldError(
            f"{field}: the base model has no routed experts to replay", param=field
        )
    given = unpacked(tensor, field)
    if given.dtype.kind not in "iu":
        raise InvalidFieldError(f"{field}: {tensor.dtype}, must be integers", param=field)
    wanted = (length, model.layers, model.per_token)
    if given.shape[1:] != wanted[1:] or given.shape[0] not in (length - 1, length):
        raise InvalidFieldError(
            f"{field}: shape {list(given.shape)}, must be [{length} or {length - 1} tokens, {model.layers} MoE layers, "
            f"{model.per_token} experts]",
            param=field,
        )
    rows = np.zeros((kept, *wanted[1:]), dtype=given.dtype)
    rows[:-1] = given[: kept - 1]
    _check_experts(rows, field, model)
    return rows.astype(np.dtype(routing_dtype(model.experts)).newbyteorder("<")).tobytes()


def check_replayable(data: list[wire.Datum]) -> None:
    """Every sequence has its routing.

    Raises:
        InvalidFieldError: one has not.
    """
    for index, datum in enumerate(data):
        if datum.expert_routing is None:
            field = f"data[{index}].expert_routing"
            raise InvalidFieldError(f"{field}: missing, force_routing_replay needs it", param=field)


def _check_experts(rows: npt.NDArray[np.integer], field: str, model: RoutedExperts) -> None:
    outside = (rows < 0) | (rows >= model.experts)
    if outside.any():
        place = np.unravel_index(int(np.argmax(outside)), rows.shape)
        where = field + "".join(f"[{index}]" for index in place)
        raise InvalidFieldError(
            f"{where}: {rows[place]}, the experts are 0 to {model.experts - 1}", param=where
        )
    ordered = np.sort(rows[:-1], axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    if twice.any():
        position, layer = np.unravel_index(int(np.argmax(twice)), twice.shape)
        where = f"{field}[{position}][{layer}]"
        raise InvalidFieldError(
            f"{where}: {rows[position, layer].tolist()} names an expert twice", param=where
        )
