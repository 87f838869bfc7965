"""The losses as plain formulas in float64, token by token, for autograd to differentiate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from river_trainer.loss_specs import TEMPERATURE
from river_trainer.losses import LossInput

CONFIGS: dict[str, dict[str, float]] = {
    "ppo": {"clip_low": 0.7, "clip_high": 1.3},
    "cispo": {"eps_max": 1.5, "clip_low": 0.7},
    "echo_cispo": {"eps_max": 1.5, "echo_coef": 0.3},
    "dro": {"beta": 0.2},
    "gspo": {"clip_low": 0.9, "clip_high": 1.1},
    "dpo": {"beta": 0.4},
}
"""Settings with which data as in the tests meet every bound."""

Tokens = list[dict[str, torch.Tensor]]
Formula = Callable[[list[Tokens], Mapping[str, float]], torch.Tensor]


def in_sequences(data: LossInput, logprobs: torch.Tensor) -> list[Tokens]:
    """The positions of each sequence as dicts of float64 scalars."""
    fields = {
        "lp": logprobs,
        "q": data.old_logprobs.double(),
        "w": data.weights.double(),
        "A": data.advantages.double(),
        "e": data.echo_weights.double(),
    }
    own = {"low": data.clip_low, "high": data.clip_high, "mask": data.sequence_mask}
    fields |= {name: values.double() for name, values in own.items() if values is not None}
    sequences: list[Tokens] = []
    start = 0
    for length in data.lengths:
        rows = range(start, start + length)
        sequences.append([{name: values[row] for name, values in fields.items()} for row in rows])
        start += length
    return sequences


def by_token(term: Callable[..., torch.Tensor]) -> Formula:
    """A formula that is a sum of `term` over tokens; a temperature is in their log-probabilities already."""

    def total(sequences: list[Tokens], config: Mapping[str, float]) -> torch.Tensor:
        settings = {name: value for name, value in config.items() if name != TEMPERATURE}
        return torch.stack(
            [term(token, **settings) for tokens in sequences for token in tokens]
        ).sum()

    return total


def ppo_term(ratio: torch.Tensor, t: dict[str, torch.Tensor], low: float, high: float) -> Any:
    """With a token's own bounds where it has any."""
    bound = ratio.clamp(float(t.get("low", low)), float(t.get("high", high)))
    return -t["w"] * torch.minimum(ratio * t["A"], bound * t["A"])


def cispo_term(
    t: dict[str, torch.Tensor], eps_max: float, clip_low: float, unit_ratio: float
) -> torch.Tensor:
    ratio = 0 * t["lp"] + 1 if unit_ratio else (t["lp"] - t["q"]).exp()
    ratio = ratio.clamp(float(t.get("low", clip_low)), float(t.get("high", eps_max))).detach()
    return -t["w"] * ratio * t["A"] * t["lp"]


def dro_term(t: dict[str, torch.Tensor], beta: float) -> torch.Tensor:
    if t["A"] == 0:
        return 0 * t["lp"]
    return -t["w"] * (t["A"] * t["lp"] - beta / 2 * (t["lp"] - t["q"]) ** 2)


def gspo_formula(sequences: list[Tokens], config: Mapping[str, float]) -> torch.Tensor:
    terms: list[torch.Tensor] = []
    for tokens in sequences:
        counting = [t for t in tokens if t["w"] * t["A"] != 0]
        over = [t for t in tokens if t["mask"] != 0] if "mask" in tokens[0] else counting
        mean = torch.stack([t["lp"] - t["q"] for t in over]).mean().detach()
        for t in counting:
            ratio = mean.exp() * (t["lp"] - t["lp"].detach()).exp()
            terms.append(ppo_term(ratio, t, config["clip_low"], config["clip_high"]))
    return torch.stack(terms).sum()


def dpo_formula(sequences: list[Tokens], config: Mapping[str, float]) -> torch.Tensor:
    rewards = [
        config["beta"] * torch.stack([t["w"] * (t["lp"] - t["q"]) for t in tokens]).sum()
        for tokens in sequences
    ]
    return torch.stack(
        [
            -torch.log(torch.sigmoid(chosen - rejected))
            for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True)
        ]
    ).sum()


FORMULAS: dict[str, Formula] = {
    "cross_entropy": by_token(lambda t: -t["w"] * t["lp"]),
    "importance_sampling": by_token(lambda t: -t["w"] * (t["lp"] - t["q"]).exp() * t["A"]),
    "ppo": by_token(
        lambda t, clip_low, clip_high: ppo_term((t["lp"] - t["q"]).exp(), t, clip_low, clip_high)
    ),
    "cispo": by_token(cispo_term),
    "echo_cispo": by_token(
        lambda t, echo_coef, **cut: cispo_term(t, **cut) - echo_coef * t["e"] * t["lp"]
    ),
    "dro": by_token(dro_term),
    "gspo": gspo_formula,
    "dpo": dpo_formula,
}
