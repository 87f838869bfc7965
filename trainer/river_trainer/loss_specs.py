"""What each loss asks for: its data, its parameters and their ranges. Imports nothing heavy.

The gateway checks requests by it before they are accepted, the trainer once more before it computes; `losses.py` holds
the functions themselves. A new loss is an entry here and a function there.

A sequence's own `clip_low` and `clip_high` stand before those of the settings, `clip_high` before `eps_max` too.

`ppo` and `gspo` take `clip_low` and `clip_high` as bounds of the ratio itself, 0.8 and 1.2, not as distances from one:
the ranges refuse a `clip_high` of 0.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

TARGETS_PER_TOKEN_MAX = 256
"""K of soft targets [T, K]. Gathering them is cheap beside the logits; what bounds K is the size of a request."""

TEMPERATURE = "logprob_temperature"
"""What the logits are divided by before a loss sees log-probabilities."""

_COEFFICIENT_MAX = 1e3
_RATIO_MAX = 1e6


class LossSpecError(ValueError):
    """What was asked of a loss does not fit it; `param` names the field, with its index where there is one."""

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(f"{param}: {reason}")
        self.param = param


@dataclass(frozen=True, slots=True)
class Parameter:
    """A setting of a loss: its default, and the range [low, high] that it must lie in."""

    default: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LossSpec:
    """What a loss needs to be computed.

    `needs` are the optional fields of a sequence that it cannot do without. `sequences_per_group` consecutive sequences
    belong together and are never computed apart. `mean_over` is the metric that `loss_mean` divides by.
    `soft_targets` says whether it takes K targets at each position, `takes` which fields it may have besides.
    """

    name: str
    needs: tuple[str, ...] = ()
    parameters: Mapping[str, Parameter] = field(default_factory=dict[str, Parameter])
    mean_over: str = "num_tokens"
    sequences_per_group: int = 1
    soft_targets: bool = False
    takes: tuple[str, ...] = ()

    def checked_config(self, config: Mapping[str, float]) -> dict[str, float]:
        """Every parameter's value: the one in `config`, or its default.

        Raises:
            LossSpecError: there is no such parameter, or its value is out of range.
        """
        for key, value in config.items():
            where = f"loss_config.{key}"
            parameter = self.parameters.get(key)
            if parameter is None:
                known = ", ".join(self.parameters) or "no settings"
                raise LossSpecError(where, f"unknown, the loss {self.name} has {known}")
            if not parameter.low <= value <= parameter.high:
                limits = f"must be {parameter.low:.6g} to {parameter.high:.6g}"
                raise LossSpecError(where, f"{value:.6g}, {limits}")
        defaults = {key: parameter.default for key, parameter in self.parameters.items()}
        return defaults | {key: float(value) for key, value in config.items()}

    def check_data(self, data: Sequence[object]) -> None:
        """Refuses sequences, of whatever type, that lack a field or do not make whole groups.

        Raises:
            LossSpecError: they do.
        """
        if len(data) % self.sequences_per_group:
            reason = f"the loss {self.name} takes a multiple of {self.sequences_per_group}"
            raise LossSpecError("data", f"{len(data)} sequences, {reason}")
        for index, sequence in enumerate(data):
            for name in self.needs:
                if getattr(sequence, name) is None:
                    reason = f"missing, the loss {self.name} needs it"
                    raise LossSpecError(f"data[{index}].{name}", reason)
            for name in _OWN_FIELDS:
                if name not in self.takes and getattr(sequence, name) is not None:
                    reason = f"the loss {self.name} does not take it"
                    raise LossSpecError(f"data[{index}].{name}", reason)


_POLICY = ("old_logprobs", "advantages")
_BOUNDS = ("clip_low", "clip_high")
_OWN_FIELDS = (*_BOUNDS, "sequence_mask")
"""Fields that would go unheeded by losses that do not know them."""
_TEMPERED = {TEMPERATURE: Parameter(1.0, 1e-2, 1e2)}
_CUT = {
    "clip_low": Parameter(0.0, 0.0, 1.0),
    "eps_max": Parameter(6.0, 0.0, _RATIO_MAX),
    "unit_ratio": Parameter(0.0, 0.0, 1.0),
}

SPECS: Mapping[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec("cross_entropy", parameters=_TEMPERED, mean_over="weight_sum", soft_targets=True),
        LossSpec("importance_sampling", _POLICY, _TEMPERED),
        LossSpec(
            "ppo",
            _POLICY,
            {
                "clip_low": Parameter(0.8, 0.0, 1.0),
                "clip_high": Parameter(1.2, 1.0, _RATIO_MAX),
                **_TEMPERED,
            },
            takes=_BOUNDS,
        ),
        LossSpec("cispo", _POLICY, {**_CUT, **_TEMPERED}, takes=_BOUNDS),
        LossSpec(
            "echo_cispo",
            (*_POLICY, "echo_weights"),
            {**_CUT, "echo_coef": Parameter(0.05, 0.0, _COEFFICIENT_MAX)},
            takes=_BOUNDS,
        ),
        LossSpec("dro", _POLICY, {"beta": Parameter(0.05, 0.0, _COEFFICIENT_MAX), **_TEMPERED}),
        LossSpec(
            "gspo",
            _POLICY,
            {
                # A mean over a sequence moves far less than one token's ratio.
                "clip_low": Parameter(1 - 3e-4, 0.0, 1.0),
                "clip_high": Parameter(1 + 4e-4, 1.0, _RATIO_MAX),
                **_TEMPERED,
            },
            takes=_OWN_FIELDS,
        ),
        LossSpec(
            "dpo",
            ("old_logprobs",),
            {"beta": Parameter(0.1, 0.0, _COEFFICIENT_MAX)},
            mean_over="num_pairs",
            sequences_per_group=2,
        ),
    )
}


def find_spec(name: str) -> LossSpec:
    """The loss called `name`.

    Raises:
        LossSpecError: there is none.
    """
    spec = SPECS.get(name)
    if spec is None:
        raise LossSpecError("loss_fn", f"{name!r} is not offered, there are {', '.join(SPECS)}")
    return spec
