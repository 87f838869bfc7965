"""Every loss against its formula in float64, written out token by token, with the gradient that autograd finds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from support.loss_formulas import CONFIGS, FORMULAS, in_sequences

from river_client import wire
from river_trainer.errors import InvalidTaskError
from river_trainer.loss_specs import SPECS, LossSpecError
from river_trainer.losses import (
    LOSSES,
    Loss,
    LossInput,
    Sums,
    check_data,
    counted_positions,
    find_loss,
    loss_data,
    metrics_of,
)
from river_trainer.packing import TrainingSequence, decode_sequence
from river_trainer.protocol import Sequence

LENGTHS = (7, 5, 9, 4)
POLICY_LOSSES = ("importance_sampling", "ppo", "cispo", "echo_cispo", "dro", "gspo")


def make_input(name: str, seed: int = 1, lengths: tuple[int, ...] = LENGTHS) -> LossInput:
    """Numbers as in training: ratios on both sides of every bound, some positions that do not count."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)

    def numbers() -> torch.Tensor:
        return torch.randn(count, generator=generator)

    old = -numbers().abs()
    weights, advantages, echo_weights = numbers().abs(), numbers(), numbers().abs()
    position = 0
    for length in lengths:
        advantages[position : position + 2] = 0.0  # the prompt
        position += length
        weights[position - 1] = echo_weights[position - 1] = 0.0
    return as_input(
        name,
        logprobs=(old + 0.5 * numbers()).requires_grad_(),
        entropy=numbers().abs(),
        weights=weights,
        old_logprobs=old,
        advantages=advantages,
        echo_weights=echo_weights,
        lengths=lengths,
        config=find_loss(name, CONFIGS.get(name, {})).config,
    )


def as_input(name: str, **values: Any) -> LossInput:
    """The input of a loss with the positions that count for it."""
    weights, advantages, lengths = (values[key] for key in ("weights", "advantages", "lengths"))
    counted, counts = counted_positions(SPECS[name], weights, advantages, lengths)
    return LossInput(**values, counted=counted, counts=counts)


def changed(name: str, data: LossInput, **values: Any) -> LossInput:
    """`data` with other values, in place or given here, and so perhaps other positions that count."""
    kept = {item.name: getattr(data, item.name) for item in dataclasses.fields(data)}
    del kept["counted"], kept["counts"]
    return as_input(name, **(kept | values))


def computed(name: str, data: LossInput) -> tuple[dict[str, float], torch.Tensor, dict[str, float]]:
    """Metrics, gradient by the log-probabilities, and sums."""
    data = changed(name, data)
    value, sums = LOSSES[name].function(data)
    (gradient,) = torch.autograd.grad(value, data.logprobs)
    numbers = {key: float(total) for key, total in sums.items()}
    assert value.item() == pytest.approx(numbers["loss_sum"], rel=1e-5)
    return metrics_of(LOSSES[name], numbers), gradient, numbers


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_loss_is_its_formula(name: str, seed: int) -> None:
    """Value and gradient are those of the formula in float64."""
    data = make_input(name, seed)
    metrics, gradient, _ = computed(name, data)
    logprobs = data.logprobs.detach().double().requires_grad_()
    expected = FORMULAS[name](in_sequences(data, logprobs), data.config)
    (expected_gradient,) = torch.autograd.grad(expected, logprobs)
    assert metrics["loss"] == metrics["loss_sum"] == pytest.approx(expected.item(), rel=1e-5)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


def own_settings(name: str, seed: int) -> LossInput:
    """`make_input` with bounds of each token's own, and for gspo with a mask that is not what counts."""
    data = make_input(name, seed)
    generator = torch.Generator().manual_seed(seed)
    count = sum(LENGTHS)
    mask = (torch.rand(count, generator=generator) > 0.3).float()
    mask[[2, 9, 14, 23]] = 1.0  # no sequence is without
    own: dict[str, Any] = {
        "clip_low": 0.6 + 0.3 * torch.rand(count, generator=generator),
        "clip_high": 1.05 + 0.5 * torch.rand(count, generator=generator),
    }
    if name == "gspo":
        own["sequence_mask"] = mask
    return changed(name, data, **own)


@pytest.mark.parametrize("name", ["ppo", "cispo", "echo_cispo", "gspo"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_bounds_and_masks_of_tokens_are_in_the_formula(name: str, seed: int) -> None:
    """Each token is clipped to its own bounds, and a sequence's ratio is the mean over its mask."""
    data = own_settings(name, seed)
    metrics, gradient, _ = computed(name, data)
    logprobs = data.logprobs.detach().double().requires_grad_()
    expected = FORMULAS[name](in_sequences(data, logprobs), data.config)
    (expected_gradient,) = torch.autograd.grad(expected, logprobs)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)
    plain, _, _ = computed(name, make_input(name, seed))
    assert plain["loss"] != pytest.approx(metrics["loss"], rel=1e-3)


@pytest.mark.parametrize("name", ["cispo", "echo_cispo"])
def test_a_ratio_of_one_is_a_plain_policy_gradient(name: str) -> None:
    """With `unit_ratio` the gradient by each log-probability is minus its weighted advantage, and its echo."""
    data = make_input(name)
    config = {**data.config, "unit_ratio": 1.0}
    metrics, gradient, _ = computed(name, changed(name, data, config=config))
    expected = -data.weights * data.advantages
    if name == "echo_cispo":
        expected = expected - config["echo_coef"] * data.echo_weights
    torch.testing.assert_close(gradient, expected)
    assert metrics["mean_ratio"] != pytest.approx(1.0, abs=1e-3)


def test_the_metrics_of_echoes() -> None:
    """What is echoed is counted, weighed, and told where it is also learned as a policy."""
    data = make_input("echo_cispo")
    metrics, _, _ = computed("echo_cispo", data)
    echoed = data.echo_weights != 0
    counted = (data.weights * data.advantages) != 0
    assert metrics["echo_num_tokens"] == echoed.sum()
    assert metrics["echo_weight_sum"] == pytest.approx(data.echo_weights.double().sum().item())
    assert metrics["echo_policy_overlap"] == (echoed & counted).sum() > 0
    expected = -(data.echo_weights * data.logprobs.detach()).double().sum().item()
    assert metrics["echo_loss_sum"] == pytest.approx(expected, rel=1e-5)


def test_fields_that_some_sequences_lack() -> None:
    """A sequence without bounds of its own has the settings', and one without a mask what counts."""
    spare = decoded(old_logprobs=floats(3), advantages=floats(3, 0.5))
    own = dataclasses.replace(
        spare,
        clip_high=torch.tensor([1.5, 1.6, 1.7]),
        sequence_mask=torch.tensor([1.0, 0.0, 0.0]),
    )
    data = loss_data(find_loss("gspo", {"clip_low": 0.5, "clip_high": 2.0}), [spare, own])
    assert data.clip_low is not None
    assert data.clip_high is not None
    assert data.sequence_mask is not None
    assert data.clip_low.tolist() == [0.5] * 6
    assert data.clip_high.tolist() == pytest.approx([2.0, 2.0, 2.0, 1.5, 1.6, 1.7])
    assert data.sequence_mask.tolist() == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    bare = loss_data(find_loss("gspo", {}), [spare])
    assert (bare.clip_low, bare.clip_high, bare.sequence_mask) == (None, None, None)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_metrics_of_policy_losses(name: str) -> None:
    """Means over the tokens whose weighted advantage is not zero."""
    data = make_input(name)
    metrics, gradient, _ = computed(name, data)
    counted = (data.weights * data.advantages) != 0
    log_ratio = (data.logprobs.detach() - data.old_logprobs).double()[counted]
    ratio = log_ratio.exp()
    assert metrics["num_tokens"] == counted.sum().item() == sum(LENGTHS) - 3 * len(LENGTHS)
    assert metrics["kl"] == pytest.approx((ratio - 1 - log_ratio).mean().item())
    assert metrics["kl_k1"] == pytest.approx(-log_ratio.mean().item())
    assert metrics["entropy"] == pytest.approx(data.entropy[counted].mean().item())
    assert metrics["loss_mean"] == pytest.approx(metrics["loss_sum"] / metrics["num_tokens"])
    if name != "gspo":
        assert metrics["mean_ratio"] == pytest.approx(ratio.mean().item())
    if name in {"ppo", "gspo"}:
        clipped = (gradient[counted] == 0).sum().item()
        assert 0 < clipped < len(ratio)
        assert metrics["clip_frac"] == pytest.approx(clipped / len(ratio))
    if name in {"cispo", "echo_cispo"}:
        low = data.config["clip_low"]
        cut = ((ratio > 1.5) | (ratio < low)).double().mean().item()
        assert ((ratio < low).sum() > 0) == (name == "cispo")
        assert 0 < cut < 1
        assert metrics["clip_frac"] == metrics["truncation_frac"] == pytest.approx(cut)


def test_the_metrics_of_gspo_speak_of_sequences() -> None:
    """The ratio whose mean is told is the sequence's, not the token's."""
    data = make_input("gspo")
    metrics, _, _ = computed("gspo", data)
    counted = (data.weights * data.advantages) != 0
    log_ratio = (data.logprobs.detach() - data.old_logprobs).double()
    ratios: list[float] = []
    for mask, values in zip(counted.split(LENGTHS), log_ratio.split(LENGTHS), strict=True):
        ratios += [math.exp(values[mask].mean())] * int(mask.sum())
    assert metrics["mean_ratio"] == pytest.approx(np.mean(ratios))


def test_the_metrics_of_cross_entropy() -> None:
    """`loss_mean` is by weight, the entropy by token with a weight."""
    data = make_input("cross_entropy")
    metrics, _, _ = computed("cross_entropy", data)
    assert metrics["weight_sum"] == pytest.approx(data.weights.double().sum().item())
    assert metrics["loss_mean"] == pytest.approx(metrics["loss_sum"] / metrics["weight_sum"])
    assert metrics["num_tokens"] == sum(LENGTHS) - len(LENGTHS)
    assert metrics["entropy"] == pytest.approx(data.entropy[data.weights != 0].mean().item())


def test_the_metrics_of_dpo_speak_of_pairs() -> None:
    """Rewards, margin, accuracy and the mean loss are by pair."""
    data = make_input("dpo")
    metrics, _, _ = computed("dpo", data)
    gains = data.weights * (data.logprobs.detach() - data.old_logprobs)
    rewards = [0.1 * piece.double().sum().item() for piece in gains.split(LENGTHS)]
    data_rewards = [value * CONFIGS["dpo"]["beta"] / 0.1 for value in rewards]
    chosen, rejected = np.array(data_rewards[::2]), np.array(data_rewards[1::2])
    assert metrics["num_pairs"] == 2
    assert metrics["chosen_reward"] == pytest.approx(chosen.mean(), rel=1e-5)
    assert metrics["rejected_reward"] == pytest.approx(rejected.mean(), rel=1e-5)
    assert metrics["margin"] == pytest.approx((chosen - rejected).mean(), rel=1e-5)
    assert metrics["accuracy"] == (chosen > rejected).mean()
    assert metrics["loss_mean"] == pytest.approx(metrics["loss_sum"] / 2)


def test_soft_targets_are_a_weighted_sum_over_all_of_them() -> None:
    """Cross-entropy of [N, K]; a position counts if any of its targets has a weight."""
    plain = make_input("cross_entropy")
    generator = torch.Generator().manual_seed(4)
    logprobs = (-torch.rand(sum(LENGTHS), 3, generator=generator)).requires_grad_()
    weights = torch.rand(sum(LENGTHS), 3, generator=generator)
    weights[4], weights[5, 1:] = 0.0, 0.0
    data = changed("cross_entropy", plain, logprobs=logprobs, weights=weights)
    metrics, gradient, _ = computed("cross_entropy", data)
    expected = -(weights.double() * logprobs.detach().double()).sum().item()
    assert metrics["loss"] == pytest.approx(expected)
    assert metrics["num_tokens"] == sum(LENGTHS) - 1
    assert metrics["loss_mean"] == pytest.approx(expected / weights.double().sum().item())
    assert torch.equal(gradient, -weights)


@pytest.mark.parametrize("name", SPECS)
def test_pieces_add_up(name: str) -> None:
    """Computed group by group, sums are those of the whole, and every token's gradient has the same bits."""
    data = make_input(name)
    metrics, gradient, _ = computed(name, data)
    sums: dict[str, float] = {}
    gradients: list[torch.Tensor] = []
    for half in (slice(0, 2), slice(2, 4)):
        start, count = sum(LENGTHS[: half.start]), sum(LENGTHS[half])
        tensors = {
            name: value.detach()[start : start + count]
            for name in ("logprobs", "entropy", "weights", "old_logprobs", "advantages")
            if (value := getattr(data, name)) is not None
        }
        tensors["logprobs"].requires_grad_()
        echo_weights = data.echo_weights[start : start + count]
        piece = as_input(
            name, **tensors, echo_weights=echo_weights, lengths=LENGTHS[half], config=data.config
        )
        _, of_piece, piece_sums = computed(name, piece)
        gradients.append(of_piece)
        sums = {key: sums.get(key, 0.0) + value for key, value in piece_sums.items()}
    assert metrics_of(LOSSES[name], sums) == pytest.approx(metrics, rel=1e-6)
    assert torch.equal(torch.cat(gradients), gradient)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("filler", [-1e30, 1e30], ids=["overflowing", "vanishing"])
def test_filler_does_no_harm(name: str, filler: float) -> None:
    """Where nothing counts, any old log-probability gives the same loss and gradient."""
    data = make_input(name)
    if name == "dpo":
        data.weights[[0, 1, 8]] = 0.0
    plain, gradient, _ = computed(name, data)
    data.old_logprobs[[0, 1, 6]] = filler
    spoilt, again, _ = computed(name, data)
    assert spoilt == plain
    assert torch.equal(again, gradient)


@pytest.mark.parametrize("name", SPECS)
def test_nothing_that_counts_is_no_loss(name: str) -> None:
    """Weights of zero everywhere give a loss without a gradient, and metrics that are numbers."""
    data = make_input(name)
    zeros = torch.zeros_like(data.weights)
    data = changed(name, data, weights=zeros, echo_weights=zeros)
    metrics, gradient, _ = computed(name, data)
    assert metrics["loss"] == pytest.approx(2 * math.log(2) if name == "dpo" else 0.0)
    assert all(math.isfinite(value) for value in metrics.values())
    assert not gradient.any()


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_a_bound_ratio_may_overflow(name: str) -> None:
    """What a bound cuts has a finite loss and gradient, even when its own exponential is infinite."""
    data = make_input(name)
    data.old_logprobs[3], data.advantages[3] = -200.0, 1.0
    _, gradient, sums = computed(name, data)
    assert all(math.isfinite(value) for value in sums.values())
    assert gradient.isfinite().all()


# ---- Settings and data -----------------------------------------------------------------------------------------------


def test_every_loss_is_known_everywhere() -> None:
    """Specs, functions and the names of the wire are the same losses."""
    assert set(SPECS) == set(LOSSES) == set(get_args(wire.LossName)) == set(FORMULAS)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("nonsense", {}, "loss_fn: 'nonsense' is not offered, there are cross_entropy, "),
        (
            "cross_entropy",
            {"beta": 1.0},
            "loss_config.beta: unknown, the loss cross_entropy has logprob_temperature",
        ),
        ("ppo", {"eps_max": 1.0}, "loss_config.eps_max: unknown, the loss ppo has clip_low, clip_"),
        ("ppo", {"clip_high": 0.2}, "loss_config.clip_high: 0.2, must be 1 to 1e+06"),
        ("gspo", {"clip_low": 1.01}, "loss_config.clip_low: 1.01, must be 0 to 1"),
        (
            "ppo",
            {"logprob_temperature": 0.0},
            "loss_config.logprob_temperature: 0, must be 0.01 to 100",
        ),
        ("dro", {"beta": -0.1}, "loss_config.beta: -0.1, must be 0 to 1000"),
        ("dpo", {"beta": math.nan}, "loss_config.beta: nan, must be 0 to 1000"),
        ("cispo", {"eps_max": math.inf}, "loss_config.eps_max: inf, must be 0 to 1e+06"),
    ],
)
def test_wrong_settings_are_refused(name: str, config: dict[str, float], message: str) -> None:
    """The refusal names the field, the value and the range."""
    with pytest.raises(InvalidTaskError) as caught:
        find_loss(name, config)
    assert str(caught.value).startswith(message)
    assert caught.value.param == message.split(":", maxsplit=1)[0]


def test_settings_have_defaults() -> None:
    """What is not given is the spec's."""
    assert find_loss("echo_cispo", {"echo_coef": 0}).config == {
        "clip_low": 0.0,
        "eps_max": 6.0,
        "unit_ratio": 0.0,
        "echo_coef": 0.0,
    }
    assert find_loss("cross_entropy", {}).config == {"logprob_temperature": 1.0}
    for name, loss in LOSSES.items():
        assert find_loss(name, loss.config) == loss


def floats(count: int, value: float = 1.0) -> bytes:
    return np.full(count, value, "<f4").tobytes()


def integers(*values: Any) -> bytes:
    return np.array(values, "<i4").tobytes()


def decoded(**fields: Any) -> TrainingSequence:
    given: dict[str, Any] = {"input_ids": integers(1, 2, 3)} | fields
    sequence = Sequence(**given)
    return decode_sequence(sequence, index=5, vocab_size=10, context_length=8)


def test_soft_targets_are_decoded() -> None:
    """[T, K] targets and weights; at the last index the weights are zero and the targets may be filler."""
    sequence = decoded(
        target_tokens=integers([1, 2], [3, 4], [-1, 99]),
        weights=floats(6, 0.5),
        echo_weights=floats(3, 2.0),
        targets_per_token=2,
    )
    assert sequence.targets_per_token == 2
    assert sequence.targets.tolist() == [[1, 2], [3, 4], [0, 0]]
    assert sequence.weights.tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]
    assert sequence.echo_weights is not None
    assert sequence.echo_weights.tolist() == [2.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"targets_per_token": 2}, "target_tokens"),
        ({"targets_per_token": 0}, "target_tokens"),
        ({"targets_per_token": 257}, "target_tokens"),
        ({"targets_per_token": 2, "target_tokens": integers(1, 2, 3)}, "target_tokens"),
        (
            {"targets_per_token": 2, "target_tokens": integers([1, 2], [3, 10], [0, 0])},
            "target_tokens[1][1]",
        ),
        ({"target_tokens": integers(1, -2, 3)}, "target_tokens[1]"),
        ({"input_ids": integers(1, 2, 10)}, "input_ids[2]"),
        (
            {
                "targets_per_token": 2,
                "target_tokens": integers([1, 2], [3, 4], [0, 0]),
                "weights": floats(3),
            },
            "weights",
        ),
        ({"echo_weights": floats(2)}, "echo_weights"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], param: str) -> None:
    """The trainer names sequence, field and index, too."""
    with pytest.raises(InvalidTaskError) as caught:
        decoded(**fields)
    assert caught.value.param == f"data[5].{param}"


@pytest.mark.parametrize(
    ("name", "fields", "count", "param"),
    [
        ("ppo", {"old_logprobs": floats(3)}, 1, "data[0].advantages"),
        ("dpo", {}, 2, "data[0].old_logprobs"),
        ("dpo", {"old_logprobs": floats(3)}, 3, "data"),
        ("cross_entropy", {"clip_low": floats(3)}, 1, "data[0].clip_low"),
        (
            "ppo",
            {"old_logprobs": floats(3), "advantages": floats(3), "sequence_mask": floats(3)},
            1,
            "data[0].sequence_mask",
        ),
        (
            "echo_cispo",
            {"old_logprobs": floats(3), "advantages": floats(3)},
            1,
            "data[0].echo_weights",
        ),
        (
            "dpo",
            {
                "old_logprobs": floats(3),
                "target_tokens": integers([1, 2], [3, 4], [0, 0]),
                "weights": floats(6),
                "targets_per_token": 2,
            },
            2,
            "data[0].target_tokens",
        ),
    ],
)
def test_data_that_a_loss_cannot_use(
    name: str, fields: dict[str, Any], count: int, param: str
) -> None:
    """A missing field, half a pair, soft targets where there is no sense in them."""
    with pytest.raises(InvalidTaskError) as caught:
        check_data(LOSSES[name], [decoded(**fields)] * count)
    assert caught.value.param == param


def test_a_loss_of_ones_own_is_a_function() -> None:
    """A loss is a spec and a function; nothing else has to know of it."""
    spec = dataclasses.replace(SPECS["dro"], name="half", parameters={})

    def half(data: LossInput) -> tuple[torch.Tensor, Sums]:
        total = 0.5 * data.logprobs.sum()
        return total, {"loss_sum": total.detach(), "num_tokens": len(data.weights)}

    loss = Loss(spec, half)
    with pytest.raises(LossSpecError):
        spec.checked_config({"beta": 1.0})
    _, sums = loss.function(make_input("dro"))
    metrics = metrics_of(loss, {name: float(value) for name, value in sums.items()})
    assert metrics["loss_mean"] == pytest.approx(metrics["loss"] / sum(LENGTHS))
