"""The losses, all summed over tokens, as functions of the log-probabilities of one job's positions.

A loss returns its sum, to be differentiated, and the sums that its metrics are made of, so that a job may be computed
in pieces. Positions that count: for cross_entropy those with a weight, for importance_sampling those whose weighted
advantage is not zero (a prompt's `old_logprobs` are filler and would only blur the ratios).

* `cross_entropy`: -sum w lp
* `importance_sampling`: -sum w r A, r = exp(lp - old); `kl` is the k3 estimate of KL(old || new), mean(r - 1 - log r),
  which is never negative; `kl_k1` is the plain one, mean(old - lp).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from river_trainer.errors import InvalidTaskError
from river_trainer.packing import TrainingSequence


@dataclass(frozen=True, slots=True)
class LossInput:
    """Aligned tensors [N]; `logprobs` carries gradients, `weights` are zero where nothing counts."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor


Sums = dict[str, torch.Tensor]
LossFunction = Callable[[LossInput], tuple[torch.Tensor, Sums]]


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss, the optional fields of a sequence that it cannot do without, and the sum that `loss_mean` divides by."""

    name: str
    function: LossFunction
    needs: tuple[str, ...]
    mean_over: str


def cross_entropy(data: LossInput) -> tuple[torch.Tensor, Sums]:
    loss = -(data.weights * data.logprobs).sum()
    counted = data.weights != 0
    return loss, {
        "loss_sum": loss.detach(),
        "num_tokens": counted.sum(),
        "weight_sum": data.weights.sum(),
        "entropy": data.entropy[counted].sum(),
    }


def importance_sampling(data: LossInput) -> tuple[torch.Tensor, Sums]:
    gain = data.weights * data.advantages
    counted = gain != 0
    # Only where it counts: a filler's ratio may overflow, and infinity times zero is not a number.
    log_ratio = data.logprobs[counted] - data.old_logprobs[counted]
    ratio = log_ratio.exp()
    loss = -(ratio * gain[counted]).sum()
    ratio, log_ratio = ratio.detach(), log_ratio.detach()
    return loss, {
        "loss_sum": loss.detach(),
        "num_tokens": counted.sum(),
        "mean_ratio": ratio.sum(),
        "kl": (ratio - 1 - log_ratio).sum(),
        "kl_k1": -log_ratio.sum(),
        "entropy": data.entropy[counted].sum(),
    }


LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss("cross_entropy", cross_entropy, (), "weight_sum"),
    "importance_sampling": Loss(
        "importance_sampling", importance_sampling, ("old_logprobs", "advantages"), "num_tokens"
    ),
}

TOTALS = frozenset({"loss_sum", "num_tokens", "weight_sum"})
"""Reported as they are; every other sum is reported as a mean over `num_tokens`."""


def find_loss(name: str, config: Mapping[str, float]) -> Loss:
    """The loss called `name`.

    Raises:
        InvalidTaskError: there is none, or it has no such parameter.
    """
    loss = LOSSES.get(name)
    if loss is None:
        known = ", ".join(sorted(LOSSES))
        raise InvalidTaskError(f"no loss {name!r}; there are {known}", param="loss_fn")
    for parameter in config:
        raise InvalidTaskError(
            f"{name} has no parameter {parameter!r}", param=f"loss_config.{parameter}"
        )
    return loss


def check_fields(loss: Loss, sequence: TrainingSequence, index: int) -> None:
    """Refuses a sequence that lacks what the loss needs.

    Raises:
        InvalidTaskError: it does.
    """
    for field in loss.needs:
        if getattr(sequence, field) is None:
            raise InvalidTaskError("the loss needs it", param=f"data[{index}].{field}")


def metrics_of(loss: Loss, sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a whole job from its sums."""
    tokens = sums["num_tokens"]
    metrics = {
        name: value if name in TOTALS else (value / tokens if tokens else 0.0)
        for name, value in sums.items()
    }
    denominator = sums[loss.mean_over]
    metrics["loss_mean"] = sums["loss_sum"] / denominator if denominator else 0.0
    metrics["loss"] = sums["loss_sum"]
    return metrics
