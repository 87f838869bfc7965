"""Everything a training request must satisfy before it is accepted.

Pure functions from wire structs to the trainer's, raising `InvalidFieldError` with the field, the index and the limit.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from river_gateway.errors import InvalidFieldError
from river_gateway.limits import (
    ALPHA_MAX,
    CHECKPOINT_TTL_MAX_S,
    GRADIENT_SCALE_MAX,
    LEARNING_RATE_MAX,
    METRIC_NAME_MAX_CHARS,
    METRICS_MAX,
    NAME_MAX_CHARS,
    SEED_MAX,
    SEQUENCE_TOKENS_MIN,
    SEQUENCES_MAX,
    TAG_MAX_CHARS,
    TAGS_MAX,
)
from river_gateway.training.arrays import finite_floats, integers, token_ids
from river_gateway.training.expert_routing import RoutedExperts, routing_bytes
from river_trainer import protocol
from river_trainer.loss_specs import TARGETS_PER_TOKEN_MAX, LossSpec, LossSpecError, find_spec

if TYPE_CHECKING:
    import numpy.typing as npt

    from river_client import wire

_DEFAULT_ALPHA = 32.0
_STEP = re.compile(r"0|[1-9][0-9]{0,15}", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")


@dataclass(frozen=True, slots=True)
class Limits:
    """What of a base model bounds a request; lengths in tokens."""

    context_length: int
    vocab_size: int
    routed_experts: RoutedExperts | None = None


# ---- Training data ---------------------------------------------------------------------------------------------------


def sequences(data: list[wire.Datum], loss_fn: str, limits: Limits) -> list[protocol.Sequence]:
    """The data of a forward or forward_backward, checked whole and cut to their attention masks.

    Raises:
        InvalidFieldError: see the module.
    """
    if not data:
        raise InvalidFieldError("data: empty, must hold at least one sequence", param="data")
    if len(data) > SEQUENCES_MAX:
        raise InvalidFieldError(
            f"data: {len(data)} sequences, at most {SEQUENCES_MAX}", param="data"
        )
    try:
        spec = find_spec(loss_fn)
        spec.check_data(data)
    except LossSpecError as error:
        raise InvalidFieldError(str(error), param=error.param) from None
    return [_sequence(datum, f"data[{index}]", spec, limits) for index, datum in enumerate(data)]


def _sequence(datum: wire.Datum, where: str, spec: LossSpec, limits: Limits) -> protocol.Sequence:
    ids = token_ids(datum.input_ids, f"{where}.input_ids", limits.vocab_size)
    if ids.ndim != 1:
        place = f"{where}.input_ids"
        raise InvalidFieldError(f"{place}: shape {list(ids.shape)}, must be [T]", param=place)
    length = len(ids)
    kept = _kept_length(datum, where, length)
    if kept < SEQUENCE_TOKENS_MIN:
        place = f"{where}.input_ids"
        raise InvalidFieldError(
            f"{place}: {kept} tokens, must be at least {SEQUENCE_TOKENS_MIN}", param=place
        )
    if kept > limits.context_length:
        place = f"{where}.input_ids"
        raise InvalidFieldError(
            f"{place}: {kept} tokens, the context length is {limits.context_length}", param=place
        )
    targets = _targets(datum, where, length, kept, spec, limits)
    soft_shape = targets.shape if targets is not None and targets.ndim > 1 else None
    if soft_shape is not None and datum.weights is None:
        place = f"{where}.weights"
        raise InvalidFieldError(f"{place}: missing, soft targets [T, K] need them", param=place)

    def floats(name: str, shape: tuple[int, ...] = (length,)) -> bytes | None:
        value: wire.Numbers | None = getattr(datum, name)
        return _cut(_checked_floats(value, f"{where}.{name}", shape), kept)

    def bounds(name: str) -> bytes | None:
        """Of a ratio, which is never negative."""
        field = f"{where}.{name}"
        array = _checked_floats(getattr(datum, name), field, (length,))
        if array is not None and (array < 0).any():
            place = f"{field}[{int(np.argmax(array < 0))}]"
            raise InvalidFieldError(f"{place}: must not be negative", param=place)
        return _cut(array, kept)

    return protocol.Sequence(
        input_ids=ids[:kept].tobytes(),
        target_tokens=_cut(targets, kept),
        weights=floats("weights", soft_shape or (length,)),
        old_logprobs=floats("old_logprobs"),
        advantages=floats("advantages"),
        echo_weights=floats("echo_weights"),
        clip_low=bounds("clip_low"),
        clip_high=bounds("clip_high"),
        sequence_mask=_mask(datum.sequence_mask, f"{where}.sequence_mask", length, kept),
        expert_routing=routing_bytes(datum, where, length, kept, limits.routed_experts),
        targets_per_token=1 if soft_shape is None else soft_shape[1],
    )


def _kept_length(datum: wire.Datum, where: str, length: int) -> int:
    """The number of tokens that the attention mask keeps: its zeros may only form a tail."""
    if datum.attention_mask is None:
        return length
    field = f"{where}.attention_mask"
    mask = _zeros_and_ones(datum.attention_mask, field, length)
    kept = int(mask.sum())
    if not mask[:kept].all():
        place = f"{field}[{int(np.argmin(mask))}]"
        raise InvalidFieldError(f"{place}: 0 before a 1, zeros may only form a tail", param=place)
    return kept


def _zeros_and_ones(value: wire.Numbers, field: str, length: int) -> npt.NDArray[np.int64]:
    mask = integers(value, field)
    _check_shape(mask, (length,), field)
    odd = np.flatnonzero((mask != 0) & (mask != 1))
    if odd.size:
        place = f"{field}[{odd[0]}]"
        raise InvalidFieldError(f"{place}: {mask[odd[0]]}, must be 0 or 1", param=place)
    return mask


def _mask(value: wire.Numbers | None, field: str, length: int, kept: int) -> bytes | None:
    """Zeros and ones of the kept positions, the ignored last one zero."""
    if value is None:
        return None
    mask = _zeros_and_ones(value, field, length)[:kept].astype("<f4")
    mask[-1] = 0.0
    return mask.tobytes()


def _targets(
    datum: wire.Datum, where: str, length: int, kept: int, spec: LossSpec, limits: Limits
) -> npt.NDArray[np.int32] | None:
    """`target_tokens`, [T] or [T, K], whose value at the ignored last index may be any filler."""
    if datum.target_tokens is None:
        return None
    field = f"{where}.target_tokens"
    targets = token_ids(datum.target_tokens, field, limits.vocab_size, ignored_from=kept - 1)
    if targets.ndim == 1:
        _check_shape(targets, (length,), field)
        return targets
    per_token = targets.shape[1]
    if not spec.soft_targets:
        message = f"shape {list(targets.shape)}, the loss {spec.name} takes one target a token, [T]"
        raise InvalidFieldError(f"{field}: {message}", param=field)
    if not 1 <= per_token <= TARGETS_PER_TOKEN_MAX:
        message = f"{per_token} targets a token, must be 1 to {TARGETS_PER_TOKEN_MAX}"
        raise InvalidFieldError(f"{field}: {message}", param=field)
    _check_shape(targets, (length, per_token), field)
    return targets


def _checked_floats(
    value: wire.Numbers | None, field: str, shape: tuple[int, ...]
) -> npt.NDArray[np.float32] | None:
    if value is None:
        return None
    array = finite_floats(value, field)
    _check_shape(array, shape, field)
    return array


def _check_shape(array: npt.NDArray[np.generic], wanted: tuple[int, ...], field: str) -> None:
    if array.shape == wanted:
        return
    if array.ndim == len(wanted) == 1:
        message = f"{field}: {array.shape[0]} values for {wanted[0]} input_ids"
    else:
        message = f"{field}: shape {list(array.shape)}, must be {list(wanted)}"
    raise InvalidFieldError(message, param=field)


def _cut(array: npt.NDArray[np.generic] | None, length: int) -> bytes | None:
    return None if array is None else array[:length].tobytes()


# ---- Settings of operations ------------------------------------------------------------------------------------------


def loss_config(loss_fn: str, config: dict[str, float]) -> dict[str, float]:
    """All settings of a loss: what is given, checked, and the defaults of the rest.

    Raises:
        InvalidFieldError: the loss is not offered, or the settings are not its own or out of range.
    """
    try:
        return find_spec(loss_fn).checked_config(config)
    except LossSpecError as error:
        raise InvalidFieldError(str(error), param=error.param) from None


def adam(params: wire.AdamParams) -> protocol.Adam:
    """The optimizer's settings, finite and in range.

    Raises:
        InvalidFieldError: see the module.
    """
    below_one = math.nextafter(1.0, 0.0)
    in_range(params.lr, "adam.lr", 0.0, LEARNING_RATE_MAX)
    in_range(params.beta1, "adam.beta1", 0.0, below_one)
    in_range(params.beta2, "adam.beta2", 0.0, below_one)
    in_range(params.eps, "adam.eps", math.ulp(0.0), 1.0)
    in_range(params.weight_decay, "adam.weight_decay", 0.0, 1e3)
    in_range(params.gradient_scale, "adam.gradient_scale", math.ulp(0.0), GRADIENT_SCALE_MAX)
    if params.grad_clip_norm is not None:
        in_range(params.grad_clip_norm, "adam.grad_clip_norm", 0.0, math.inf)
        if math.isinf(params.grad_clip_norm):
            raise InvalidFieldError(
                "adam.grad_clip_norm: inf, leave it out", param="adam.grad_clip_norm"
            )
    return protocol.Adam(
        lr=params.lr,
        beta1=params.beta1,
        beta2=params.beta2,
        eps=params.eps,
        weight_decay=params.weight_decay,
        grad_clip_norm=params.grad_clip_norm or None,
        gradient_scale=params.gradient_scale,
    )


def expected_policy(version: str | None, run_id: str) -> str | None:
    """The policy version that an operation of a run is meant for, if it says so.

    Raises:
        InvalidFieldError: it is none of that run.
    """
    if version is not None:
        run, _, step = version.rpartition("@")
        if run != run_id or not _STEP.fullmatch(step):
            raise InvalidFieldError(
                f"expected_policy: {version[:NAME_MAX_CHARS]!r}, must be {run_id}@<step>",
                param="expected_policy",
            )
    return version


def adapter_shape(
    lora: wire.LoraConfig, rank_max: int, *, default_seed: int
) -> protocol.AdapterShape:
    """The shape of a new adapter.

    Raises:
        InvalidFieldError: see the module.
    """
    in_range(lora.rank, "lora.rank", 1, rank_max)
    alpha = _DEFAULT_ALPHA if lora.alpha is None else lora.alpha
    in_range(alpha, "lora.alpha", math.ulp(0.0), ALPHA_MAX)
    if lora.seed is not None:
        in_range(lora.seed, "lora.seed", 0, SEED_MAX)
    if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
        raise InvalidFieldError(
            "lora: at least one of train_attn, train_mlp, train_unembed", param="lora"
        )
    return protocol.AdapterShape(
        rank=lora.rank,
        alpha=alpha,
        seed=default_seed if lora.seed is None else lora.seed,
        train_attn=lora.train_attn,
        train_mlp=lora.train_mlp,
        train_unembed=lora.train_unembed,
        expert_layout=lora.expert_layout,
    )


def name(value: str, field: str) -> str:
    """A name that can stand in a path: letters, digits and `._:-`.

    Raises:
        InvalidFieldError: it cannot.
    """
    if not _NAME.fullmatch(value) or len(value) > NAME_MAX_CHARS:
        raise InvalidFieldError(
            f"{field}: {value[:NAME_MAX_CHARS]!r} must be 1 to {NAME_MAX_CHARS} letters, digits and ._:- "
            "beginning with a letter or digit",
            param=field,
        )
    return value


def ttl_s(value: int | None) -> int | None:
    """How long a checkpoint is to live, in seconds; None is for ever.

    Raises:
        InvalidFieldError: it is out of range.
    """
    if value is not None:
        in_range(value, "ttl_s", 1, CHECKPOINT_TTL_MAX_S)
    return value


def metrics(values: dict[str, float]) -> dict[str, float]:
    """A user's own metrics: not too many, with names of bounded length and finite values.

    Raises:
        InvalidFieldError: see the module.
    """
    if not 1 <= len(values) <= METRICS_MAX:
        raise InvalidFieldError(
            f"metrics: {len(values)}, must be 1 to {METRICS_MAX}", param="metrics"
        )
    for key, value in values.items():
        field = f"metrics.{key[:METRIC_NAME_MAX_CHARS]}"
        if not 1 <= len(key) <= METRIC_NAME_MAX_CHARS:
            raise InvalidFieldError(
                f"{field}: a name has 1 to {METRIC_NAME_MAX_CHARS} characters", param=field
            )
        if not math.isfinite(value):
            raise InvalidFieldError(f"{field}: {value}, must be finite", param=field)
    return values


def tags(values: dict[str, str], field_name: str = "tags") -> dict[str, str]:
    """A session's tags, or what else users write on their things: not too many and not too long.

    Raises:
        InvalidFieldError: see the module.
    """
    if len(values) > TAGS_MAX:
        raise InvalidFieldError(
            f"{field_name}: {len(values)}, at most {TAGS_MAX}", param=field_name
        )
    for key, value in values.items():
        field = f"{field_name}.{key[:TAG_MAX_CHARS]}"
        if len(key) > TAG_MAX_CHARS or len(value) > TAG_MAX_CHARS:
            raise InvalidFieldError(f"{field}: at most {TAG_MAX_CHARS} characters", param=field)
    return values


def in_range(value: float, field: str, low: float, high: float) -> None:
    """Refuses a number outside [low, high], NaN included.

    Raises:
        InvalidFieldError: with the field and the limits.
    """
    if not low <= value <= high:
        limits = f"must be {low:.6g} to {high:.6g}"
        raise InvalidFieldError(f"{field}: {value}, {limits}", param=field)
