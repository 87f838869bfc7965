"""The losses, all summed over tokens (dpo: over pairs), as functions of the log-probabilities of one job's positions.

A loss is a function of `LossInput`, registered under the name of its spec (`loss_specs.py`). It returns its sum, to be
differentiated, and the sums that its metrics are made of, in float64, so that a job may be computed in pieces of whole
groups. With lp the log-probability, q the old one, A the advantage, w the weight and r = exp(lp - q):

* `cross_entropy`: -sum w lp, over all K targets of a position if they are soft
* `importance_sampling`: -sum w A r
* `ppo`: -sum min(w A r, w A clip(r, clip_low, clip_high)); Schulman et al. 2017
* `cispo`: -sum w A sg(clip(r, clip_low, eps_max)) lp, sg meaning that no gradient flows; Chen et al. 2025
* `echo_cispo`: cispo - echo_coef sum e lp, e the echo weight: cross-entropy on what the policy did not write
* `dro`: -sum w (A lp - beta/2 (lp - q)^2); Richemond et al. 2024
* `gspo`: ppo with the ratio of a whole sequence, exp(mean log r) over its mask or else over what counts, whose gradient
  each token takes as its own, so that advantages may differ between tokens (GSPO-token); Zheng et al. 2025
* `dpo`: -sum log sigmoid(beta (sum w log r of the chosen - sum w log r of the rejected)); Rafailov et al. 2023

Positions that count: for cross_entropy and dpo those with a weight, for the others those whose weighted advantage is
not zero, since a prompt's `old_logprobs` are filler. Only these enter an exponential: a filler's ratio may overflow,
and infinity times zero is not a number.

`kl` is the k3 estimate of KL(old || new), mean(r - 1 - log r), which is never negative; `kl_k1` is the plain one,
mean(q - lp). `clip_frac` is the share of counting tokens without a gradient because of a bound, in cispo (there also
called `truncation_frac`) the share whose ratio is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional

from river_trainer.errors import InvalidTaskError
from river_trainer.loss_specs import SPECS, LossSpec, LossSpecError, find_spec
from river_trainer.packing import TrainingSequence, join_targets, own_targets

Sums = dict[str, torch.Tensor | int]
"""Scalars, numbers where the host knows them already."""


@dataclass(frozen=True, kw_only=True)
class LossData:
    """What is known before a pass of whole groups of one operation: sequences of `lengths`, N positions in all.

    Tensors are [N]; with soft targets `weights` is [N, K]. `weights` and `echo_weights` are zero where nothing counts.
    `counted` are the positions that count, [C], of which each sequence has one of `counts`: found out on the host,
    because a device would have to be waited for. `config` has a value for each parameter of the loss. The bounds
    `clip_low` and `clip_high` are there, both, if any sequence has its own; so is the `sequence_mask`, zero or one.
    """

    weights: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    echo_weights: torch.Tensor
    counted: torch.Tensor
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    config: Mapping[str, float]
    clip_low: torch.Tensor | None = None
    clip_high: torch.Tensor | None = None
    sequence_mask: torch.Tensor | None = None

    def with_outputs(self, logprobs: torch.Tensor, entropy_N: torch.Tensor) -> LossInput:  # noqa: N803  # the shape
        """The input of the loss, from the positions' rows of a pass, [N] or [N, K], whose K may be larger."""
        mine = {field.name: getattr(self, field.name) for field in fields(LossData)}
        width = 1 if self.weights.ndim == 1 else self.weights.shape[1]
        return LossInput(**mine, logprobs=own_targets(logprobs, width), entropy=entropy_N)


@dataclass(frozen=True, kw_only=True)
class LossInput(LossData):
    """What a loss is computed from; `logprobs`, [N] or [N, K], carries gradients, `entropy` [N] none."""

    logprobs: torch.Tensor
    entropy: torch.Tensor


LossFunction = Callable[[LossInput], tuple[torch.Tensor, Sums]]


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss with the settings that it is to be computed with."""

    spec: LossSpec
    function: LossFunction
    config: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def sequences_per_group(self) -> int:
        return self.spec.sequences_per_group


LOSSES: dict[str, Loss] = {}
"""Every loss, with its defaults."""


def loss(name: str) -> Callable[[LossFunction], LossFunction]:
    """Registers the function of the loss that has the spec `name`."""

    def register(function: LossFunction) -> LossFunction:
        assert name not in LOSSES
        LOSSES[name] = Loss(SPECS[name], function, SPECS[name].checked_config({}))
        return function

    return register


# ---- Losses ----------------------------------------------------------------------------------------------------------


@loss("cross_entropy")
def cross_entropy(data: LossInput) -> tuple[torch.Tensor, Sums]:
    terms = -data.weights * data.logprobs
    return terms.sum(), {
        "loss_sum": _total(terms),
        "num_tokens": len(data.counted),
        "weight_sum": _total(data.weights),
        "entropy": _total(data.entropy[data.counted]),
    }


@loss("importance_sampling")
def importance_sampling(data: LossInput) -> tuple[torch.Tensor, Sums]:
    tokens = _policy_tokens(data)
    terms = -tokens.gain * tokens.log_ratio.exp()
    return terms.sum(), tokens.sums(terms)


@loss("ppo")
def ppo(data: LossInput) -> tuple[torch.Tensor, Sums]:
    tokens = _policy_tokens(data)
    ratio, clipped = _pessimistic_ratio(tokens.log_ratio, tokens.gain, _bounds(data))
    terms = -tokens.gain * ratio
    return terms.sum(), tokens.sums(terms, clip_frac=clipped)


@loss("cispo")
def cispo(data: LossInput) -> tuple[torch.Tensor, Sums]:
    tokens = _policy_tokens(data)
    ratio = tokens.log_ratio.detach().exp()
    if data.config["unit_ratio"]:
        ratio = torch.ones_like(ratio)
    low, high = _bounds(data)
    terms = -tokens.gain * ratio.clamp(low, high) * tokens.logprobs
    cut = (ratio > high) | (ratio < low)
    return terms.sum(), tokens.sums(terms, clip_frac=cut, truncation_frac=cut)


@loss("echo_cispo")
def echo_cispo(data: LossInput) -> tuple[torch.Tensor, Sums]:
    policy_loss, sums = cispo(data)
    echoes = -data.echo_weights * data.logprobs
    echo_sum = _total(echoes)
    sums["loss_sum"] = sums["loss_sum"] + data.config["echo_coef"] * echo_sum
    sums |= {
        "echo_loss_sum": echo_sum,
        "echo_num_tokens": (data.echo_weights != 0).sum(),
        "echo_weight_sum": _total(data.echo_weights),
        "echo_policy_overlap": (data.echo_weights[data.counted] != 0).sum(),
    }
    return policy_loss + data.config["echo_coef"] * echoes.sum(), sums


@loss("dro")
def dro(data: LossInput) -> tuple[torch.Tensor, Sums]:
    tokens = _policy_tokens(data)
    penalty = 0.5 * data.config["beta"] * tokens.log_ratio.square()
    terms = tokens.weights * penalty - tokens.gain * tokens.logprobs
    return terms.sum(), tokens.sums(terms)


@loss("gspo")
def gspo(data: LossInput) -> tuple[torch.Tensor, Sums]:
    tokens = _policy_tokens(data)
    # The value is the sequence's mean, the gradient that of the token's own log-probability.
    if data.sequence_mask is None:
        sequence_log_ratio = tokens.mean_by_sequence(tokens.log_ratio.detach())
    else:
        sequence_log_ratio = _masked_means(data, data.sequence_mask)[data.counted]
    log_ratio = sequence_log_ratio + tokens.logprobs - tokens.logprobs.detach()
    ratio, clipped = _pessimistic_ratio(log_ratio, tokens.gain, _bounds(data))
    terms = -tokens.gain * ratio
    sums = tokens.sums(terms, clip_frac=clipped)
    return terms.sum(), sums | {"mean_ratio": _total(sequence_log_ratio.double().exp())}


@loss("dpo")
def dpo(data: LossInput) -> tuple[torch.Tensor, Sums]:
    log_ratio = (
        torch.where(data.weights != 0, data.logprobs - data.old_logprobs, 0.0) * data.weights
    )
    by_sequence = torch.stack([piece.sum() for piece in log_ratio.split(data.lengths)])
    chosen, rejected = (data.config["beta"] * by_sequence).view(-1, 2).unbind(dim=1)
    terms = -functional.logsigmoid(chosen - rejected)
    return terms.sum(), {
        "loss_sum": _total(terms),
        "num_tokens": len(data.counted),
        "num_pairs": len(terms),
        "accuracy": (chosen > rejected).sum(),
        "margin": _total(chosen - rejected),
        "chosen_reward": _total(chosen),
        "rejected_reward": _total(rejected),
        "entropy": _total(data.entropy[data.counted]),
    }


# ---- What they share -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _PolicyTokens:
    """The counting tokens [C] of a policy loss, in each sequence one of `counts`; `gain` is the weighted advantage."""

    logprobs: torch.Tensor
    log_ratio: torch.Tensor
    weights: torch.Tensor
    gain: torch.Tensor
    entropy: torch.Tensor
    counts: tuple[int, ...]

    def mean_by_sequence(self, values: torch.Tensor) -> torch.Tensor:
        """[C], at each token the mean of `values` over its sequence."""
        # One by one and not scattered: a sequence's sum has the same bits whoever is beside it.
        return torch.cat(
            [
                piece.mean().expand_as(piece) if len(piece) else piece
                for piece in values.split(self.counts)
            ]
        )

    def sums(self, terms: torch.Tensor, **shares: torch.Tensor) -> Sums:
        """The sums of all policy losses; `shares` are masks [C] whose share of the tokens is a metric."""
        log_ratio = self.log_ratio.detach().double()
        ratio = log_ratio.exp()
        return {
            "loss_sum": _total(terms),
            "num_tokens": len(terms),
            "mean_ratio": ratio.sum(),
            "kl": (ratio - 1 - log_ratio).sum(),
            "kl_k1": -log_ratio.sum(),
            "entropy": _total(self.entropy),
        } | {name: mask.sum() for name, mask in shares.items()}


def _policy_tokens(data: LossInput) -> _PolicyTokens:
    counted = data.counted
    logprobs = data.logprobs.index_select(0, counted)
    weights = data.weights[counted]
    return _PolicyTokens(
        logprobs,
        logprobs - data.old_logprobs[counted],
        weights,
        weights * data.advantages[counted],
        data.entropy[counted],
        data.counts,
    )


def _masked_means(data: LossInput, mask: torch.Tensor) -> torch.Tensor:
    """[N], at each position the mean of log r over the masked ones of its sequence; zero if there are none."""
    # Where the mask is zero, whatever stands there may be filler.
    log_ratio = torch.where(mask != 0, data.logprobs.detach() - data.old_logprobs, 0.0)
    return torch.cat(
        [
            (values.sum() / where.sum().clamp(min=1.0)).expand_as(values)
            for values, where in zip(
                log_ratio.split(data.lengths), mask.split(data.lengths), strict=True
            )
        ]
    )


def _bounds(data: LossInput) -> Any:
    """Of the ratio at the counting tokens, low and high: numbers, or where any sequence has its own, two [C]."""
    if data.clip_low is None or data.clip_high is None:
        return configured_bounds(data.config)
    return data.clip_low[data.counted], data.clip_high[data.counted]


def configured_bounds(config: Mapping[str, float]) -> tuple[float, float]:
    """Low and high; losses that cut the ratio call the latter `eps_max`."""
    return config["clip_low"], config["clip_high" if "clip_high" in config else "eps_max"]


def _pessimistic_ratio(
    log_ratio: torch.Tensor, gain: torch.Tensor, bounds: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ratio or its bound, whichever gains less, and where it is the bound, which has no gradient; two [C]."""
    low, high = bounds
    plain = log_ratio.detach().exp()
    clipped = torch.where(gain > 0, plain > high, plain < low)
    # The exponential of what is clipped away may be infinite, and would spoil the gradient even unused.
    ratio = log_ratio.masked_fill(clipped, 0.0).exp()
    return torch.where(clipped, plain.clamp(low, high), ratio), clipped


def _total(values: torch.Tensor) -> torch.Tensor:
    return values.detach().sum(dtype=torch.float64)


# ---- By name, with data, and as metrics ------------------------------------------------------------------------------

TOTALS = frozenset(
    {
        "loss_sum",
        "num_tokens",
        "weight_sum",
        "num_pairs",
        "echo_loss_sum",
        "echo_num_tokens",
        "echo_weight_sum",
        "echo_policy_overlap",
    }
)
"""Reported as they are."""
OF_PAIRS = frozenset({"accuracy", "margin", "chosen_reward", "rejected_reward"})
"""Reported as a mean over `num_pairs`; every other sum is reported as a mean over `num_tokens`."""


def find_loss(name: str, config: Mapping[str, float]) -> Loss:
    """The loss called `name`, with the settings in `config` and its defaults for the others.

    Raises:
        InvalidTaskError: there is none, or `config` does not fit it.
    """
    try:
        spec = find_spec(name)
        return Loss(spec, LOSSES[name].function, spec.checked_config(config))
    except LossSpecError as error:
        raise InvalidTaskError(str(error), param=error.param) from None


def check_data(loss: Loss, sequences: Sequence[TrainingSequence]) -> None:
    """Refuses data that the loss cannot be computed from.

    Raises:
        InvalidTaskError: a field is missing, a group is not whole, or targets are soft and may not be.
    """
    try:
        loss.spec.check_data(sequences)
    except LossSpecError as error:
        raise InvalidTaskError(str(error), param=error.param) from None
    for index, sequence in enumerate(sequences):
        if sequence.targets_per_token > 1 and not loss.spec.soft_targets:
            where = f"data[{index}].target_tokens"
            raise InvalidTaskError(
                f"{where}: the loss {loss.name} takes one per token", param=where
            )


def loss_data(loss: Loss, sequences: Sequence[TrainingSequence]) -> LossData:
    """What a loss of whole groups of `sequences` is computed from, before the pass."""

    def joined(name: str) -> torch.Tensor:
        fields = [getattr(sequence, name) for sequence in sequences]
        return torch.cat(
            [
                torch.zeros(sequence.tokens) if values is None else values
                for values, sequence in zip(fields, sequences, strict=True)
            ]
        )

    def own(name: str, instead: torch.Tensor) -> torch.Tensor:
        """[N], a field that some of the sequences have, and for the others what stands `instead`."""
        fields = [getattr(sequence, name) for sequence in sequences]
        return torch.cat(
            [
                default if values is None else values
                for values, default in zip(fields, instead.split(lengths), strict=True)
            ]
        )

    def given(name: str) -> bool:
        return any(getattr(sequence, name) is not None for sequence in sequences)

    weights = join_targets([sequence.weights for sequence in sequences])
    advantages = joined("advantages")
    lengths = tuple(sequence.tokens for sequence in sequences)
    counted, counts = counted_positions(loss.spec, weights, advantages, lengths)
    low = high = mask = None
    everywhere = torch.ones(sum(lengths))
    if given("clip_low") or given("clip_high"):
        low, high = (
            own(name, bound * everywhere)
            for name, bound in zip(
                ("clip_low", "clip_high"), configured_bounds(loss.config), strict=True
            )
        )
    if given("sequence_mask"):
        mask = own("sequence_mask", torch.zeros_like(everywhere).index_fill(0, counted, 1.0))
    return LossData(
        weights=weights,
        old_logprobs=joined("old_logprobs"),
        advantages=advantages,
        echo_weights=joined("echo_weights"),
        counted=counted,
        counts=counts,
        lengths=lengths,
        config=loss.config,
        clip_low=low,
        clip_high=high,
        sequence_mask=mask,
    )


def counted_positions(
    spec: LossSpec, weights: torch.Tensor, advantages: torch.Tensor, lengths: Sequence[int]
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The positions that count, [C] in their order, and how many of them each sequence has."""
    deciding = weights * advantages if "advantages" in spec.needs else weights
    mask = deciding != 0 if deciding.ndim == 1 else (deciding != 0).any(dim=1)
    counted = mask.nonzero()[:, 0]
    before = torch.searchsorted(counted, torch.tensor([0, *accumulate(lengths)]))
    return counted, tuple(before.diff().tolist())


def metrics_of(loss: Loss, sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a whole job from its sums."""

    def mean(total: float, over: str) -> float:
        return total / sums[over] if sums[over] else 0.0

    metrics = {
        name: value
        if name in TOTALS
        else mean(value, "num_pairs" if name in OF_PAIRS else "num_tokens")
        for name, value in sums.items()
    }
    metrics["loss_mean"] = mean(sums["loss_sum"], loss.spec.mean_over)
    metrics["loss"] = sums["loss_sum"]
    return metrics
