"""The losses of the Tinker protocol: which of River's each one is, and what its data and settings are called there.

All are sums over tokens, as River's. Their bounds of a ratio are bounds of the ratio itself there too; where a default
differs from River's, it is the protocol's that counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from river_gateway.errors import InvalidFieldError, UnsupportedFieldError

if TYPE_CHECKING:
    from river_client.wire import LossName


@dataclass(frozen=True, slots=True)
class TinkerLoss:
    """One loss.

    `needs` and `takes` are the inputs of a datum besides `target_tokens`, by the name of River's field that they are.
    `settings` has for each of its settings River's name and the protocol's default.
    """

    name: LossName
    needs: Mapping[str, str] = field(default_factory=dict[str, str])
    takes: Mapping[str, str] = field(default_factory=dict[str, str])
    settings: Mapping[str, tuple[str, float]] = field(default_factory=dict[str, tuple[str, float]])

    def field_of(self, key: str) -> str | None:
        """River's field for an input; None when the loss has no such input."""
        return self.needs.get(key) or self.takes.get(key)


_WEIGHTS = {"weights": "weights"}
_POLICY = {"logprobs": "old_logprobs", "advantages": "advantages"}
_CLIPPED = _WEIGHTS | {"clip_low_threshold": "clip_low", "clip_high_threshold": "clip_high"}
_BOUNDS = {"clip_low_threshold": ("clip_low", 0.8), "clip_high_threshold": ("clip_high", 1.2)}

LOSSES: Mapping[str, TinkerLoss] = {
    "cross_entropy": TinkerLoss("cross_entropy", takes=_WEIGHTS),
    "importance_sampling": TinkerLoss("importance_sampling", _POLICY, _WEIGHTS),
    "ppo": TinkerLoss("ppo", _POLICY, _CLIPPED, _BOUNDS),
    "cispo": TinkerLoss(
        "cispo",
        _POLICY,
        _CLIPPED,
        {"clip_low_threshold": ("clip_low", 0.0), "clip_high_threshold": ("eps_max", 4.0)},
    ),
    "dro": TinkerLoss("dro", _POLICY, _WEIGHTS, {"beta": ("beta", 0.05)}),
    "gspo": TinkerLoss(
        "gspo", _POLICY, _CLIPPED | {"sequence_ratio_mask": "sequence_mask"}, _BOUNDS
    ),
}
_NOT_BUILT = {
    "stable_reinforce": "its formula is not published; importance_sampling, ppo, cispo and gspo are there",
    "custom": "losses are not uploaded to this server; the client computes them itself in forward_backward_custom",
}


def find_loss(name: str) -> TinkerLoss:
    """The loss called `name`.

    Raises:
        UnsupportedFieldError: it is one of the protocol's that is not offered.
        InvalidFieldError: there is none.
    """
    loss = LOSSES.get(name)
    if loss is not None:
        return loss
    why = _NOT_BUILT.get(name)
    if why is not None:
        raise UnsupportedFieldError(
            f"loss_fn: {name!r} is not offered here: {why}", param="loss_fn"
        )
    raise InvalidFieldError(
        f"loss_fn: {name!r} is no loss; there are {', '.join(LOSSES)}", param="loss_fn"
    )


def settings_of(loss: TinkerLoss, name: str, config: Mapping[str, float | str]) -> dict[str, float]:
    """River's settings of a loss, from the protocol's.

    Raises:
        InvalidFieldError: a setting is none of this loss, or no number.
    """
    settings = dict(loss.settings.values())
    for key, value in config.items():
        where = f"loss_fn_config.{key}"
        if key not in loss.settings:
            known = ", ".join(loss.settings) or "no settings"
            raise InvalidFieldError(f"{where}: unknown, the loss {name} has {known}", param=where)
        if isinstance(value, str) or not math.isfinite(value):
            raise InvalidFieldError(f"{where}: {value!r}, must be a finite number", param=where)
        settings[loss.settings[key][0]] = value
    return settings
